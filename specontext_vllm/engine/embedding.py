"""What the head embeds tokens with: the target's own embedding, without adapters.

vLLM: what a model can hand out, and the layers that it wraps for LoRA.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from vllm.lora.layers.vocab_parallel_embedding import VocabParallelEmbeddingWithLoRA
from vllm.model_executor.models.interfaces import supports_multimodal


def embedding_of(model: Any, vocab_size: int) -> Callable[[Tensor], Tensor]:
    """What embeds token ids ``[N]`` -> ``[N, E]``; of a model that takes images, its text model's.

    The place of an image is held by one token, again and again, which may be none of the text
    model's; as in vLLM, such are embedded as token 0.
    """
    if not supports_multimodal(model):
        return without_adapters(model).embed_input_ids
    embed = without_adapters(model.get_language_model()).embed_input_ids
    return lambda ids: embed(ids.masked_fill(ids >= vocab_size, 0))


def without_adapters(model: nn.Module) -> Any:
    """``model`` as it was before vLLM wrapped its embedding for LoRA: a copy of the modules on the
    way there, which share all weights with it. The model itself where nothing is wrapped.

    Uses: vllm.lora.layers.vocab_parallel_embedding.VocabParallelEmbeddingWithLoRA.base_layer
    Symptom: the head embeds a step's tokens with the adapters of the step before.
    Reason: vLLM sets a step's adapters after ``prepare_attn``, and for the tokens of all its rows
        in their order. The head was trained on the base's embedding; vLLM's own drafters read that,
        too (vllm/v1/worker/gpu/spec_decode/eagle/utils.py, maybe_share_target_embed).
    Remove when: a model can be asked for its base's embedding.
    """

    def replaced(parent: Any, path: list[str], new: nn.Module) -> Any:
        if not path:
            return new
        changed = copy.copy(parent)
        changed._modules = dict(parent._modules)
        changed._modules[path[0]] = replaced(parent._modules[path[0]], path[1:], new)
        return changed

    bare: Any = model
    for name, module in model.named_modules():
        if isinstance(module, VocabParallelEmbeddingWithLoRA):
            bare = replaced(bare, name.split("."), module.base_layer)
    return bare
