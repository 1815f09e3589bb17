"""The host's accounting of the two tiers: which layers are resident, and what the frames hold. Pure
NumPy; moves no data.
"""

from __future__ import annotations

import numpy as np

from specontext_vllm.residency.frames import Changes, FrameTables
from specontext_vllm.residency.requests import RunningRequests
from specontext_vllm.step_data import ScheduledStep

COOLDOWN_STEPS = 32
"""Steps from the offloading of a layer until one may come back."""

RETURN_EVERY = 4
"""Steps between two layers coming back."""

RESERVE_SHARE = 1 / 16
"""Share of the frames that must be free after a layer has come back, so that it does not go again
at once.
"""


class Ledger:
    """Decides which frames hold what: pages of resident layers, or hot buffers of offloaded ones.

    Layers ``[0, resident)`` are resident: every page of a running request has a frame. In the
    others, the offloaded layers, a request's *lane* has a hot buffer of up to ``hot_pages`` frames.
    Only the last ``host_layers`` layers, whose pages the host pool mirrors, may be offloaded, the
    last one first. Under pressure, cached pages of mirrored layers that no running request holds
    give up their frames before a layer is offloaded.

    A layer of many pages comes back over several steps: it gets its frames at once, stays offloaded
    while they are filled a share a step, and becomes resident when little is left. What is written
    meanwhile goes to the host pool alone, so such pages are copied again afterwards.

    Layers are counted in the caller's list of layers, and pages are those of ``PAGE_SIZE`` tokens:
    where vLLM hands out larger blocks, the caller expands them into pages first.

    Args:
        num_layers: L.
        num_pages: T, logical pages that the scheduler hands out.
        frames: ids of the frames to hand out.
        host_layers: M, layers that the host pool mirrors.
        hot_pages: S, frames of one lane's hot buffer in one layer, at the most.
        max_requests: number of lanes.
        keep_unreferenced: whether pages without a request keep their content (prefix caching).
        return_pages: pages of a returning layer to copy in one step, in addition to as many as the
            step before wrote.
        adaptive: layers come and go; else every mirrored layer is offloaded and stays so.

    Attributes:
        frames: the tables.
        requests: the running requests.
        resident: number of resident layers.
        hot_limit: slots that a lane may have now.
        capacity: ``[lanes]`` int32 slots that each lane has.
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
        adaptive: bool = True,
    ) -> None:
        self.num_layers, self.num_pages, self.host_layers = num_layers, num_pages, host_layers
        self.keep_unreferenced, self.return_pages = keep_unreferenced, return_pages
        self.frames = FrameTables(
            frames,
            num_layers=num_layers,
            num_pages=num_pages,
            num_lanes=max_requests,
            hot_pages=hot_pages,
        )
        self.adaptive, self.hot_limit = adaptive, hot_pages
        self.resident = num_layers if adaptive else self.first_mirrored
        self.requests = RunningRequests(num_pages, max_requests)
        self.capacity = np.zeros(max_requests, np.int32)
        self._steps_to_return = COOLDOWN_STEPS
        self._stale: np.ndarray | None = None
        """``[T]`` bool while layer ``resident`` comes back: pages whose frame there lacks what the
        host pool has.
        """
        self._written = 0

    @property
    def first_mirrored(self) -> int:
        """First layer that the host pool mirrors."""
        return self.num_layers - self.host_layers

    @property
    def is_returning(self) -> bool:
        """Whether layer ``resident`` is on its way back."""
        return self._stale is not None

    @property
    def framed(self) -> int:
        """Layers whose pages have frames: the resident ones and one that is on its way back."""
        return self.resident + self.is_returning

    @property
    def used_share(self) -> float:
        """Share of the logical pages that running requests hold."""
        return float((self.requests.references > 0).mean())

    def follow(self, step: ScheduledStep, hot_limit: int | None = None) -> Changes:
        """Follow the scheduler through one step.

        Of ``step``: released requests that are not known are ignored; a started request that is
        already in the batch starts anew (vLLM's sessions of streamed input); a request that decodes
        needs a hot buffer, and the hot buffer of one that prefills is emptied, since its new tokens
        are not written there; pages that a started request has not computed count as written.

        Args:
            hot_limit: slots that a lane may have from now on, at most ``hot_pages``; None for no
                change.
        Raises:
            RuntimeError: the frames do not suffice with every mirrored layer offloaded, which the
                memory model excludes.
        """
        changes, requests = Changes(), self.requests
        for name in step.released:
            if name in requests:
                self._release(name, changes)
        if hot_limit is not None and hot_limit != self.hot_limit:
            self.limit_hot(hot_limit, changes)
        touched: list[int] = []
        hits: list[int] = []
        fresh: list[int] = []
        for request in step.started:
            # Before a session's old references go: without prefix caching a page that no request
            # holds loses its frames.
            requests.hold(request.pages)
            if request.name in requests:
                self._release(request.name, changes)
            changes.lanes.append(requests.start(request.name, request.pages))
            touched += request.pages
            hits += request.pages[: request.computed]
            fresh += request.pages[request.computed :]
        for name, pages in step.grown:
            requests.grow(name, pages)
            touched += pages
        changes.lanes += [
            lane for name in step.prefilling if self.capacity[lane := requests.lanes[name]]
        ]
        wanted = {}
        for name in step.decoding:
            lane = requests.lanes[name]
            slots = min(self.hot_limit, len(requests.pages[name]))
            if slots > self.capacity[lane]:
                wanted[lane] = slots
        # Most decode steps need neither; these array operations would show in a small model's step.
        if touched or wanted:
            touched_pages = np.unique(np.array(touched, np.int64))
            self._make_room(touched_pages, wanted, changes)
            self._give_frames(touched_pages, np.array(hits, np.int64), changes)
            self._grow_hot(wanted, changes)
        if self._stale is None:
            if self.adaptive:
                self._maybe_return_layer(changes)
        else:
            for name, first in step.written:
                fresh += requests.pages[name][first:]
            self._continue_return(self._stale, np.array(fresh, np.int64), changes)
        return changes

    def audit(self) -> dict[str, int]:
        """Count everything anew: ``requests``, ``pages`` they hold, ``frames`` in tables,
        ``free_frames``.

        Raises:
            RuntimeError: a frame is owned twice or lost, or a page or lane is counted wrongly; the
                tiers cannot be trusted any more.
        """
        return {
            "requests": len(self.requests.lanes),
            "pages": self.requests.audit(),
            "frames": self.frames.audit(),
            "free_frames": self.frames.num_free,
        }

    def layers_to_offload(self, hot_limit: int) -> int:
        """The smallest number of offloaded layers with which the running requests fit, with hot
        buffers of up to ``hot_limit`` slots.
        """
        references = self.requests.references
        live = int((references > 0).sum())
        # In layers without a mirror, cached pages without a request keep their frames.
        unmirrored = self.frames.frame_table[: self.first_mirrored, references == 0]
        cached = int((unmirrored >= 0).sum())
        hot = sum(min(hot_limit, len(pages)) for pages in self.requests.pages.values())
        excess = self.num_layers * live - (self.frames.num_frames - cached)
        if excess <= 0:
            return 0
        return (
            self.host_layers if live <= hot else min(self.host_layers, -(-excess // (live - hot)))
        )

    def limit_hot(self, hot_limit: int, changes: Changes) -> None:
        """Let no lane have more than ``hot_limit`` slots (at most ``hot_pages``) from now on; what
        the device must do about it is added to ``changes``.
        """
        self.hot_limit = hot_limit
        for lane in np.flatnonzero(self.capacity > hot_limit).tolist():
            self.frames.drop_slots(
                self._offloaded(), lane, hot_limit, int(self.capacity[lane]), changes
            )
            self.capacity[lane] = changes.capacities[lane] = hot_limit
            changes.trimmed = True

    def _offloaded(self) -> np.ndarray:
        return np.arange(self.resident, self.num_layers)

    def _first_offloaded(self) -> np.ndarray:
        """Layer ``resident`` as an array: the one that was offloaded last and comes back next."""
        return np.array([self.resident])

    def _release(self, name: str, changes: Changes) -> None:
        lane, pages = self.requests.release(name)
        self.frames.drop_lanes(self._offloaded(), np.array([lane]), changes)
        self.capacity[lane] = changes.capacities[lane] = 0
        if not self.keep_unreferenced:
            unused = np.unique(pages[self.requests.references[pages] == 0])
            self.frames.drop_pages(np.arange(self.num_layers), unused, changes)

    def _make_room(self, touched: np.ndarray, wanted: dict[int, int], changes: Changes) -> None:
        """Free frames until ``touched`` pages and ``wanted`` slots (by lane) can have theirs."""
        frames = self.frames
        growth = sum(slots - int(self.capacity[lane]) for lane, slots in wanted.items())
        reclaimed = False
        while True:
            missing = int((frames.frame_table[: self.framed, touched] < 0).sum())
            if frames.num_free >= missing + growth * (self.num_layers - self.resident):
                return
            if not reclaimed:
                mirrored = np.arange(self.first_mirrored, self.framed)
                frames.drop_pages(mirrored, self.requests.unused_pages, changes)
                reclaimed = True
            elif self._stale is not None:
                self._stale = None
                self._steps_to_return = COOLDOWN_STEPS
                frames.drop_pages(self._first_offloaded(), np.arange(self.num_pages), changes)
            elif self.resident > self.first_mirrored:
                self._offload_last(changes)
            else:
                raise RuntimeError(
                    f"specontext: {missing} frames are missing, {frames.num_free} of "
                    f"{frames.num_frames} are free and all "
                    f"{self.host_layers} mirrored layers are offloaded; please report it."
                )

    def _offload_last(self, changes: Changes) -> None:
        self.resident -= 1
        self._steps_to_return = COOLDOWN_STEPS
        self.frames.drop_pages(self._first_offloaded(), np.arange(self.num_pages), changes)
        lanes = np.flatnonzero(self.capacity).tolist()
        for lane in lanes:
            self.frames.give_slots(
                self._first_offloaded(), lane, 0, int(self.capacity[lane]), changes
            )
        if lanes:
            changes.offloaded.append(self.resident)

    def _maybe_return_layer(self, changes: Changes) -> None:
        self._steps_to_return -= 1
        if self.resident == self.num_layers or self._steps_to_return > 0:
            return
        self._steps_to_return = COOLDOWN_STEPS
        frames = self.frames
        live, unused = self.requests.used_pages, self.requests.unused_pages
        mirrored = np.arange(self.first_mirrored, self.resident)
        idle = int((frames.frame_table[np.ix_(mirrored, unused)] >= 0).sum())
        room = frames.num_free - len(live) - RESERVE_SHARE * frames.num_frames
        slowly = len(live) > self.return_pages
        if not slowly:
            # A slow return keeps the layer's hot buffers until it ends.
            room += int(self.capacity.sum())
        if room + idle < 0:
            return
        if room < 0:
            frames.drop_pages(mirrored, unused, changes)
        if not slowly:
            frames.drop_lanes(self._first_offloaded(), np.flatnonzero(self.capacity), changes)
        frames.give_pages(np.full(len(live), self.resident), live, changes)
        self._stale = np.zeros(self.num_pages, bool)
        self._stale[live] = True
        self._written = 0
        if not slowly:
            self._end_return(live, changes)

    def _continue_return(self, stale: np.ndarray, fresh: np.ndarray, changes: Changes) -> None:
        """One step of a layer's way back.

        Args:
            stale: ``[T]`` bool, ``self._stale``.
            fresh: pages that the step writes.
        """
        stale[fresh] = True
        is_rest = stale & (self.requests.references > 0)
        missing = np.flatnonzero(is_rest)
        is_rest[fresh] = False
        rest = np.flatnonzero(is_rest)
        # Counting what the last step wrote makes the rest shrink however much each step writes.
        share = self.return_pages + self._written
        self._written = len(missing) - len(rest)
        if len(rest) <= share:
            self.frames.drop_lanes(self._first_offloaded(), np.flatnonzero(self.capacity), changes)
            # Pages without a request may be incomplete here; the host pool has all of them.
            unused = self.requests.unused_pages
            self.frames.drop_pages(self._first_offloaded(), unused, changes)
            self._end_return(missing, changes)
            return
        # A step that writes nothing runs no layer beside which to copy.
        if len(fresh):
            stale[rest[:share]] = False
            changes.returning = self.resident, rest[:share]

    def _end_return(self, missing: np.ndarray, changes: Changes) -> None:
        if len(missing):
            changes.loads.append((self.resident, missing))
        self._stale = None
        self.resident += 1
        self._steps_to_return = RETURN_EVERY

    def _give_frames(self, pages: np.ndarray, hits: np.ndarray, changes: Changes) -> None:
        """Give ``pages`` frames where they have none; load those that are prefix ``hits``."""
        layers, columns = np.nonzero(self.frames.frame_table[: self.framed, pages] < 0)
        if not len(layers):
            return
        missing = pages[columns]
        self.frames.give_pages(layers, missing, changes)
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
        layers = self._offloaded()
        for lane, slots in wanted.items():
            self.frames.give_slots(layers, lane, int(self.capacity[lane]), slots, changes)
            self.capacity[lane] = changes.capacities[lane] = slots
