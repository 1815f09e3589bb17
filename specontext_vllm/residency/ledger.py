"""The host's books of tiered KV: which frame holds which page, and which layers are resident. Pure
NumPy; moves no data.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from specontext_vllm.step_data import StartedRequest

NO_FRAME = -1
COOLDOWN_STEPS = 32
"""Steps after a layer was offloaded before one may come back."""

RETURN_EVERY = 4
"""Steps between two layers coming back."""

RESERVE_SHARE = 1 / 16
"""Share of the frames that must stay free after a layer has come back: the hysteresis between the
two moves.
"""


@dataclass
class Changes:
    """What one step changed, in the order in which a device must follow: give up, table entries,
    fresh lanes, fills, loads.

    Attributes:
        given_up: frames that hold nothing any more.
        frames: ``(layer, page, frame)`` arrays of changed frame-table entries.
        hot: ``(layer, lane, slot, frame)`` arrays of changed hot-table entries.
        lanes: lanes whose slot maps start afresh.
        capacities: lane -> usable slots per KV head, where it changed.
        trimmed: whether a running lane lost slots.
        offloaded: layers whose hot buffers must be filled from the host pool.
        loads: ``(layer, pages)``: pages to copy from the host pool into their frames, before the
            step reads them.
        returning: ``(layer, pages)`` of a layer that is on its way back, to be copied while the
            step computes; None: none.
    """

    given_up: list[np.ndarray] = field(default_factory=list)
    frames: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    hot: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    lanes: list[int] = field(default_factory=list)
    capacities: dict[int, int] = field(default_factory=dict)
    trimmed: bool = False
    offloaded: list[int] = field(default_factory=list)
    loads: list[tuple[int, np.ndarray]] = field(default_factory=list)
    returning: tuple[int, np.ndarray] | None = None


class Ledger:
    """Frames of an arena, shared by the pages of resident layers and by the hot buffers of
    offloaded ones.

    Layers ``[0, resident)`` are resident: every page that a running request refers to has a frame.
    The others are
    offloaded: a request's *lane* has a hot buffer of up to ``hot_pages`` frames there. Only the
        last ``host_layers`` layers,
    whose pages the host pool mirrors, may be offloaded; they go last first. Under pressure, frames
    of mirrored pages that no running request refers to go before a layer does.

    A layer of many pages comes back over several steps: it gets its frames at once, stays offloaded
        while they are filled a share a step, and is
    resident when the rest is small. What is written meanwhile goes to the host pool only, so such
    pages are copied (again) afterwards.

    Args:
        num_layers: L.
        num_pages: T, logical pages that the scheduler hands out.
        frames: ids of the frames this ledger may hand out.
        host_layers: M, layers that the host pool mirrors.
        hot_pages: S, most frames of one lane's hot buffer in one layer.
        max_requests: lanes.
        keep_unreferenced: whether pages without a request keep their content (prefix caching).
        return_pages: pages of a returning layer that are copied in one step, beside as many as the
            step before wrote.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        frames: np.ndarray,
        host_layers: int,
        hot_pages: int,
        max_requests: int,
        keep_unreferenced: bool,
        return_pages: int,
    ) -> None:
        self.num_layers, self.num_pages, self.host_layers, self.hot_pages = (
            num_layers,
            num_pages,
            host_layers,
            hot_pages,
        )
        self.keep_unreferenced, self.return_pages = keep_unreferenced, return_pages
        self.hot_limit = hot_pages
        self.num_frames = len(frames)
        self.frame_table = np.full((num_layers, num_pages), NO_FRAME, np.int32)
        self.hot_table = np.full((num_layers, max_requests, hot_pages), NO_FRAME, np.int32)
        self.references = np.zeros(num_pages, np.int32)
        self.capacity = np.zeros(max_requests, np.int32)
        self.resident = num_layers
        self.lanes: dict[str, int] = {}
        self._pages: dict[str, list[int]] = {}
        self._free_lanes = list(range(max_requests))[::-1]
        self._free = np.array(frames[::-1], np.int32)
        self._num_free = self.num_frames
        self._steps_to_return = COOLDOWN_STEPS
        self._stale: np.ndarray | None = None
        """``[T]`` bool while layer ``resident`` is on its way back: pages whose frame there lacks
        what the host pool has.
        """
        self._written = 0

    @property
    def first_mirrored(self) -> int:
        """First layer that the host pool mirrors."""
        return self.num_layers - self.host_layers

    @property
    def free_frames(self) -> int:
        return self._num_free

    @property
    def framed(self) -> int:
        """Layers whose pages have frames: the resident ones, and one that is on its way back."""
        return self.resident + (self._stale is not None)

    @property
    def used_share(self) -> float:
        """Share of the logical pages that requests in flight hold."""
        return float((self.references > 0).mean())

    def begin_step(
        self,
        released: Iterable[str],
        started: Iterable[StartedRequest],
        grown: Iterable[tuple[str, list[int]]],
        decoding: Iterable[str],
        hot_limit: int | None = None,
        prefilling: Iterable[str] = (),
        written: Iterable[tuple[str, int]] = (),
    ) -> Changes:
        """Follow the scheduler through one step.

        Args:
            released: requests that finished or were preempted; unknown names are ignored.
            started: requests that enter the batch; one that is in it already starts anew (vLLM's
                sessions of streamed input).
            grown: running requests and the pages they got.
            decoding: requests that decode in this step, which need a hot buffer.
            hot_limit: most slots of a lane from now on, at most ``hot_pages``; None: as before.
            prefilling: requests with prompt tokens in this step, or with several. A hot buffer that
                one of them has is forgotten: what is written now goes past it.
            written: requests with tokens in this step, and their first page (counted from the
                request's start) that gets some of them. Of those that start in it, pages that are
                not computed are known to be written.
        Raises:
            RuntimeError: the frames do not suffice with every mirrored layer offloaded; the memory
                model excludes it.
        """
        changes = Changes()
        for name in released:
            if name in self.lanes:
                self._release(name, changes)
        if hot_limit is not None and hot_limit != self.hot_limit:
            self.limit_hot(hot_limit, changes)
        touched: list[int] = []
        hits: list[int] = []
        fresh: list[int] = []
        for request in started:
            # Before a session's references go: without prefix caching, a page that nobody refers to
            # loses its frames.
            np.add.at(self.references, request.pages, 1)
            if request.name in self.lanes:
                self._release(request.name, changes)
            lane = self._free_lanes.pop()
            self.lanes[request.name], self._pages[request.name] = lane, list(request.pages)
            changes.lanes.append(lane)
            touched += request.pages
            hits += request.pages[: request.computed]
            fresh += request.pages[request.computed :]
        for name, pages in grown:
            self._pages[name] += pages
            np.add.at(self.references, pages, 1)
            touched += pages
        changes.lanes += [lane for name in prefilling if self.capacity[lane := self.lanes[name]]]
        wanted = {}
        for name in decoding:
            lane = self.lanes[name]
            most = min(self.hot_limit, len(self._pages[name]))
            if most > self.capacity[lane]:
                wanted[lane] = most
        # Most decode steps need nothing; between two steps of a small model these few array
        # operations would be felt.
        if touched or wanted:
            touched_pages = np.unique(np.array(touched, np.int64))
            self._make_room(touched_pages, wanted, changes)
            self._give_frames(touched_pages, np.array(hits, np.int64), changes)
            self._grow_hot(wanted, changes)
        if self._stale is None:
            self._maybe_return_layer(changes)
        else:
            for name, first in written:
                fresh += self._pages[name][first:]
            self._continue_return(np.array(fresh, np.int64), changes)
        return changes

    def audit(self) -> dict[str, int]:
        """Count everything anew: ``requests``, ``pages`` they hold, ``frames`` in tables,
        ``free_frames``.

        Raises:
            RuntimeError: a frame is owned twice or lost, or a page is counted wrongly; the books
                are of no use any more.
        """
        owned = np.concatenate(
            [self.frame_table[self.frame_table >= 0], self.hot_table[self.hot_table >= 0]]
        )
        everything = np.concatenate([owned, self._free[: self._num_free]])
        if len(everything) != self.num_frames or len(np.unique(everything)) != self.num_frames:
            raise RuntimeError(
                f"specontext: of {self.num_frames} frames {len(owned)} are in tables and "
                f"{self._num_free} free, {len(np.unique(everything))} "
                f"different ones in all; please report it."
            )
        held = np.bincount(
            np.array([page for pages in self._pages.values() for page in pages], np.int64),
            minlength=self.num_pages,
        )
        if (held != self.references).any() or len(self.lanes) + len(self._free_lanes) != len(
            self.capacity
        ):
            raise RuntimeError(
                f"specontext: {len(self.lanes)} requests hold {held.sum()} pages, "
                f"{self.references.sum()} are counted, and "
                f"{len(self._free_lanes)} of {len(self.capacity)} lanes are free; please report it."
            )
        return {
            "requests": len(self.lanes),
            "pages": int((held > 0).sum()),
            "frames": len(owned),
            "free_frames": self._num_free,
        }

    def layers_to_offload(self, hot_limit: int) -> int:
        """Fewest layers that must be offloaded for the requests in flight with hot buffers of up to
        ``hot_limit`` slots.
        """
        live = int((self.references > 0).sum())
        # In layers without a mirror, cached pages without a request keep their frames.
        cached = int((self.frame_table[: self.first_mirrored, self.references == 0] >= 0).sum())
        hot = sum(min(hot_limit, len(pages)) for pages in self._pages.values())
        excess = self.num_layers * live - (self.num_frames - cached)
        if excess <= 0:
            return 0
        return (
            self.host_layers if live <= hot else min(self.host_layers, -(-excess // (live - hot)))
        )

    # -- moves
    # --------------------------------------------------------------------------------------------------------

    def _release(self, name: str, changes: Changes) -> None:
        lane, pages = self.lanes.pop(name), np.array(self._pages.pop(name), np.int64)
        np.subtract.at(self.references, pages, 1)
        self._drop_hot(np.arange(self.resident, self.num_layers), np.array([lane]), changes)
        self.capacity[lane] = 0
        changes.capacities[lane] = 0
        self._free_lanes.append(lane)
        if not self.keep_unreferenced:
            self._drop_frames(
                np.arange(self.num_layers), np.unique(pages[self.references[pages] == 0]), changes
            )

    def limit_hot(self, hot_limit: int, changes: Changes) -> None:
        """Let no lane have more than ``hot_limit`` slots (at most ``hot_pages``) from now on; what
        has to be done on the device goes into ``changes``.
        """
        self.hot_limit = hot_limit
        layers = np.arange(self.resident, self.num_layers)
        for lane in np.flatnonzero(self.capacity > hot_limit):
            beyond = slice(hot_limit, int(self.capacity[lane]))
            held = self.hot_table[layers, lane, beyond]
            self._give_back(held[held >= 0], changes)
            self.hot_table[layers, lane, beyond] = NO_FRAME
            self.capacity[lane] = changes.capacities[int(lane)] = hot_limit
            changes.trimmed = True

    def _make_room(self, touched: np.ndarray, wanted: dict[int, int], changes: Changes) -> None:
        growth = sum(most - int(self.capacity[lane]) for lane, most in wanted.items())
        reclaimed = False
        while True:
            missing = int((self.frame_table[: self.framed, touched] < 0).sum())
            if self._num_free >= missing + growth * (self.num_layers - self.resident):
                return
            if not reclaimed:
                unreferenced = np.flatnonzero(self.references == 0)
                self._drop_frames(
                    np.arange(self.first_mirrored, self.framed), unreferenced, changes
                )
                reclaimed = True
            elif self._stale is not None:
                self._stale = None
                self._steps_to_return = COOLDOWN_STEPS
                self._drop_frames(np.array([self.resident]), np.arange(self.num_pages), changes)
            elif self.resident > self.first_mirrored:
                self._offload_last(changes)
            else:
                raise RuntimeError(
                    f"specontext: {missing} frames are missing, {self._num_free} of "
                    f"{self.num_frames} are free and all "
                    f"{self.host_layers} mirrored layers are offloaded; please report it."
                )

    def _offload_last(self, changes: Changes) -> None:
        self.resident -= 1
        layer = self.resident
        self._steps_to_return = COOLDOWN_STEPS
        self._drop_frames(np.array([layer]), np.arange(self.num_pages), changes)
        lanes = np.flatnonzero(self.capacity)
        for lane in lanes:
            self._add_hot(np.array([layer]), int(lane), 0, int(self.capacity[lane]), changes)
        if len(lanes):
            changes.offloaded.append(layer)

    def _maybe_return_layer(self, changes: Changes) -> None:
        self._steps_to_return -= 1
        if self.resident == self.num_layers or self._steps_to_return > 0:
            return
        self._steps_to_return = COOLDOWN_STEPS
        live, unreferenced = np.flatnonzero(self.references), np.flatnonzero(self.references == 0)
        mirrored = np.arange(self.first_mirrored, self.resident)
        idle = int((self.frame_table[np.ix_(mirrored, unreferenced)] >= 0).sum())
        room = self._num_free - len(live) - RESERVE_SHARE * self.num_frames
        slowly = len(live) > self.return_pages
        if not slowly:
            # Else its hot buffers stay until it is back.
            room += int(self.capacity.sum())
        if room + idle < 0:
            return
        if room < 0:
            self._drop_frames(mirrored, unreferenced, changes)
        if not slowly:
            self._drop_hot(np.array([self.resident]), np.flatnonzero(self.capacity), changes)
        self._set_frames(np.full(len(live), self.resident), live, changes)
        self._stale = np.zeros(self.num_pages, bool)
        self._stale[live] = True
        self._written = 0
        if not slowly:
            self._end_return(live, changes)

    def _continue_return(self, fresh: np.ndarray, changes: Changes) -> None:
        """One step of a layer's way back; ``fresh``: pages that the step writes."""
        self._stale[fresh] = True
        is_rest = self._stale & (self.references > 0)
        stale = np.flatnonzero(is_rest)
        is_rest[fresh] = False
        rest = np.flatnonzero(is_rest)
        # However much each step writes, what is left shrinks.
        share = self.return_pages + self._written
        self._written = len(stale) - len(rest)
        if len(rest) <= share:
            self._drop_hot(np.array([self.resident]), np.flatnonzero(self.capacity), changes)
            # Not known to be whole; the host pool has them.
            self._drop_frames(
                np.array([self.resident]), np.flatnonzero(self.references == 0), changes
            )
            self._end_return(stale, changes)
            return
        # A step that writes nothing runs no layers to copy beside.
        if len(fresh):
            self._stale[rest[:share]] = False
            changes.returning = self.resident, rest[:share]

    def _end_return(self, missing: np.ndarray, changes: Changes) -> None:
        if len(missing):
            changes.loads.append((self.resident, missing))
        self._stale = None
        self.resident += 1
        self._steps_to_return = RETURN_EVERY

    # -- entries
    # ------------------------------------------------------------------------------------------------------

    def _give_frames(self, pages: np.ndarray, hits: np.ndarray, changes: Changes) -> None:
        layers, columns = np.nonzero(self.frame_table[: self.framed, pages] < 0)
        if not len(layers):
            return
        missing = pages[columns]
        self._set_frames(layers, missing, changes)
        if self._stale is not None:
            self._stale[missing[layers == self.resident]] = True
        is_hit = np.isin(missing, hits) & (layers < self.resident)
        if (layers[is_hit] < self.first_mirrored).any():
            raise RuntimeError(
                "specontext: a page of a prefix hit has no frame in a layer without a mirror; "
                "please report it."
            )
        for layer in np.unique(layers[is_hit]):
            changes.loads.append((int(layer), missing[is_hit & (layers == layer)]))

    def _grow_hot(self, wanted: dict[int, int], changes: Changes) -> None:
        layers = np.arange(self.resident, self.num_layers)
        for lane, most in wanted.items():
            self._add_hot(layers, lane, int(self.capacity[lane]), most, changes)
            self.capacity[lane] = most
            changes.capacities[lane] = most

    def _set_frames(self, layers: np.ndarray, pages: np.ndarray, changes: Changes) -> None:
        frames = self._take(len(pages))
        self.frame_table[layers, pages] = frames
        changes.frames.append((layers, pages, frames))

    def _drop_frames(self, layers: np.ndarray, pages: np.ndarray, changes: Changes) -> None:
        rows, columns = np.nonzero(self.frame_table[np.ix_(layers, pages)] >= 0)
        self._give_back(self.frame_table[layers[rows], pages[columns]], changes)
        self.frame_table[layers[rows], pages[columns]] = NO_FRAME

    def _add_hot(
        self, layers: np.ndarray, lane: int, first: int, last: int, changes: Changes
    ) -> None:
        count = last - first
        if not len(layers) or not count:
            return
        frames = self._take(len(layers) * count)
        self.hot_table[layers, lane, first:last] = frames.reshape(len(layers), count)
        slots = np.tile(np.arange(first, last), len(layers))
        changes.hot.append((np.repeat(layers, count), np.full(len(slots), lane), slots, frames))

    def _drop_hot(self, layers: np.ndarray, lanes: np.ndarray, changes: Changes) -> None:
        where = np.ix_(layers, lanes)
        held = self.hot_table[where]
        self._give_back(held[held >= 0], changes)
        self.hot_table[where] = NO_FRAME

    def _take(self, count: int) -> np.ndarray:
        if count > self._num_free:
            raise RuntimeError(
                f"specontext: {count} frames asked for, {self._num_free} free; please report it."
            )
        self._num_free -= count
        return self._free[self._num_free : self._num_free + count].copy()

    def _give_back(self, frames: np.ndarray, changes: Changes) -> None:
        if len(frames):
            self._free[self._num_free : self._num_free + len(frames)] = frames
            self._num_free += len(frames)
            changes.given_up.append(frames.copy())
