"""Greedy decoding of the demo model with page selection, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.demo.model import Model
from specontext_vllm.distillation.draft import DraftModel
from specontext_vllm.retrieval.reference import (
    Budget,
    chosen_pages,
    grouped_logits,
    page_scores,
    reduce_to_pages,
)


@dataclass(frozen=True)
class Prefilled:
    """The state after a prompt of T tokens, from which any number of decodes may start.

    Attributes:
        keys, values: ``[1, nkv, T, D]`` of each layer.
        aux: ``[1, 1, 3H]`` of the last token.
        head_keys: ``[1, nkv, T, D]`` of the retrieval head (token 0 has none: zeros), if there is
            one.
        token: the first token of the answer, ``[1, 1]``.
    """

    keys: list[Tensor]
    values: list[Tensor]
    aux: Tensor
    head_keys: Tensor | None
    token: Tensor


class Decoder:
    """Greedy decoding with page selection in plain torch, as the engine does it: one selection a
    step for all layers.
    """

    def __init__(self, model: Model, draft: DraftModel | None) -> None:
        self.model, self.draft = model, draft
        self.device = model.norm.device

    @torch.no_grad()
    def prefill(self, prompt: list[int]) -> Prefilled:
        """Attend to the whole prompt densely."""
        ids = torch.tensor([prompt], device=self.device)
        layers = self.model.watch(ids)
        head_keys = None
        if self.draft is not None:
            embeds = self.model.embed_tokens(ids[:, 1:])
            positions = torch.arange(1, ids.shape[1], device=self.device)
            _, _, head_keys, _ = self.draft.queries_keys(embeds, layers.aux[:, :-1], positions)
            head_keys = F.pad(head_keys, (0, 0, 1, 0))
        return Prefilled(
            layers.keys,
            layers.values,
            layers.aux[:, -1:],
            head_keys,
            self.model.head(layers.output[:, -1:]).argmax(-1),
        )

    @torch.no_grad()
    def decode(
        self,
        prompt: Prefilled,
        method: str,
        budget: int,
        limit: int,
        stop: int,
        generator: torch.Generator,
    ) -> list[int]:
        """Up to ``limit`` tokens, ending with ``stop``.

        Args:
            prompt: not changed.
            method: dense, dlm, recent, random, or common: the pages with the largest weight that
                any layer and query head gives them when this step is first computed densely. No
                head that chooses for all layers at once is likely to do better.
            budget: tokens.
        """
        keys, values = list(prompt.keys), list(prompt.values)
        aux, head_keys, token = prompt.aux, prompt.head_keys, prompt.token
        length = keys[0].shape[2]
        out: list[int] = []
        while len(out) < limit:
            out.append(int(token))
            if out[-1] == stop:
                break
            position = torch.tensor([length], device=self.device)
            length += 1
            embed = self.model.embed_tokens(token)
            kept = None
            if self.draft is not None and head_keys is not None:
                _, q, k, _ = self.draft.queries_keys(embed, aux, position)
                head_keys = torch.cat([head_keys, k], 2)
            if method != "dense" and -(-length // PAGE_SIZE) > budget // PAGE_SIZE:
                if method == "dlm":
                    if head_keys is None:
                        raise ValueError('method "dlm" needs a retrieval head.')
                    looked_at = [self.logits(q, head_keys, unread=1)]
                elif method == "common":
                    _, _, looked_at = self.step(embed, position, list(keys), list(values), None)
                else:
                    looked_at = []
                kept = self.select(method, budget, looked_at, length, generator)
            h, aux, _ = self.step(embed, position, keys, values, kept)
            token = self.model.head(h).argmax(-1)
        return out

    def step(
        self,
        h: Tensor,
        position: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        kept: Tensor | None,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """One token through all layers: its last state, its auxiliary states, and the logits of the
        layers of full attention, which read the ``kept [1, nkv, T]`` tokens (None: all).

        ``keys`` and ``values`` are replaced, layer by layer, by those with the new token.
        """
        aux, logits = [], []
        for i, block in enumerate(self.model.blocks):
            if i in self.model.size.aux_layers:
                aux.append(h)
            q, k, v = block.qkv(h, position)
            keys[i], values[i] = torch.cat([keys[i], k], 2), torch.cat([values[i], v], 2)
            if block.window:
                looked_at = self.logits(q, keys[i], unread=max(0, keys[i].shape[2] - block.window))
            else:
                looked_at = self.logits(q, keys[i], kept=kept)
            logits.append(looked_at)
            attended = torch.einsum("bkgt,bktd->bkgd", looked_at.softmax(-1), values[i].float())
            h = block.rest(h, attended.flatten(1, 2)[:, :, None].to(h.dtype))
        return h, torch.cat(aux, -1), self.model.full(logits)

    def logits(
        self, q: Tensor, keys: Tensor, kept: Tensor | None = None, unread: int = 0
    ) -> Tensor:
        """Logits ``[1, nkv, G, T]`` of one query over the keys: -inf for the first ``unread`` ones
        and those that are not kept.
        """
        logits = grouped_logits(q, keys)[:, :, 0]
        if kept is not None:
            logits = logits.masked_fill(~kept[:, :, None], float("-inf"))
        logits[..., :unread] = float("-inf")
        return logits

    def select(
        self,
        method: str,
        budget: int,
        looked_at: list[Tensor],
        length: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Kept tokens ``[1, nkv, length]``: those of page 0, of the five newest pages, and of the
        best of the rest, by the largest score under any of the logits ``[1, nkv, G, length]``.
        """
        nkv, count = self.model.size.kv_heads, -(-length // PAGE_SIZE)
        if looked_at:
            by_layer = [page_scores(*reduce_to_pages(x, PAGE_SIZE))[0] for x in looked_at]
            scores = torch.stack(by_layer).amax(0)
        elif method == "recent":
            scores = torch.arange(count, device=self.device).float().expand(1, nkv, count)
        else:
            scores = torch.rand(1, nkv, count, device=self.device, generator=generator)
        chosen = chosen_pages(scores, count, Budget(budget // PAGE_SIZE, sinks=1, recents=5))
        return chosen.repeat_interleave(PAGE_SIZE, -1)[..., :length]
