"""The projections from which the retrieval head's queries and keys are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specontext_vllm.retrieval.checkpoint import HeadCheckpoint


@dataclass(frozen=True)
class GatedMLP:
    """What a gated MLP adds to some rows of a projection: ``down (silu(gate x) * (up x))``.

    Attributes:
        rows: those rows.
        gate_up: ``[2 M, W]``, gate first.
        down: ``[rows, M]``.
    """

    rows: range
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Projection:
    """``W x + b``, and what MLPs add to it: the values of some heads, before norms and RoPE.

    Attributes:
        head_dim: D.
        weight, bias: ``[heads * D, W]``, ``[heads * D]`` or None.
        norm: ``[heads, D]`` RMSNorm weights that the values are to be normalised by, or None.
        mlps: each for other rows.
    """

    head_dim: int
    weight: Tensor
    bias: Tensor | None
    norm: Tensor | None
    mlps: tuple[GatedMLP, ...] = ()

    @classmethod
    def of(
        cls, checkpoint: HeadCheckpoint, kinds: str, keep: Callable[[Tensor], Tensor]
    ) -> Projection:
        """The projection of queries ("q"), of keys ("k"), or of both from one input ("qk").

        Args:
            keep: brings a tensor to its device and dtype.
        """
        spec, tensors = checkpoint.spec, checkpoint.tensors
        heads = {"q": spec.num_heads, "k": spec.num_kv_heads}
        bias = norm = None
        if any(f"{kind}_proj.bias" in tensors for kind in kinds):
            # Zero where only one of the two exists.
            parts = [
                tensors.get(f"{kind}_proj.bias", torch.zeros(heads[kind] * spec.head_dim))
                for kind in kinds
            ]
            bias = keep(torch.cat([part.float() for part in parts]))
        if spec.qk_norm:
            norms = [tensors[f"{kind}_norm.weight"].expand(heads[kind], -1) for kind in kinds]
            norm = keep(torch.cat(norms))
        mlps, first = [], 0
        for kind in kinds:
            rows = range(first, first + heads[kind] * spec.head_dim)
            first = rows.stop
            if f"{kind}_mlp.down_proj.weight" in tensors:
                gate, up, down = (
                    tensors[f"{kind}_mlp.{part}_proj.weight"] for part in ("gate", "up", "down")
                )
                mlps.append(GatedMLP(rows, keep(torch.cat((gate, up))), keep(down)))
        weight = keep(torch.cat([tensors[f"{kind}_proj.weight"] for kind in kinds]))
        return cls(spec.head_dim, weight, bias, norm, tuple(mlps))

    def part(self, first: int, last: int) -> Projection:
        """The heads ``first`` to ``last - 1``, as views; of an MLP all rows or none."""
        rows = range(first * self.head_dim, last * self.head_dim)
        return Projection(
            self.head_dim,
            self.weight[rows.start : rows.stop],
            None if self.bias is None else self.bias[rows.start : rows.stop],
            None if self.norm is None else self.norm[first:last],
            tuple(
                GatedMLP(
                    range(mlp.rows.start - rows.start, mlp.rows.stop - rows.start),
                    mlp.gate_up,
                    mlp.down,
                )
                for mlp in self.mlps
                if mlp.rows.start in rows
            ),
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        given = [self.weight, self.bias, self.norm]
        given += [tensor for mlp in self.mlps for tensor in (mlp.gate_up, mlp.down)]
        return sum(tensor.nbytes for tensor in given if tensor is not None)

    def __call__(self, x: Tensor) -> Tensor:
        """Values ``[N, heads * D]`` of ``x [N, W]``."""
        values = F.linear(x, self.weight, self.bias)
        for mlp in self.mlps:
            gate, up = F.linear(x, mlp.gate_up).chunk(2, dim=-1)
            values[:, mlp.rows.start : mlp.rows.stop].addmm_(F.silu(gate) * up, mlp.down.t())
        return values
