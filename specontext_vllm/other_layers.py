"""What the layers of a model that do not attend to the whole context keep of a request: KV of a
window, or a state. As its config says; without vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from specontext_vllm.config import PAGE_SIZE, ConfigError, pages_for
from specontext_vllm.model_config import (
    WINDOWED_KINDS,
    has_state,
    kv_heads,
    layer_kinds,
    num_kv_layers,
    num_layers_with_kv,
)
from specontext_vllm.residency.memory_model import OTHERS_KEPT


@dataclass(frozen=True)
class States:
    """States of layers that keep one instead of KV, and the blocks that vLLM puts them in.

    vLLM makes a block of attention as long as it takes to hold a state, and all groups of layers
    equally large: where a model has three linear layers to one of full attention, they are three
    groups as large as the one.

    Attributes:
        layers: those that keep a state.
        state_bytes: of one layer and request.
        kept: blocks that a request has of each group: its state; with a prefix cache also that of
            the block before and, of Mamba 2, one at the end of the prompt.
        block_tokens: tokens of KV in a block of a layer of full attention.
        group_layers: layers in a block.
        groups: groups of these layers.
        block_bytes: of a block, in which the states are padded.
    """

    layers: int
    state_bytes: int
    kept: int
    block_tokens: int
    group_layers: int
    groups: int
    block_bytes: int

    @property
    def request_blocks(self) -> int:
        """Blocks of a request."""
        return self.groups * self.kept

    def apart_bytes(self, requests: int) -> int:
        """Bytes of the pool that states have beside two tiers (engine/other_blocks.py)."""
        layer_bytes = self.block_bytes // self.group_layers
        blocks = 1 + self.request_blocks * (1 + OTHERS_KEPT * requests)
        return blocks * layer_bytes * -(-self.layers // self.groups)


@dataclass(frozen=True)
class OtherLayers:
    """The layers of a model that do not attend to the whole context.

    Attributes:
        count: all of them, those that keep nothing included.
        windowed: those that keep the KV of a window.
        window: its tokens.
        page_bytes: one page of one of these.
        readers: those that read the KV of one of these instead.
        states: of those that keep one, which may attend to the whole context as well; None: there
            are none, or none of a known size.
        unknown: layers that keep a state of unknown size.
    """

    count: int = 0
    windowed: int = 0
    window: int = 0
    page_bytes: int = 0
    readers: int = 0
    states: States | None = None
    unknown: int = 0

    def kv_bytes(self, length: int) -> int:
        """KV of the windows, of a request with a context of ``length`` tokens."""
        return self.windowed * self._window_bytes(length)

    def read_bytes(self, length: int) -> int:
        """What a step reads of it."""
        return (self.windowed + self.readers) * self._window_bytes(length)

    def _window_bytes(self, length: int) -> int:
        # A window begins anywhere in a page.
        return min(pages_for(length), pages_for(self.window) + 1) * self.page_bytes

    @property
    def state_bytes(self) -> int:
        """All states of a request."""
        return 0 if self.states is None else self.states.layers * self.states.state_bytes

    def held_bytes(self, length: int, block_extra: int = 0) -> int:
        """GPU memory that they take of a request with a context of ``length`` tokens.

        Args:
            block_extra: what the retriever keeps of a block, in which another request may have KV.
        """
        held = self.kv_bytes(length)
        if self.states is not None:
            held += self.states.request_blocks * (self.states.block_bytes + block_extra)
        return held

    def apart_bytes(self, length: int, requests: int) -> int:
        """The same of so many requests beside two tiers, where they share no blocks with ours."""
        windows = OTHERS_KEPT * requests * self.kv_bytes(length)
        return windows + (0 if self.states is None else self.states.apart_bytes(requests))

    def step_bytes(self, length: int) -> int:
        """What a decode step reads and writes of them: windows once, states to and fro."""
        return self.read_bytes(length) + 2 * self.state_bytes


def other_layers(
    text: Any, full: int, dtype: torch.dtype, itemsize: int, prefix_caching: bool = True
) -> OtherLayers:
    """The layers of a text model that do not attend to the whole context.

    Args:
        full: its layers of full attention.
        dtype: the model's.
        itemsize: bytes of one element of KV.
        prefix_caching: vLLM's --enable-prefix-caching.
    """
    kinds = layer_kinds(text)
    places = [place for place, kind in enumerate(kinds) if kind in WINDOWED_KINDS]
    window = (
        getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None) or 0
    )
    windowed, page_bytes, readers = 0, 0, 0
    if places and window and full < text.num_hidden_layers:
        heads, width = kv_heads(text, places[0])
        windowed = sum(place < num_layers_with_kv(text) for place in places)
        readers, page_bytes = len(places) - windowed, heads * PAGE_SIZE * 2 * width * itemsize
    with_states = sum(has_state(kind) for kind in kinds)
    size = state_bytes(text, dtype) if with_states else None
    states = None
    if size:
        heads, width = kv_heads(text, 0)
        cached = 2 if _is_mamba2(text) else 1
        states = _in_blocks(
            with_states,
            size,
            1 + cached * prefix_caching,
            num_kv_layers(text),
            windowed,
            heads * 2 * width * itemsize,
        )
    return OtherLayers(
        text.num_hidden_layers - full,
        windowed,
        window if page_bytes else 0,
        page_bytes,
        readers,
        states,
        0 if states else with_states,
    )


def _in_blocks(
    layers: int, size: int, kept: int, full: int, windowed: int, token_bytes: int
) -> States:
    """vLLM's blocks: vllm/platforms/interface.py, _align_hybrid_block_size, and
    vllm/v1/core/kv_cache_utils.py, _get_kv_cache_groups_uniform_page_size.

    Args:
        full, windowed: layers of these kinds.
        token_bytes: KV of a token in one of these.
    """
    tokens = PAGE_SIZE * -(-size // (PAGE_SIZE * token_bytes))
    counts = [count for count in (layers, full, windowed) if count]
    group = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    return States(
        layers, size, kept, tokens, group, -(-layers // group), group * tokens * token_bytes
    )


def _is_mamba2(text: Any) -> bool:
    return any(hasattr(text, name) for name in ("mamba_num_heads", "mamba_n_heads"))


def dtype_of(text: Any) -> torch.dtype:
    """A text model's; where its config names none, bfloat16."""
    return text.dtype if isinstance(text.dtype, torch.dtype) else torch.bfloat16


