"""The draft model whose query and key projections become the retrieval head, in EAGLE-3's shape."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specontext_vllm.distillation.files import whole_file
from specontext_vllm.retrieval.checkpoint import (
    HeadError,
    HeadSpec,
    default_aux_layers,
    read_checkpoint,
    resolve_aux_layers,
)
from specontext_vllm.retrieval.checkpoint.tensor_files import list_tensors
from specontext_vllm.retrieval.rope import rope_parameters, rope_table

_TOP = ("fc.weight", "norm.weight", "lm_head.weight")
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


def aux_layers_for(num_layers: int) -> tuple[int, ...]:
    """EAGLE-3's auxiliary layers, or for a target too shallow for that rule (1, L // 2, L - 2).

    Raises:
        HeadError: fewer than five layers.
    """
    if num_layers < 5:
        raise HeadError(
            f"--model: it has {num_layers} layers, and a head reads the states of three in its "
            "middle; give one with five or more."
        )
    return (
        default_aux_layers(num_layers) if num_layers > 6 else (1, num_layers // 2, num_layers - 2)
    )


def rows_at(x: Tensor, at: Tensor) -> Tensor:
    """Rows ``[B, S, H]`` of ``x [B, T, H]`` at positions ``at [B, S]``."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


@dataclass(frozen=True)
class DraftShape:
    """What a draft model is made of; everything its ``config.json`` says.

    Attributes:
        hidden: H, width of the target's hidden states and of the draft layer.
        heads, kv_heads, head_dim: of the layer's attention; KV heads are the target's.
        ffn: inner width of the MLP.
        vocabulary, draft_vocabulary: the target's tokens, and how many of them the LM head can
            draft.
        rope_theta, rope_scaling: RoPE base and scaling in transformers' terms (None: none).
        eps: of the RMSNorms.
        max_position: positions the head is trained for; beyond them a loading engine extends it by
            YaRN.
        aux_layers: target layers whose input states it reads.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    draft_vocabulary: int
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    eps: float
    max_position: int
    aux_layers: tuple[int, ...]

    @classmethod
    def for_target(
        cls, config: Any, *, max_position: int, draft_vocabulary: int | None = None
    ) -> DraftShape:
        """A head with the target's own attention shape.

        Args:
            config: the target's transformers config.
            max_position: longest sequence it will be trained on.
            draft_vocabulary: None for the whole vocabulary.
        """
        rope = getattr(config, "rope_parameters", None) or {}
        return cls(
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None)
            or config.hidden_size // config.num_attention_heads,
            ffn=config.intermediate_size,
            vocabulary=config.vocab_size,
            draft_vocabulary=min(draft_vocabulary or config.vocab_size, config.vocab_size),
            rope_theta=float(
                rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0
            ),
            rope_scaling=None,
            eps=config.rms_norm_eps,
            max_position=max_position,
            aux_layers=aux_layers_for(config.num_hidden_layers),
        )

    def head_spec(self) -> HeadSpec:
        """The retrieval head in it, as a loader sees it."""
        return HeadSpec(
            format="safeailab",
            hidden_size=self.hidden,
            target_hidden_size=self.hidden,
            embed_size=self.hidden,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            rms_norm_eps=self.eps,
            rope_theta=self.rope_theta,
            rope_scaling=self.rope_scaling,
            trained_length=self.max_position,
            aux_layer_ids=self.aux_layers,
            num_aux=len(self.aux_layers),
            norm_before_fc=False,
            fc_norm=False,
            qk_norm=False,
            dtype=torch.bfloat16,
        )

    def config(self) -> dict[str, Any]:
        """Contents of ``config.json``."""
        config = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": 1,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.eps,
            "vocab_size": self.vocabulary,
            "draft_vocab_size": self.draft_vocabulary,
            "max_position_embeddings": self.max_position,
            "rope_theta": self.rope_theta,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
            "target_hidden_size": self.hidden,
            # vLLM's V1 runner reads them below eagle_config, its V2 runner on the top level alone.
            "eagle_aux_hidden_state_layer_ids": list(self.aux_layers),
            "eagle_config": {
                "eagle_aux_hidden_state_layer_ids": list(self.aux_layers),
                "use_aux_hidden_state": True,
            },
        }
        return (
            config if self.rope_scaling is None else {**config, "rope_scaling": self.rope_scaling}
        )


class DraftModel(nn.Module):
    """One EAGLE-3 decoder layer with its fc and LM head; the embedding is the target's.

    Structure and names as in SafeAILab's EAGLE and vLLM's llama_eagle3.py: q, k, v of
    ``cat[input_layernorm(embed), hidden_norm(fc(aux))]``, residual fc(aux).

    Args:
        shape: its shape.
        draft_ids: ``[draft_vocabulary]`` int64 ascending token ids that the LM head drafts; None
            where it drafts all.
    """

    def __init__(self, shape: DraftShape, draft_ids: Tensor | None = None) -> None:
        super().__init__()
        self.shape = shape
        hidden, width = shape.hidden, shape.head_dim

        def linear(fan_in: int, fan_out: int) -> nn.Linear:
            layer = nn.Linear(fan_in, fan_out, bias=False)
            # Logits of unit size whatever the width.
            nn.init.normal_(layer.weight, 0.0, fan_in**-0.5)
            return layer

        def norm() -> nn.Parameter:
            return nn.Parameter(torch.ones(hidden))

        self.fc = linear(len(shape.aux_layers) * hidden, hidden)
        self.input_layernorm, self.hidden_norm, self.post_attention_layernorm, self.norm = (
            norm(),
            norm(),
            norm(),
            norm(),
        )
        self.q_proj, self.k_proj = (
            linear(2 * hidden, shape.heads * width),
            linear(2 * hidden, shape.kv_heads * width),
        )
        self.v_proj, self.o_proj = (
            linear(2 * hidden, shape.kv_heads * width),
            linear(shape.heads * width, hidden),
        )
        self.gate_proj, self.up_proj, self.down_proj = (
            linear(hidden, shape.ffn),
            linear(hidden, shape.ffn),
            linear(shape.ffn, hidden),
        )
        self.lm_head = linear(hidden, shape.draft_vocabulary)
        self.register_buffer(
            "rope", rope_table(shape.head_spec(), shape.max_position, "cpu"), persistent=False
        )
        self.register_buffer("draft_ids", draft_ids)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), self.shape.eps)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = self.rope[positions].chunk(2, -1)
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    def queries_keys(
        self, embeds: Tensor, aux: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(fused [B, T, H], q [B, nh, T, D], k [B, nkv, T, D], inputs [B, T, 2H])`` of
        ``embeds``, ``aux [B, T, 3H]``.
        """
        fused = self.fc(aux)
        inputs = torch.cat(
            [self._norm(embeds, self.input_layernorm), self._norm(fused, self.hidden_norm)], -1
        )

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)

        return (
            fused,
            self._rotate(split(self.q_proj(inputs)), positions),
            self._rotate(split(self.k_proj(inputs)), positions),
            inputs,
        )

    def states(
        self, fused: Tensor, q: Tensor, k: Tensor, inputs: Tensor, at: Tensor | None = None
    ) -> Tensor:
        """What the LM head reads: the pruned part's values, output projection, MLP and final norm.

        Args:
            fused, q, k, inputs: from ``queries_keys``. at: ``[B, S]`` positions that are wanted, so
                that the MLP, whose activations are the widest, sees no others; None for all.
        Returns:
            ``[B, S, H]``, or ``[B, T, H]``.
        """
        v = self.v_proj(inputs).unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)
        mixed = (
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            .transpose(1, 2)
            .flatten(-2)
        )
        if at is not None:
            fused, mixed = rows_at(fused, at), rows_at(mixed, at)
        h = fused + self.o_proj(mixed)
        y = self._norm(h, self.post_attention_layernorm)
        h = h + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))
        return self._norm(h, self.norm)

    def logits(self, fused: Tensor, q: Tensor, k: Tensor, inputs: Tensor) -> Tensor:
        """Draft logits ``[B, T, draft_vocabulary]``."""
        return self.lm_head(self.states(fused, q, k, inputs))

    def checkpoint(self) -> dict[str, Tensor]:
        """Tensors under SafeAILab's names; ``d2t`` and ``t2d`` where the draft vocabulary is
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
        """A published EAGLE-3 checkpoint to train on, extended by YaRN where it was trained on
        shorter sequences.

        Args:
            max_position: longest sequence it will be trained on. num_layers, vocabulary: of the
                target.
        Raises:
            HeadError: not an EAGLE-3 checkpoint, or one with parts that training here does not
                know.
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
            aux_layers=resolve_aux_layers(spec, num_layers),
        )
        model = cls(shape, ids)
        model.load_state_dict(tensors if ids is None else {**tensors, "draft_ids": ids})
        return model
