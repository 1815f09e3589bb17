"""Model shapes of the decode benchmark: config.json contents, and the bytes that a decode step must
read.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

DEMO_MODEL = Path(__file__).parents[1] / "models" / "demo"
BYTES = 2
"""Of one weight or one KV element: bfloat16."""

HeadFormat = Literal["eagle3", "specontext"]
"""What a head of random weights costs: as much as a pruned EAGLE-3 head, or as one that
`specontext distill` makes.
"""

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
_SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 131072,
        "rope_theta": 100000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 1024,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
NAMES = (*_SHAPES, "demo")


@dataclass(frozen=True)
class Shape:
    """A Llama's widths."""

    name: str
    config: dict[str, Any]

    @classmethod
    def named(cls, name: str) -> Shape:
        """8b and 1b are Llama-3.1-8B's and Llama-3.2-1B's (with its LM head untied), smollm2 is
        SmolLM2-135M's (with more positions), demo is the bundled model's.

        Raises:
            ValueError: an unknown name, or no demo model.
        """
        if name in _SHAPES:
            return cls(name, {**_LLAMA, **_SHAPES[name]})
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
    def weight_bytes(self) -> int:
        """Weights that one decode step reads: all but the input embedding, of which it reads a few
        rows.
        """
        h, d = self.hidden_size, self.head_dim
        attention = h * d * (2 * self.num_attention_heads + 2 * self.num_key_value_heads)
        layer = attention + 3 * h * self.intermediate_size + 2 * h
        return BYTES * (self.num_hidden_layers * layer + h + self.vocab_size * h)

    @property
    def kv_bytes_per_token(self) -> int:
        return BYTES * 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim

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

    @property
    def head_key_bytes_per_token(self) -> int:
        return self.num_key_value_heads * self.head_dim  # 8-bit floats

    def dense_step_bytes(self, requests: int, context: int) -> int:
        """Bytes a dense decode step must read: the weights once, and the KV of every request's
        whole context.
        """
        return self.weight_bytes + requests * context * self.kv_bytes_per_token

    def sparse_step_bytes(
        self,
        requests: int,
        context: int,
        budget: int,
        head_format: HeadFormat = "eagle3",
        key_bytes: int = 1,
        groups: int = 1,
    ) -> int:
        """Bytes a sparse one must read: KV up to the budget, the head's weights, and, beyond the
        budget, its K cache.

        Args:
            key_bytes: of an element of the head's keys; 1 for 8-bit floats.
            groups: of layers that the head has queries for.
        """
        keys = context * self.head_key_bytes_per_token * key_bytes if context > budget else 0
        per_request = min(context, budget) * self.kv_bytes_per_token + keys
        head = self.head_weight_bytes(head_format, groups)
        return self.weight_bytes + head + requests * per_request
