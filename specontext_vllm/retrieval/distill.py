"""Training a retrieval head: an EAGLE-3-shaped draft model, the draft loss and the alignment loss.

The draft loss alone does not teach a small head to retrieve (shared/spike/README.md); the alignment loss does: where the teacher's
layers look when they process a token is where the head's attention for that token must lie.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE in rotate-half form on ``x [..., T, D]`` at ``positions [T]``."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions[:, None].float() * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class DraftModel(nn.Module):
    """One EAGLE-3 decoder layer with its fc and LM head; the embedding is the target's.

    Structure and names as in SafeAILab's EAGLE and vLLM's llama_eagle3.py: q, k, v of ``cat[input_layernorm(embed),
    hidden_norm(fc(aux))]``, residual fc(aux).

    Args:
        hidden: H, width of the target's hidden states and of the layer.
        heads, kv_heads, head_dim: of the layer's attention; KV heads must be the target's.
        ffn: inner width of the MLP. vocabulary: tokens the LM head can draft.
        theta, eps: RoPE base and RMSNorm epsilon.
    """

    def __init__(
        self, hidden: int, heads: int, kv_heads: int, head_dim: int, ffn: int, vocabulary: int, theta: float, eps: float
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.theta, self.eps = heads, kv_heads, head_dim, theta, eps

        def linear(fan_in: int, fan_out: int) -> nn.Linear:
            layer = nn.Linear(fan_in, fan_out, bias=False)
            nn.init.normal_(layer.weight, 0.0, 0.03)
            return layer

        def norm() -> nn.Parameter:
            return nn.Parameter(torch.ones(hidden))

        self.fc = linear(3 * hidden, hidden)
        self.input_layernorm, self.hidden_norm, self.post_attention_layernorm, self.norm = norm(), norm(), norm(), norm()
        self.q_proj, self.k_proj = linear(2 * hidden, heads * head_dim), linear(2 * hidden, kv_heads * head_dim)
        self.v_proj, self.o_proj = linear(2 * hidden, kv_heads * head_dim), linear(heads * head_dim, hidden)
        self.gate_proj, self.up_proj, self.down_proj = linear(hidden, ffn), linear(hidden, ffn), linear(ffn, hidden)
        self.lm_head = linear(hidden, vocabulary)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), self.eps)

    def queries_keys(self, embeds: Tensor, aux: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(fused [B, T, H], q [B, nh, T, D], k [B, nkv, T, D], inputs [B, T, 2H])`` of ``embeds``, ``aux [B, T, 3H]``."""
        fused = self.fc(aux)
        inputs = torch.cat([self._norm(embeds, self.input_layernorm), self._norm(fused, self.hidden_norm)], -1)

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q = rotate(split(self.q_proj(inputs)), positions, self.theta)
        k = rotate(split(self.k_proj(inputs)), positions, self.theta)
        return fused, q, k, inputs

    def logits(self, fused: Tensor, q: Tensor, k: Tensor, inputs: Tensor) -> Tensor:
        """Draft logits ``[B, T, V]`` of the pruned part: values, output projection, MLP, LM head."""
        v = self.v_proj(inputs).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        h = fused + self.o_proj(mixed.transpose(1, 2).flatten(-2))
        y = self._norm(h, self.post_attention_layernorm)
        h = h + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))
        return self.lm_head(self._norm(h, self.norm))

    def checkpoint(self) -> dict[str, Tensor]:
        """Tensors under SafeAILab's names."""
        names = {"fc": "fc.weight", "norm": "norm.weight", "lm_head": "lm_head.weight"}
        names |= {n: f"midlayer.{n}.weight" for n in ("input_layernorm", "hidden_norm", "post_attention_layernorm")}
        names |= {n: f"midlayer.self_attn.{n}.weight" for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        names |= {n: f"midlayer.mlp.{n}.weight" for n in ("gate_proj", "up_proj", "down_proj")}
        state = self.state_dict()
        return {new: state.get(old, state.get(f"{old}.weight")) for old, new in names.items()}


def draft_loss(draft_logits: Tensor, teacher_logits: Tensor, weights: Tensor) -> Tensor:
    """KL(teacher || draft) on the next token, weighted.

    Args:
        draft_logits, teacher_logits: ``[B, T, V]`` for the same tokens. weights: ``[B, T]``.
    """
    teacher = teacher_logits.float().log_softmax(-1)
    kl = (teacher.exp() * (teacher - draft_logits.float().log_softmax(-1))).sum(-1)
    return (kl * weights).sum() / weights.sum().clamp(min=1e-6)


def attention_target(queries: list[Tensor], keys: list[Tensor], at: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Where the teacher looks from positions ``at``, beyond the newest ``window`` tokens.

    The attention of sampled queries only is formed, so memory is ``nkv * S * T`` a sequence and layer. Token 0 has no pair in the
    head and is a sink in the teacher: give sequences without it.

    Args:
        queries: per layer ``[B, nh, T, D]``. keys: per layer ``[B, nkv, T, D]``. at: ``[B, S]`` positions.
    Returns:
        ``(target [B, nkv, S, T], mass [B, nkv, S])``: the maximum over layers and over a group's query heads of the attention
        weights, normalised; and the sum it had.
    """
    nkv, length, d = keys[0].shape[1:]
    step = torch.arange(length, device=at.device)
    causal = step <= at[:, None, :, None]
    far = step < at[:, None, :, None] - window
    target = None
    for q, k in zip(queries, keys):
        chosen = q.gather(2, at[:, None, :, None].expand(-1, q.shape[1], -1, d)).unflatten(1, (nkv, -1))
        logits = torch.einsum("bkgsd,bktd->bkgst", chosen.float(), k.float()) * d**-0.5
        weight = logits.masked_fill(~causal[:, :, None], float("-inf")).softmax(-1).amax(2)
        target = weight if target is None else torch.maximum(target, weight)
    target = target * far
    mass = target.sum(-1)
    return target / mass.clamp(min=1e-6)[..., None], mass


def alignment_loss(q: Tensor, k: Tensor, at: Tensor, target: Tensor, mass: Tensor, window: int) -> Tensor:
    """Cross-entropy of the head's attention against the teacher's, weighted by the teacher's mass beyond the window.

    The best query head of a group counts, since a page needs one head that points at it (selection takes the group's maximum).

    Args:
        q: ``[B, nh, T, D]``, k: ``[B, nkv, T, D]`` of the head. at, target, mass: from ``attention_target``.
    """
    nkv, length, d = k.shape[1:]
    step = torch.arange(length, device=at.device)
    far = step < at[:, None, :, None] - window
    chosen = q.gather(2, at[:, None, :, None].expand(-1, q.shape[1], -1, d)).unflatten(1, (nkv, -1))
    logits = torch.einsum("bkgsd,bktd->bkgst", chosen.float(), k.float()) * d**-0.5
    log_weight = logits.masked_fill(~far[:, :, None], -1e9).log_softmax(-1).clamp(min=-30.0)
    entropy = -(target[:, :, None] * log_weight).sum(-1).amin(2)
    return (entropy * mass.clamp(max=1.0)).mean()