def state_bytes(text: Any, dtype: torch.dtype) -> int | None:
    """Bytes of a request's state in one layer of this text model, as vLLM keeps it on one worker
    (vllm/model_executor/layers/mamba/mamba_utils.py): the last inputs of a short convolution, and
    what is recurrent. None: of a family that is not known here.

    Args:
        dtype: the model's, in which states are kept unless the config has one for them.
    """

    def value(*names: str) -> int:
        return next(found for name in names if (found := getattr(text, name, None)) is not None)

    recurrent, own = 0, dtype
    if hasattr(text, "linear_num_value_heads"):  # gated delta net: Qwen3-Next, OLMo Hybrid
        keys = text.linear_num_key_heads * text.linear_key_head_dim
        values = text.linear_num_value_heads * text.linear_value_head_dim
        convolved = (2 * keys + values) * (text.linear_conv_kernel_dim - 1)
        recurrent = values * text.linear_key_head_dim
        own = getattr(torch, getattr(text, "mamba_ssm_dtype", None) or "", dtype)
    elif _is_mamba2(text):  # Nemotron-H; Granite 4, Falcon H1
        heads = value("mamba_num_heads", "mamba_n_heads")
        width = value("mamba_head_dim", "mamba_d_head")
        state, groups = (
            value("ssm_state_size", "mamba_d_state"),
            value("n_groups", "mamba_n_groups"),
        )
        convolved = (heads * width + 2 * groups * state) * (
            value("conv_kernel", "mamba_d_conv") - 1
        )
        recurrent = heads * width * state
        if hasattr(text, "mamba_num_heads"):
            own = getattr(torch, getattr(text, "mamba_ssm_cache_dtype", None) or "float32")
    elif hasattr(text, "mamba_dt_rank"):  # Mamba 1: Jamba
        inner = text.mamba_expand * text.hidden_size
        convolved, recurrent = inner * (text.mamba_d_conv - 1), inner * text.mamba_d_state
    elif hasattr(text, "conv_L_cache"):  # a short convolution alone: LFM2
        convolved = value("conv_dim", "hidden_size") * (text.conv_L_cache - 1)
    else:
        return None
    return convolved * dtype.itemsize + recurrent * own.itemsize


def refuse_beside_others(
    others: OtherLayers, host_bytes: int, *, drafts: bool, lossless: bool
) -> None:
    """Raise a ConfigError for what an engine refuses beside windows or states, or what cannot be
    planned without the size of these.

    Args:
        host_bytes: of the host pool. drafts: of another model. lossless: `mode` is.
    """
    host = f"--host-gib: found {host_bytes / 2**30:g}"
    keep = f"{others.states.layers if others.states else others.unknown} layers of this model keep"
    stateful = others.states is not None or others.unknown
    for found, sentence in (
        (
            host_bytes and others.unknown,
            f"{host}, but {keep} a state, whose size this command does not know; give 0.",
        ),
        (
            host_bytes and others.states and others.windowed,
            f"{host}, but {keep} a state, beside {others.windowed} with windows; give 0.",
        ),
        (
            stateful and drafts,
            f"--drafter: found a folder, but {keep} a state, from which rejected drafts cannot be "
            "taken back; leave it out.",
        ),
        (
            stateful and lossless,
            f"--mode: found lossless, but {keep} a state, from which rejected drafts cannot be "
            "taken back; leave it out.",
        ),
    ):
        if found:
            raise ConfigError(sentence)
