"""The tensors of the two tiers (package ``residency``) that kernels read and write, grouped by what
they describe.

L: layers; T: logical pages; F: frames of the arena; S: slots of a hot buffer; H, P, K as in
``step_data``. A **lane** is the place of a running request in the hot buffers. Every ``[1]`` tensor
is read on the device, so that a captured graph stays valid when its value changes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specontext_vllm.step_data import PageTable


@dataclass(frozen=True)
class DecodeRows:
    """The decode rows of a step, padding included.

    Attributes:
        lanes: ``[>= B]`` int32; -1 for padding rows.
        seq_lens: ``[>= B]`` int32 context lengths up to the row's first new token: the places after
            it are for drafts.
        block_table: ``[>= B, W]`` int32 logical pages.
    """

    lanes: Tensor
    seq_lens: Tensor
    block_table: Tensor


@dataclass(frozen=True)
class HotState:
    """Which pages the hot buffers hold; one state for all offloaded layers, since they read the
    same selection.

    Attributes:
        capacity: ``[lanes]`` int32 usable slots per KV head.
        slot_of: ``[lanes, H, max_pages]`` int32 slot of a page (counted from the request's start),
            or -1.
        page_of: ``[lanes, H, S]`` int32 page in a slot, or -1.
        source_of: ``[lanes, H, S]`` int32 its head page in the host pool.
        stamp: ``[lanes, H, S]`` int64 the step that last read it.
        step: ``[1]`` int64 number of the present step.
        slots: ``[rows * H, K]`` int32 slots of the step's selection, written by ``resolve``.
        order: ``[rows * H, next_power_of_2(S)]`` int32 scratch of ``resolve``.
    """

    capacity: Tensor
    slot_of: Tensor
    page_of: Tensor
    source_of: Tensor
    stamp: Tensor
    step: Tensor
    slots: Tensor
    order: Tensor


@dataclass(frozen=True)
class TierTables:
    """Where each layer's pages lie on the GPU, and the page tables made from that.

    Attributes:
        resident: ``[1]`` int32 number of resident layers, which come first.
        frames: ``[L, T]`` int32 frame of a logical page, valid in resident layers.
        hot_frames: ``[L, lanes, S]`` int32 frame of a slot, valid in offloaded layers.
        pages: ``[L, rows * H, K]`` int32 head pages of the arena, ``frame * H + head``: the page
            table of each layer.
    """

    resident: Tensor
    frames: Tensor
    hot_frames: Tensor
    pages: Tensor


@dataclass(frozen=True)
class KVPools:
    """The KV of both tiers.

    Attributes:
        arena: ``[F, H, P, 2 * D]`` on the GPU; all layers share its frames.
        host: ``[M, T, H, P, 2 * D]`` pinned; mirrors every page of the last M layers.
        first_mirrored: L - M, the first layer that the host pool mirrors.
    """

    arena: Tensor
    host: Tensor
    first_mirrored: int

    def mirror(self, layer: int) -> Tensor | None:
        """``[T, H, P, 2 * D]`` pages of one layer in the host pool, or None without a mirror."""
        return self.host[layer - self.first_mirrored] if layer >= self.first_mirrored else None


@dataclass(frozen=True)
class LayerMemory:
    """Where one layer writes its new keys and values.

    Attributes:
        layer: its index.
        table: its page table. The new tokens of a decode row are the last ones of the row's list.
        frames: ``[T]`` int32 frames of its pages, for prompt tokens while it is resident. While it
            is offloaded they go to the mirror alone.
        resident: ``[1]`` int32 number of resident layers.
        arena: ``[F, H, P, 2 * D]``.
        mirror: ``[T, H, P, 2 * D]`` in the host pool, or None.
    """

    layer: int
    table: PageTable
    frames: Tensor
    resident: Tensor
    arena: Tensor
    mirror: Tensor | None


@dataclass(frozen=True)
class CopyProgress:
    """How far the copies of the misses have come.

    Attributes:
        done: ``[L]`` int32; each program of a fetch adds one to a layer's entry when it has copied
            its share of that layer.
        epoch: ``[1]`` int32 number of fetches so far.
        overdue: ``[1]`` int32 that the host may read at any time: 0, or 1 plus the layer whose
            copies did not come in time.
    """

    done: Tensor
    epoch: Tensor
    overdue: Tensor
