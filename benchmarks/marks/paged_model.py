"""A transformers model of which tokens read chosen pages, many pieces at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.retrieval.reference import grouped_logits, page_scores, reduce_to_pages

ATTENTION = "specontext_paged"
"""Name in transformers of the attention function that reads chosen pages."""

Watch = Callable[[int, Tensor, Tensor], None]
"""Called in each layer with its number, the pages' scores ``[B, H, S, pages]`` (see
``reference.page_scores``) and their mass.
"""


class PagedModel:
    """A frozen model with the KV of ``pieces`` texts of one length.

    Args:
        model: of transformers; its attention is ``ATTENTION`` until ``close``.
        pieces, length: texts, and tokens of each.
        places: layers whose input states are kept in ``states``; the number of layers means the
            last one's output.

    Attributes:
        states: ``[B, S, H]`` by place, of the latest forward pass.

    B texts, S tokens, H KV heads.
    """

    def __init__(self, model: Any, pieces: int, length: int, places: Sequence[int] = ()) -> None:
        register_attention()
        self._before = model.config._attn_implementation
        model.set_attn_implementation(ATTENTION)
        self.model, self.pieces, self.length = model, pieces, length
        self.layers = model.base_model.layers
        self.states: dict[int, Tensor] = {}
        self._keys: list[Tensor | None] = [None] * len(self.layers)
        self._values: list[Tensor | None] = [None] * len(self.layers)
        self._rows, self._start = slice(0, pieces), 0
        self._reads: Sequence[Tensor | None] | None = None
        self._watch: Watch | None = None
        for layer in self.layers:
            layer.self_attn.reader = self._attend
        self._hooks = [self._keep(place) for place in sorted(set(places))]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def kv_heads(self) -> int:
        config = self.model.config
        return getattr(config, "num_key_value_heads", None) or config.num_attention_heads

    @property
    def max_pages(self) -> int:
        """Pages of a text."""
        return pages_for(self.length)

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids)

    def close(self) -> None:
        """Let go of the model, which another may then take."""
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers:
            del layer.self_attn.reader
        self.model.set_attn_implementation(self._before)

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Iterator[Tensor]:
        """Dense attention over prompts ``ids [B, n]``, one after the other; when the KV and
        ``states`` of one are there, yields the logits ``[V]`` behind it.
        """
        for number in range(len(ids)):
            yield self._pass(ids[number : number + 1], slice(number, number + 1), 0)[0, -1]

    @torch.inference_mode()
    def forward(
        self,
        ids: Tensor,
        start: int,
        reads: Sequence[Tensor | None] | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Logits ``[B, S, V]`` of the tokens ``ids [B, S]`` at positions from ``start`` > 0 on.

        Their KV takes the place of what was there.

        Args:
            reads: of each layer the pages that each KV head of each token reads, ``[B, H, S,
                max_pages]`` bool, or None for all; None: all in every layer.
            watch: is shown what each layer looks at among what it reads.
        """
        return self._pass(ids, slice(0, len(ids)), start, reads, watch)

    def _pass(
        self,
        ids: Tensor,
        rows: slice,
        start: int,
        reads: Sequence[Tensor | None] | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        self._rows, self._start, self._reads, self._watch = rows, start, reads, watch
        count = ids.shape[1]
        positions = torch.arange(start, start + count, device=ids.device).expand(len(ids), -1)
        return self.model(
            input_ids=ids,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=1 if start == 0 else count,
        ).logits

    def _attend(
        self, number: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None
    ) -> Tensor:
        count, first = query.shape[2], self._start
        end = first + count
        for kept, new in ((self._keys, key), (self._values, value)):
            if kept[number] is None:
                size = (self.pieces, new.shape[1], self.length, new.shape[3])
                kept[number] = new.new_empty(size)
            kept[number][self._rows, :, first:end] = new  # type: ignore[index]
        if first == 0:
            # In float32, torch has a kernel that keeps no matrix of weights only for as many key
            # heads as query heads.
            group = query.shape[1] // key.shape[1]
            key, value = (part.repeat_interleave(group, 1) for part in (key, value))
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale
            ).transpose(1, 2)
        keys, values = (
            kept[number][self._rows, :, :end]  # type: ignore[index]
            for kept in (self._keys, self._values)
        )
        logits = grouped_logits(query, keys, scale=scale)  # [B, H, S, G, T]
        token = torch.arange(end, device=query.device)
        unseen = token > torch.arange(first, end, device=query.device)[:, None]
        reads = None if self._reads is None else self._reads[number]
        if reads is not None:
            unread = ~reads.repeat_interleave(PAGE_SIZE, -1)[..., :end]
            unseen = unseen | unread
        logits.masked_fill_(unseen[..., None, :], float("-inf"))
        if self._watch is not None:
            shown = page_scores(*reduce_to_pages(logits, PAGE_SIZE))
            missing = self.max_pages - shown[0].shape[-1]
            scores = F.pad(shown[0], (0, missing), value=float("-inf"))
            self._watch(number, scores, F.pad(shown[1], (0, missing)))
        weighted = torch.einsum("bhsgt,bhtd->bshgd", logits.softmax(-1), values.float())
        return weighted.flatten(2, 3).to(query.dtype)

    def _keep(self, place: int) -> Any:
        module = self.layers[place] if place < len(self.layers) else self.model.base_model.norm

        def keep(_: Any, arguments: tuple, named: dict) -> None:
            self.states[place] = arguments[0] if arguments else named["hidden_states"]

        return module.register_forward_pre_hook(keep, with_kwargs=True)


def register_attention() -> None:
    """Register ``ATTENTION`` with transformers: the module's ``reader`` attends."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        return module.reader(module.layer_idx, query, key, value, scaling), None

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)


def token_log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability ``[B, S]`` float32 of the tokens ``ids [B, S]`` under ``logits [B, S, V]``,
    one text at a time, since a vocabulary is wide.
    """
    return torch.stack(
        [
            -F.cross_entropy(row.float(), following, reduction="none")
            for row, following in zip(logits, ids, strict=True)
        ]
    )
