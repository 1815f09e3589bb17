"""Model shapes of the decode benchmark, and the bytes that a decode step must read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.shape_configs import CONFIGS, NOTES

DEMO_MODEL = Path(__file__).parents[1] / "models" / "demo"
BYTES = 2
"""Of one weight: bfloat16."""

HeadFormat = Literal["eagle3", "specontext"]
"""What a head of random weights costs: as much as a pruned EAGLE-3 head, or as one that
`specontext distill` makes.
"""

NAMES = (*CONFIGS, "demo")
UNNAMED = ("8b", "1b", "smollm2", "demo", "tiny")
"""Shapes whose results do not bear their names; they say which it was."""


@dataclass(frozen=True)
class Shape:
    """A model's widths.

    Attributes:
        kv_element_bytes: of one element of the KV cache.
    """

    name: str
    config: dict[str, Any]
    kv_element_bytes: int = BYTES

    @classmethod
    def named(cls, name: str) -> Shape:
        """70b and 8b are Llama-3.1's, 1b is Llama-3.2-1B's (with its LM head untied), smollm2 is
        SmolLM2-135M's (with more positions), gpt-oss-20b and qwen3.5-9b are what ``note`` says of
        them, demo is the bundled model's.

        Raises:
            ValueError: an unknown name, or no demo model.
        """
        if name in CONFIGS:
            return cls(name, CONFIGS[name])
        if name != "demo":
            raise ValueError(f"--model-shape: found {name!r}; use one of {', '.join(NAMES)}.")
        path = DEMO_MODEL / "config.json"
        if not path.exists():
            raise ValueError(
                f"--model-shape demo: {path} does not exist; use another shape or make the demo "
                "model first."
            )
        config = json.loads(path.read_text())
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        return cls(name, config)

    def write(self, folder: Path) -> Path:
        """Make ``folder`` a model for ``load_format="dummy"``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder

    def __getattr__(self, key: str) -> Any:
        try:
            return self.__dict__["config"][key]
        except KeyError:
            raise AttributeError(key) from None

    @property
    def suffix(self) -> str:
        """What joins the name of a result."""
        return "" if self.name in UNNAMED else f"-{self.name}"

    @property
    def note(self) -> str | None:
        """What must be known of it to read its figures."""
        return NOTES.get(self.name)

    @property
    def layer_types(self) -> list[str]:
        """Of each layer: full_attention, sliding_attention or linear_attention."""
        every = ["full_attention"] * self.num_hidden_layers
        return self.config.get("layer_types") or every

    @property
    def is_mixed(self) -> bool:
        """Whether some layers do not attend to the whole context."""
        return set(self.layer_types) != {"full_attention"}

    @property
    def has_linear_layers(self) -> bool:
        return "linear_attention" in self.layer_types

    @property
    def weight_bytes(self) -> int:
        """Weights that one decode step reads: all but the input embedding, of which it reads a few
        rows.
        """
        h = self.hidden_size
        attention = sum(map(self._attention_weights, self.layer_types))
        mlps = self.num_hidden_layers * (3 * h * self.intermediate_size + 2 * h)
        return BYTES * (attention + mlps + h + self.vocab_size * h)

    def _attention_weights(self, kind: str) -> int:
        h, d = self.hidden_size, self.head_dim
        if kind == "linear_attention":
            heads, keys, values = self._linear_widths
            # q, k, v, the output gate and two gates a head; then what puts heads together.
            return h * (2 * keys + 2 * values + 2 * heads) + values * h
        gate = 1 if self.config.get("attn_output_gate") else 0
        return h * d * ((2 + gate) * self.num_attention_heads + 2 * self.num_key_value_heads)

    @property
    def _linear_widths(self) -> tuple[int, int, int]:
        """Value heads of a linear layer, and widths of all its keys and values."""
        heads = self.linear_num_value_heads
        return (
            heads,
            self.linear_num_key_heads * self.linear_key_head_dim,
            heads * self.linear_value_head_dim,
        )

    @property
    def _layer_kv_bytes_per_token(self) -> int:
        return self.kv_element_bytes * 2 * self.num_key_value_heads * self.head_dim

    @property
    def kv_bytes_per_token(self) -> int:
        """KV of a token in the layers that attend to the whole context."""
        return self.layer_types.count("full_attention") * self._layer_kv_bytes_per_token

    def other_layers_bytes(self, context: int) -> int:
        """Bytes of one request's step in the other layers: KV within the windows; states, which are
        read and written.
        """
        windows = self.layer_types.count("sliding_attention")
        total = 0
        if windows:
            read = min(context, self.sliding_window)
            total += windows * read * self._layer_kv_bytes_per_token
        if self.has_linear_layers:
            _, keys, values = self._linear_widths
            # A matrix of 32-bit numbers for each value head, and the convolution's last inputs.
            state = 4 * values * self.linear_key_head_dim
            convolved = BYTES * (self.linear_conv_kernel_dim - 1) * (2 * keys + values)
            total += self.layer_types.count("linear_attention") * 2 * (state + convolved)
        return total

    def write_head(self, folder: Path, groups: int = 1) -> Path:
        """Make ``folder`` a head as `specontext distill` makes them, with random weights."""
        from specontext_vllm.retrieval.checkpoint import random_checkpoint, save_head

        spec = self._own_head(groups)
        save_head(folder, spec, random_checkpoint(spec, seed=0).tensors)
        return folder

    def head_weight_bytes(self, head_format: HeadFormat = "eagle3", groups: int = 1) -> int:
        """Weights of the retrieval head that a step reads: all its matrices. Of an EAGLE-3 head
        these are fc over three hidden states, W_q and W_k over two.
        """
        if head_format == "specontext":
            from specontext_vllm.retrieval.checkpoint.shapes import required_shapes

            return BYTES * sum(
                math.prod(shape) for shape in required_shapes(self._own_head(groups)).values()
            )
        h = self.hidden_size
        return BYTES * (
            3 * h * h
            + 2 * h * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
        )

    def _own_head(self, groups: int) -> Any:
        from specontext_vllm.distillation.head_shape import HeadShape

        reach = self.max_position_embeddings
        return HeadShape.for_target(self, max_position=reach, groups=groups).head_spec()

    def head_key_bytes_per_token(self, head_format: HeadFormat = "eagle3") -> int:
        """Of 8-bit floats."""
        if head_format == "specontext":
            spec = self._own_head(1)
            return spec.num_kv_heads * spec.head_dim
        return self.num_key_value_heads * self.head_dim

    def dense_step_bytes(self, requests: int, context: int) -> int:
        """Bytes a dense decode step must read: the weights once, and for every request the KV of
        the whole context and what other layers read.
        """
        per_request = context * self.kv_bytes_per_token + self.other_layers_bytes(context)
        return self.weight_bytes + requests * per_request

    def sparse_step_bytes(
        self,
        requests: int,
        context: int,
        budget: int,
        head_format: HeadFormat = "eagle3",
        key_bytes: int = 1,
        groups: int = 1,
    ) -> int:
        """Bytes a sparse one must read: KV up to the budget, what other layers read, the head's
        weights, and, beyond the budget, its K cache.

        Args:
            key_bytes: of an element of the head's keys; 1 for 8-bit floats.
            groups: of layers that the head has queries for.
        """
        key = self.head_key_bytes_per_token(head_format) * key_bytes
        keys = context * key if context > budget else 0
        kv = min(context, budget) * self.kv_bytes_per_token
        per_request = kv + self.other_layers_bytes(context) + keys
        head = self.head_weight_bytes(head_format, groups)
        return self.weight_bytes + head + requests * per_request
