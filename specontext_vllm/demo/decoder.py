"""Greedy decoding of the demo model with page selection, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specontext_vllm.demo.model import Model
from specontext_vllm.distillation.draft import DraftModel


class Decoder:
    """Greedy decoding with page selection in plain torch, as the engine does it: one selection a
    step for all layers.
    """

    page = 16

    def __init__(self, model: Model, draft: DraftModel | None) -> None:
        self.model, self.draft = model, draft
        self.device = model.norm.device

    @torch.no_grad()
    def prefill(self, prompt: list[int]) -> dict:
        """State after the prompt, from which any number of decodes may start."""
        x = torch.tensor([prompt], device=self.device)
        positions = torch.arange(x.shape[1], device=self.device)
        h, keys, values, aux = self.model.embed_tokens(x), [], [], []
        for i, block in enumerate(self.model.layers):
            if i in self.model.size.aux_layers:
                aux.append(h)
            q, k, v = block.qkv(h, positions)
            keys.append(k)
            values.append(v)
            h = block.rest(
                h, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            )
        aux = torch.cat(aux, -1)
        head_keys = None
        if self.draft is not None:
            embeds = self.model.embed_tokens(x[:, 1:])
            _, _, head_keys, _ = self.draft.queries_keys(embeds, aux[:, :-1], positions[1:])
            head_keys = F.pad(head_keys, (0, 0, 1, 0))
        return {
            "keys": keys,
            "values": values,
            "aux": aux[:, -1:],
            "head": head_keys,
            "next": self.model.head(h[:, -1:]).argmax(-1),
            "length": len(prompt),
        }

    @torch.no_grad()
    def decode(
        self,
        state: dict,
        method: str,
        budget: int,
        limit: int,
        stop: int,
        generator: torch.Generator,
    ) -> list[int]:
        """Up to ``limit`` tokens.

        Args:
            state: of ``prefill``; not changed.
            method: dense, dlm, common (the pages with the largest weight that any layer and query
                head gives them when this step is computed densely first: no head that chooses for
                    all layers at once is likely to do better), recent or random.
            budget: tokens.
        """
        keys, values, aux, head = (
            list(state["keys"]),
            list(state["values"]),
            state["aux"],
            state["head"],
        )
        token, length, out = state["next"], state["length"], []
        while len(out) < limit:
            out.append(int(token))
            if out[-1] == stop:
                break
            position = torch.tensor([length], device=self.device)
            length += 1
            embed = self.model.embed_tokens(token)
            weight = kept = None
            if self.draft is not None:
                _, q, k, _ = self.draft.queries_keys(embed, aux, position)
                head = torch.cat([head, k], 2)
            if method != "dense" and -(-length // self.page) > budget // self.page:
                if method == "dlm":
                    weight = self.weights(q, head, unread=1).amax(2)
                elif method == "common":
                    _, _, looked = self.step(embed, position, list(keys), list(values), None)
                    weight = torch.stack([w.amax(2) for w in looked]).amax(0)
                kept = self.select(method, budget, weight, length, generator)
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
        """One token through all layers, which read the ``kept [1, nkv, T]`` tokens: its last state,
        its auxiliary states, and each layer's weights.

        ``keys`` and ``values`` are replaced, layer by layer, by those with the new token.
        """
        aux, weights = [], []
        for i, block in enumerate(self.model.layers):
            if i in self.model.size.aux_layers:
                aux.append(h)
            q, k, v = block.qkv(h, position)
            keys[i], values[i] = torch.cat([keys[i], k], 2), torch.cat([values[i], v], 2)
            weights.append(self.weights(q, keys[i], kept=kept))
            mixed = torch.einsum("bkgt,bktd->bkgd", weights[-1], values[i].float()).flatten(1, 2)[
                :, :, None
            ]
            h = block.rest(h, mixed.to(h.dtype))
        return h, torch.cat(aux, -1), weights

    def weights(
        self, q: Tensor, keys: Tensor, kept: Tensor | None = None, unread: int = 0
    ) -> Tensor:
        """Softmax ``[1, nkv, G, T]`` of one query over the keys, less the first ``unread`` ones and
        those that are not kept.
        """
        grouped = q.unflatten(1, (keys.shape[1], -1))[..., 0, :].float()
        logits = torch.einsum("bkgd,bktd->bkgt", grouped, keys.float()) * q.shape[-1] ** -0.5
        if kept is not None:
            logits = logits.masked_fill(~kept[:, :, None], float("-inf"))
        logits[..., :unread] = float("-inf")
        return logits.softmax(-1)

    def select(
        self,
        method: str,
        budget: int,
        weight: Tensor | None,
        length: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Kept tokens ``[1, nkv, length]``: page 0, the five newest pages, and the best of the
        rest, by ``weight [1, nkv, length]`` if there is one.
        """
        nkv, count = self.model.size.kv_heads, -(-length // self.page)
        if weight is not None:
            pages = (
                F.pad(weight, (0, count * self.page - length))
                .unflatten(-1, (count, self.page))
                .amax(-1)
            )
        elif method == "recent":
            pages = torch.arange(count, device=self.device).float().expand(1, nkv, count).clone()
        else:
            pages = torch.rand(1, nkv, count, device=self.device, generator=generator)
        pages[..., 0] = pages[..., -5:] = float("inf")
        chosen = torch.zeros_like(pages, dtype=torch.bool).scatter_(
            2, pages.topk(budget // self.page, -1).indices, True
        )
        return chosen.repeat_interleave(self.page, -1)[..., :length]
