"""Which frame of the arena holds which page, as the host knows it. Pure NumPy; moves no data."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

NO_FRAME = -1


@dataclass
class Changes:
    """What one step changed, in the order in which the device must follow.

    Attributes:
        given_up: frames that hold nothing any more.
        frames: ``(layers, pages, frames)`` arrays of changed entries of the frame table.
        hot: ``(layers, lanes, slots, frames)`` arrays of changed entries of the hot table.
        capacities: lane -> usable slots per KV head, where it changed.
        trimmed: whether a running lane lost slots.
        lanes: lanes whose slot maps start afresh.
        offloaded: layers whose hot buffers must be filled from the host pool.
        loads: ``(layer, pages)`` to copy from the host pool into their frames before the step reads
            them.
        returning: ``(layer, pages)`` of a layer that is on its way back, to be copied while the
            step computes; None for none.
    """

    given_up: list[np.ndarray] = field(default_factory=list)
    frames: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    hot: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    capacities: dict[int, int] = field(default_factory=dict)
    trimmed: bool = False
    lanes: list[int] = field(default_factory=list)
    offloaded: list[int] = field(default_factory=list)
    loads: list[tuple[int, np.ndarray]] = field(default_factory=list)
    returning: tuple[int, np.ndarray] | None = None


class FrameTables:
    """The frames of an arena, handed out to pages of layers and to slots of hot buffers.

    Every method that hands out or takes back frames notes it in ``changes``.

    Args:
        frames: ids of the frames to hand out.
        num_layers: L.
        num_pages: T, logical pages.
        num_lanes, hot_pages: lanes, and the largest number of slots S of a lane in one layer.

    Attributes:
        frame_table: ``[L, T]`` int32 frame of a page, or ``NO_FRAME``.
        hot_table: ``[L, lanes, S]`` int32 frame of a slot, or ``NO_FRAME``.
        num_free: frames that nothing holds.
    """

    def __init__(
        self, frames: np.ndarray, *, num_layers: int, num_pages: int, num_lanes: int, hot_pages: int
    ) -> None:
        self.num_frames = self.num_free = len(frames)
        self.frame_table = np.full((num_layers, num_pages), NO_FRAME, np.int32)
        self.hot_table = np.full((num_layers, num_lanes, hot_pages), NO_FRAME, np.int32)
        self._free = np.array(frames[::-1], np.int32)

    @property
    def free(self) -> np.ndarray:
        """Ids of the frames that nothing holds."""
        return self._free[: self.num_free]

    def give_pages(self, layers: np.ndarray, pages: np.ndarray, changes: Changes) -> None:
        """Give each ``(layer, page)`` pair a frame."""
        frames = self._take(len(pages))
        self.frame_table[layers, pages] = frames
        changes.frames.append((layers, pages, frames))

    def drop_pages(self, layers: np.ndarray, pages: np.ndarray, changes: Changes) -> None:
        """Take back the frames that the given pages have in the given layers."""
        rows, columns = np.nonzero(self.frame_table[np.ix_(layers, pages)] >= 0)
        self._give_back(self.frame_table[layers[rows], pages[columns]], changes)
        self.frame_table[layers[rows], pages[columns]] = NO_FRAME

    def give_slots(
        self, layers: np.ndarray, lane: int, first: int, stop: int, changes: Changes
    ) -> None:
        """Give the slots ``[first, stop)`` of a lane a frame in each of the layers."""
        count = stop - first
        if not len(layers) or not count:
            return
        frames = self._take(len(layers) * count)
        self.hot_table[layers, lane, first:stop] = frames.reshape(len(layers), count)
        slots = np.tile(np.arange(first, stop), len(layers))
        changes.hot.append((np.repeat(layers, count), np.full(len(slots), lane), slots, frames))

    def drop_lanes(self, layers: np.ndarray, lanes: np.ndarray, changes: Changes) -> None:
        """Take back all frames of the lanes' slots in the given layers."""
        where = np.ix_(layers, lanes)
        held = self.hot_table[where]
        self._give_back(held[held >= 0], changes)
        self.hot_table[where] = NO_FRAME

    def drop_slots(
        self, layers: np.ndarray, lane: int, first: int, stop: int, changes: Changes
    ) -> None:
        """Take back the frames of the slots ``[first, stop)`` of a lane in the given layers."""
        held = self.hot_table[layers, lane, first:stop]
        self._give_back(held[held >= 0], changes)
        self.hot_table[layers, lane, first:stop] = NO_FRAME

    def audit(self) -> int:
        """Count the frames anew; the number of those in tables.

        Raises:
            RuntimeError: a frame is owned twice or lost.
        """
        owned = np.concatenate(
            [self.frame_table[self.frame_table >= 0], self.hot_table[self.hot_table >= 0]]
        )
        everything = np.concatenate([owned, self.free])
        if len(everything) != self.num_frames or len(np.unique(everything)) != self.num_frames:
            raise RuntimeError(
                f"specontext: of {self.num_frames} frames {len(owned)} are in tables and "
                f"{self.num_free} free, {len(np.unique(everything))} "
                f"different ones in all; please report it."
            )
        return len(owned)

    def _take(self, count: int) -> np.ndarray:
        if count > self.num_free:
            raise RuntimeError(
                f"specontext: {count} frames asked for, {self.num_free} free; please report it."
            )
        self.num_free -= count
        return self._free[self.num_free : self.num_free + count].copy()

    def _give_back(self, frames: np.ndarray, changes: Changes) -> None:
        if len(frames):
            self._free[self.num_free : self.num_free + len(frames)] = frames
            self.num_free += len(frames)
            changes.given_up.append(frames.copy())
