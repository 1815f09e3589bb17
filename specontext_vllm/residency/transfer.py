"""Copies between the host and the GPU: what they copy, on whichever stream is current."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.float8 import KVScales, as_bytes, to_float8
from specontext_vllm.step_data import Misses, RowQueries
from specontext_vllm.tier_data import KVPools, LayerMemory


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on ``device``; the host does not wait for the copy."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def fetch(
    pools: KVPools,
    misses: Misses,
    places: Tensor,
    resident: Tensor,
    *,
    layers: range,
    done: Tensor | None = None,
) -> None:
    """Copy the same head pages of consecutive layers from the host pool into frames; skip resident
    layers.

    Args:
        misses: the head pages; ``targets`` are ``place * H + head``.
        places: ``[len(layers), K]`` int32 frame of each place in each layer.
        resident: ``[1]`` int32 number of resident layers, read on the device.
        layers: mirrored layers.
        done: ``[L]`` int32 as in ``CopyProgress``; a CPU leaves it alone.
    """
    arena, host = as_bytes(pools.arena), as_bytes(pools.host)
    heads = arena.shape[1]
    if arena.is_cuda:
        from specontext_vllm.triton_kernels.fetch_pages import fetch_pages

        words = arena[0, 0].nbytes // 4
        layer_sources = host.shape[1] * heads
        fetch_pages(
            host.view(torch.int32).view(-1, words),
            arena.view(torch.int32).view(-1, words),
            misses,
            places,
            resident,
            layers=layers,
            first_source=(layers.start - pools.first_mirrored) * layer_sources,
            layer_sources=layer_sources,
            num_kv_heads=heads,
            done=done,
        )
        return
    count = int(misses.count)
    source, target = misses.sources[:count].long(), misses.targets[:count].long()
    head_pages = arena.view(-1, *arena.shape[2:])
    for layer, frames in zip(layers, places, strict=True):
        if layer >= int(resident):
            copied = host[layer - pools.first_mirrored].view(-1, *arena.shape[2:])[source]
            head_pages[frames[target // heads].long() * heads + target % heads] = copied


def write(
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    memory: LayerMemory,
    *,
    decode_tokens: int,
    queries: RowQueries | None = None,
    scales: KVScales | None = None,
) -> None:
    """Write one layer's new tokens into their frames and into its mirror.

    Args:
        key, value: ``[>= N, H, D]``.
        slots: ``[N]`` int64 logical slots, ``page * P + offset``; negative ones are padding.
        decode_tokens: leading tokens that belong to decode rows.
        queries: which of these are whose; None: one a row.
        scales: of memory in 8-bit floats; None: it has the dtype of ``key``.
    """
    arena, mirror = memory.arena, memory.mirror
    if arena.is_cuda:
        from specontext_vllm.triton_kernels.write_tiered import write_tiered

        write_tiered(
            key,
            value,
            slots,
            memory,
            decode_tokens=decode_tokens,
            queries=queries,
            scales=scales,
        )
        return
    real = torch.nonzero(slots >= 0).flatten()
    new = key[real], value[real]
    if scales is not None:
        new = to_float8(new[0], scales.key), to_float8(new[1], scales.value)
    kv = as_bytes(torch.cat(new, dim=-1).to(arena.dtype))
    arena, mirror = as_bytes(arena), None if mirror is None else as_bytes(mirror)
    page, offset = slots[real] // PAGE_SIZE, slots[real] % PAGE_SIZE
    if mirror is not None:
        mirror[page, :, offset] = kv
    heads = arena.shape[1]
    decode = real < decode_tokens
    head_pages = arena.view(-1, *arena.shape[2:])
    rows, from_end = real[decode], torch.ones(1, dtype=torch.int64)
    if queries is not None:
        # Of a row's tokens, whose places are the last of its list, each finds its own.
        ends = queries.starts[1:].long()
        tokens, rows = rows, torch.searchsorted(ends, rows, right=True)
        from_end = ends[rows] - tokens
    sequences = rows[:, None] * heads + torch.arange(heads)
    places = memory.table.lengths[sequences].long() - from_end[:, None]
    pages = memory.table.pages[sequences, places // PAGE_SIZE].long()
    head_pages[pages, places % PAGE_SIZE] = kv[decode]
    if memory.layer < int(memory.resident):
        arena[memory.frames[page[~decode]].long(), :, offset[~decode]] = kv[~decode]
