"""Small random models of the families whose layers differ from one another, one from each family's
own configuration class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distillation.tiny_models import make_model
from tests.engine.conftest import engine

WINDOW = 48
"""Tokens: three pages, far fewer than the prompts have."""
SLIDING, FULL = "sliding_attention", "full_attention"
WIDTHS = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
SHAPE = {**WIDTHS, "head_dim": 32}


def layers(*types: str) -> dict[str, Any]:
    """``layer_types`` by first letters, and what goes with them."""
    return {"num_hidden_layers": len(types), "layer_types": list(types), "sliding_window": WINDOW}


def gemma3() -> Any:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(**SHAPE, query_pre_attn_scalar=32, **layers(SLIDING, FULL, SLIDING))


def olmo3() -> Any:
    from transformers import Olmo3Config

    return Olmo3Config(**WIDTHS, **layers(SLIDING, SLIDING, FULL))


def cohere2() -> Any:
    from transformers import Cohere2Config

    return Cohere2Config(**SHAPE, **layers(FULL, SLIDING, SLIDING, FULL))


def exaone4() -> Any:
    from transformers import Exaone4Config

    kinds = layers(SLIDING, SLIDING, SLIDING, FULL)
    return Exaone4Config(**SHAPE, sliding_window_pattern=4, **kinds)


def llama() -> Any:
    """Windows on more layers than not, and two of full attention side by side; transformers has no
    windows in this family.
    """
    from transformers import LlamaConfig

    config = LlamaConfig(**SHAPE, num_hidden_layers=5)
    config.layer_types, config.sliding_window = [SLIDING, FULL, FULL, SLIDING, SLIDING], WINDOW
    return config


def mistral(*types: str) -> Any:
    from transformers import MistralConfig

    config = MistralConfig(**SHAPE, num_hidden_layers=len(types))
    config.layer_types, config.sliding_window = list(types), WINDOW
    return config


WINDOWED: dict[str, Callable[[], Any]] = {
    family.__name__: family for family in (gemma3, olmo3, cohere2, exaone4, llama)
}


def write(folder: Path, config: Any, seed: int = 0) -> torch.nn.Module:
    """A random model of ``config``, saved in ``folder``."""
    model = make_model(config, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gemma" in config.model_type and "norm" in name:
                parameter.sub_(1.0)  # which the norms add
            elif "gemma" in config.model_type and "embed_tokens" in name:
                parameter.mul_(0.05)  # tied, so that a token would be its own successor
    model.save_pretrained(folder)
    return model.eval()


@contextmanager
def inspecting_here() -> Iterator[None]:
    """vLLM looks at a model's class in this process: for that alone it starts one that imports all
    of it anew.
    """
    from vllm.model_executor.models import registry

    def inspect(lazy: Any) -> Any:
        return registry._ModelInfo.from_model_cls(lazy.load_model_cls())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry._LazyRegisteredModel, "inspect_model_cls", inspect)
        yield


class Asked:
    """An engine with one of these models, and what it answers."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def answer(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        """``count`` tokens for each prompt, all asked at once."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        self.replies = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )
        return [list(reply.outputs[0].token_ids) for reply in self.replies]

    @property
    def cached_tokens(self) -> list[int]:
        """Of the prompts that were answered last, how many each found in the prefix cache."""
        return [reply.num_cached_tokens for reply in self.replies]

    def set(self, **changes: Any) -> None:
        """Change settings, with a cold prefix cache and counters at zero."""
        self.llm.collective_rpc("specontext_set", kwargs=changes)
        self.llm.collective_rpc("specontext_stats", args=(True,))
        self.llm.reset_prefix_cache()

    @property
    def stats(self) -> dict[str, Any]:
        return self.llm.collective_rpc("specontext_stats")[0]

    @property
    def runner(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner


@contextmanager
def serving(folder: Path, **arguments: Any) -> Iterator[Asked]:
    """An engine with the model in ``folder``: stock vLLM's, or ours with settings."""
    if (settings := arguments.pop("settings", None)) is not None:
        arguments |= {
            "attention_backend": "specontext",
            "block_size": None,
            "additional_config": {"specontext": settings},
        }
    elif not torch.cuda.is_available():
        arguments = {"block_size": 32, **arguments}
    given = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        "num_gpu_blocks_override": 200,
        **arguments,
    }
    with inspecting_here(), engine(**given) as llm:
        yield Asked(llm)
