"""The draft model whose query and key projections become the retrieval head, in EAGLE-3's shape."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.distillation.llama import (
    causal_attention,
    gated_mlp,
    linear,
    rms_norm,
    split_heads,
)
from specontext_vllm.distillation.shape import DraftShape
from specontext_vllm.retrieval.checkpoint import (
    HeadError,
    aux_layers_of,
    read_checkpoint,
)
from specontext_vllm.retrieval.checkpoint.tensor_files import list_tensors
from specontext_vllm.retrieval.checkpoint.whole_file import whole_file
from specontext_vllm.retrieval.reference import grouped_logits, page_scores, reduce_to_pages
from specontext_vllm.retrieval.rope import rope_parameters, rope_table, rotate_halves

_NORMS = ("input_layernorm", "hidden_norm", "post_attention_layernorm")

_LAYER = {
    **{f"{n}.weight": n for n in _NORMS},
    **{f"self_attn.{n}.weight": f"{n}.weight" for n in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{f"mlp.{n}.weight": f"{n}.weight" for n in ("gate_proj", "up_proj", "down_proj")},
}

_NAMES = {
    "fc.weight": "fc.weight",
    "norm.weight": "norm",
    "lm_head.weight": "lm_head.weight",
    **{f"midlayer.{k}": v for k, v in _LAYER.items()},
}
"""SafeAILab's names -> ``DraftModel``'s."""


RETRIEVAL = ("fc.weight", "input_layernorm", "hidden_norm", "q_proj.weight", "k_proj.weight")
"""What of a draft model chooses pages; the rest only drafts."""


def head_scores(q: Tensor, k: Tensor, at: Tensor) -> Tensor:
    """Scores of the engine's pages under a head, the pages that are newer than the token included.

    Args:
        q: ``[B, nh, T, D]``, k: ``[B, nkv, T, D]`` of the head, for tokens 1 to T. at: ``[B, S]``
            positions among them.
    Returns:
        ``[B, nkv, S, pages]``, logarithms.
    """
    step = torch.arange(k.shape[2], device=at.device)
    logits = grouped_logits(q, k, at)
    logits.masked_fill_(step > at[:, None, :, None, None], float("-inf"))
    # Index 0 is token 1: with one more in front, pages are the engine's.
    logits = F.pad(logits, (1, 0), value=float("-inf"))
    return page_scores(*reduce_to_pages(logits, PAGE_SIZE))[0]


class DraftModel(nn.Module):
    """One EAGLE-3 decoder layer with its fc and LM head; the embedding is the target's.

    Structure and names as in SafeAILab's EAGLE and vLLM's llama_eagle3.py: q, k, v of
    ``cat[input_layernorm(embed), hidden_norm(fc(aux))]``, residual fc(aux).

    Args:
        shape: its shape.
        draft_ids: ``[draft_vocabulary]`` int64, ascending: the token ids that the LM head drafts;
            None: all.
    """

    draft_ids: Tensor | None
    groups = 1
    """One selection for all layers."""

    def __init__(self, shape: DraftShape, draft_ids: Tensor | None = None) -> None:
        super().__init__()
        self.shape = shape
        hidden, width = shape.hidden, shape.head_dim

        def norm() -> nn.Parameter:
            return nn.Parameter(torch.ones(hidden))

        self.fc = linear(len(shape.aux_layers) * hidden, hidden)
        self.input_layernorm, self.hidden_norm = norm(), norm()
        self.post_attention_layernorm, self.norm = norm(), norm()
        self.q_proj = linear(2 * hidden, shape.heads * width)
        self.k_proj = linear(2 * hidden, shape.kv_heads * width)
        self.v_proj = linear(2 * hidden, shape.kv_heads * width)
        self.o_proj = linear(shape.heads * width, hidden)
        self.gate_proj = linear(hidden, shape.ffn)
        self.up_proj = linear(hidden, shape.ffn)
        self.down_proj = linear(shape.ffn, hidden)
        self.lm_head = linear(hidden, shape.draft_vocabulary)
        self.rope: Tensor
        self.draft_ids: Tensor | None
        self.register_buffer(
            "rope", rope_table(shape.head_spec(), shape.max_position, "cpu"), persistent=False
        )
        self.register_buffer("draft_ids", draft_ids)

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """Target layers whose input states it reads."""
        return self.shape.aux_layers

    def page_scores(self, embeds: Tensor, aux: Tensor, at: Tensor) -> Tensor:
        """Scores of the engine's pages, logarithms ``[B, nkv, S, pages]``; pages that are newer
        than the token are among them.

        Args:
            embeds: ``[B, T, H]`` of all tokens. aux: ``[B, T, num_aux * H]``.
            at: ``[B, S]`` positions, counted without token 0.
        """
        place = torch.arange(1, embeds.shape[1], device=at.device)
        _, q, k, _ = self.queries_keys(embeds[:, 1:], aux[:, :-1], place)
        return head_scores(q, k, at)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight.to(x.dtype), self.shape.eps)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = self.rope[positions].unsqueeze(-3).chunk(2, -1)
        return rotate_halves(x.float(), cos, sin).to(x.dtype)

    def queries_keys(
        self, embeds: Tensor, aux: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(fused [B, T, H], q [B, nh, T, D], k [B, nkv, T, D], inputs [B, T, 2H])`` of
        ``embeds``, ``aux [B, T, 3H]``, ``positions [T]``.
        """
        fused = self.fc(aux)
        return fused, *self.project(embeds, fused, positions)

    def project(
        self, embeds: Tensor, features: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(q [B, nh, T, D], k [B, nkv, T, D], inputs [B, T, 2H])``.

        Args:
            embeds: ``[B, T, H]`` of the tokens.
            features: ``[B, T, H]``: fused auxiliary states, or the layer's own outputs one token
                before, where the target has not been yet.
            positions: ``[T]`` or ``[B, T]``.
        """
        inputs = torch.cat(
            [self._norm(embeds, self.input_layernorm), self._norm(features, self.hidden_norm)], -1
        )
        q = self._rotate(split_heads(self.q_proj(inputs), self.shape.head_dim), positions)
        k = self._rotate(split_heads(self.k_proj(inputs), self.shape.head_dim), positions)
        return q, k, inputs

    def values(self, inputs: Tensor) -> Tensor:
        """``[B, nkv, T, D]`` of the third that ``project`` returns."""
        return split_heads(self.v_proj(inputs), self.shape.head_dim)

    def outputs(self, features: Tensor, attended: Tensor) -> Tensor:
        """The layer's outputs ``[B, T, H]``, before the final norm.

        Args:
            features: ``[B, T, H]``, as in ``project``: the residual.
            attended: ``[B, nh, T, D]``, what attention gave.
        """
        h = features + self.o_proj(attended.transpose(1, 2).flatten(-2))
        y = self._norm(h, self.post_attention_layernorm)
        return h + gated_mlp(y, self.gate_proj, self.up_proj, self.down_proj)

    def final_norm(self, outputs: Tensor) -> Tensor:
        """What the LM head reads."""
        return self._norm(outputs, self.norm)

    def states(self, fused: Tensor, q: Tensor, k: Tensor, inputs: Tensor) -> Tensor:
        """What the LM head reads at every token, ``[B, T, H]``; the arguments are from
        ``queries_keys``. Values, output projection, MLP and final norm are what the retrieval head
        does without.
        """
        attended = causal_attention(q, k, self.values(inputs))
        return self.final_norm(self.outputs(fused, attended))

    def logits(self, fused: Tensor, q: Tensor, k: Tensor, inputs: Tensor) -> Tensor:
        """Draft logits ``[B, T, draft_vocabulary]``."""
        return self.lm_head(self.states(fused, q, k, inputs))

    def checkpoint(self) -> dict[str, Tensor]:
        """Tensors under SafeAILab's names, with ``d2t`` and ``t2d`` if the draft vocabulary is
        reduced.
        """
        state = self.state_dict()
        tensors = {theirs: state[ours] for theirs, ours in _NAMES.items()}
        if self.draft_ids is not None:
            ids = self.draft_ids.cpu()
            known = torch.zeros(self.shape.vocabulary, dtype=torch.bool)
            known[ids] = True
            tensors |= {"d2t": ids - torch.arange(len(ids)), "t2d": known}
        return tensors

    def save(self, folder: Path) -> None:
        """Write an EAGLE-3 checkpoint in SafeAILab's layout, weights in bfloat16."""
        from safetensors.torch import save

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: (t.to(torch.bfloat16) if t.is_floating_point() else t).detach().cpu().contiguous()
            for name, t in self.checkpoint().items()
        }
        with whole_file(folder / "model.safetensors") as part:
            part.write_bytes(save(tensors, metadata={"format": "pt"}))
        with whole_file(folder / "config.json") as part:
            part.write_text(json.dumps(self.shape.config(), indent=2) + "\n")

    @classmethod
    def load(
        cls, folder: Path, *, max_position: int, num_layers: int, vocabulary: int
    ) -> DraftModel:
        """A published EAGLE-3 checkpoint to train further, extended with YaRN if it was trained on
        shorter sequences.

        Args:
            max_position: longest sequence it will be trained on.
            num_layers, vocabulary: of the target.
        Raises:
            HeadError: not an EAGLE-3 checkpoint, or one with tensors that `DraftModel` lacks.
        """
        spec = read_checkpoint(folder).spec
        entries = list_tensors(folder, allow_pickle=False)
        names = {
            name: _NAMES.get(name.removeprefix("model.").replace("layers.0.", "midlayer.", 1))
            for name in entries
        }
        tensors = {
            ours: entries[name].load().float() for name, ours in names.items() if ours is not None
        }
        unknown = [
            name
            for name, ours in names.items()
            if ours is None and name not in ("d2t", "t2d", "embed_tokens.weight")
        ]
        missing = sorted(set(_NAMES.values()) - set(tensors))
        if unknown or missing:
            raise HeadError(
                f"--init {folder}: cannot be trained further here (tensors unknown: "
                f"{', '.join(unknown) or 'none'}; missing: "
                f"{', '.join(missing) or 'none'}); start without --init, or from a checkpoint with "
                "SafeAILab's tensors."
            )
        widths = {
            "its target's hidden_size": spec.target_hidden_size,
            "the width of its embedding": spec.embed_size,
        }
        for what, width in widths.items():
            if width != spec.hidden_size:
                raise HeadError(
                    f"--init {folder}: {what} is {width} and its own hidden_size "
                    f"{spec.hidden_size}; give a head as wide as its target."
                )
        drafted = tensors["lm_head.weight"].shape[0]
        ids = None
        if drafted < vocabulary:
            if "d2t" not in entries:
                raise HeadError(
                    f"--init {folder}: lm_head.weight has {drafted} rows for {vocabulary} tokens "
                    "and there is no d2t; download it in full."
                )
            ids = entries["d2t"].load().long() + torch.arange(drafted)
        scaling = rope_parameters(spec, max_position)
        theta = scaling.pop("rope_theta")
        shape = DraftShape(
            hidden=spec.hidden_size,
            heads=spec.num_heads,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            ffn=tensors["gate_proj.weight"].shape[0],
            vocabulary=vocabulary,
            draft_vocabulary=drafted,
            rope_theta=theta,
            rope_scaling=None if scaling["rope_type"] == "default" else scaling,
            eps=spec.rms_norm_eps,
            max_position=max(max_position, spec.trained_length),
            aux_layers=aux_layers_of(spec, num_layers),
        )
        model = cls(shape, ids)
        model.load_state_dict(tensors if ids is None else {**tensors, "draft_ids": ids})
        return model
