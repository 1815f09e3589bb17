"""The running requests as the ledger counts them: which pages each one holds, and its lane."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class RunningRequests:
    """Pages and lanes of the requests in flight.

    Args:
        num_pages: T, logical pages.
        max_requests: number of lanes.

    Attributes:
        references: ``[T]`` int32 running requests that hold a page.
        lanes: request name -> lane.
        pages: request name -> logical pages, in order.
    """

    def __init__(self, num_pages: int, max_requests: int) -> None:
        self.references = np.zeros(num_pages, np.int32)
        self.lanes: dict[str, int] = {}
        self.pages: dict[str, list[int]] = {}
        self._max_requests = max_requests
        self._free_lanes = list(range(max_requests))[::-1]

    def __contains__(self, name: str) -> bool:
        return name in self.lanes

    def hold(self, pages: Sequence[int]) -> None:
        """Count one more request for each of the pages."""
        np.add.at(self.references, pages, 1)

    def start(self, name: str, pages: Sequence[int]) -> int:
        """Give a request a lane; its pages are counted by ``hold`` already."""
        lane = self._free_lanes.pop()
        self.lanes[name], self.pages[name] = lane, list(pages)
        return lane

    def grow(self, name: str, pages: Sequence[int]) -> None:
        """Give a running request further pages."""
        self.pages[name] += pages
        self.hold(pages)

    def release(self, name: str) -> tuple[int, np.ndarray]:
        """Let a request go; the lane and the pages that it had."""
        lane, pages = self.lanes.pop(name), np.array(self.pages.pop(name), np.int64)
        np.subtract.at(self.references, pages, 1)
        self._free_lanes.append(lane)
        return lane, pages

    @property
    def used_pages(self) -> np.ndarray:
        """Pages that a running request holds, in ascending order."""
        return np.flatnonzero(self.references)

    @property
    def unused_pages(self) -> np.ndarray:
        """Pages that no running request holds, in ascending order."""
        return np.flatnonzero(self.references == 0)

    def audit(self) -> int:
        """Count pages and lanes anew; the number of pages that requests hold.

        Raises:
            RuntimeError: a page or a lane is counted wrongly.
        """
        held = np.bincount(
            np.array([page for pages in self.pages.values() for page in pages], np.int64),
            minlength=len(self.references),
        )
        lanes = len(self.lanes) + len(self._free_lanes)
        if (held != self.references).any() or lanes != self._max_requests:
            raise RuntimeError(
                f"specontext: {len(self.lanes)} requests hold {held.sum()} pages, "
                f"{self.references.sum()} are counted, and "
                f"{len(self._free_lanes)} of {self._max_requests} lanes are free; please report it."
            )
        return int((held > 0).sum())
