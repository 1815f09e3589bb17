"""The loaded model's layers that run on our backend: those that attend to the whole context.

vLLM: a model's attention layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specontext_vllm.config import ConfigError
from specontext_vllm.engine.names import BACKEND_NAME


@dataclass(frozen=True)
class LayerShape:
    """What layers that share a page table have in common, as one worker has them.

    Attributes:
        num_heads, num_kv_heads: query and KV heads.
        head_dim: their width.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def expected(cls, vllm_config: Any) -> LayerShape:
        """By the model's configuration, before there are layers."""
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        return cls(
            model.get_num_attention_heads(parallel),
            model.get_num_kv_heads(parallel),
            model.get_head_size(),
        )


def our_layer_names(vllm_config: Any, model: Any) -> tuple[str, ...]:
    """Names of the loaded model's layers that run on our backend, in the model's order. Those of a
    drafter, which vLLM keeps beside them, are not among them.

    Raises:
        ConfigError: there are none, or some attend in a way of their own on top of our backend.
    """
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.models.utils import extract_layer_index

    from specontext_vllm.engine.backend import SpeContextBackend

    modules = set(map(id, model.modules()))
    found = {
        name: layer
        for name, layer in get_layers_from_vllm_config(vllm_config, AttentionLayerBase).items()
        if id(layer) in modules
    }
    backends = {name: layer.get_attn_backend() for name, layer in found.items()}
    ours = [name for name, backend in backends.items() if backend is SpeContextBackend]
    others = {
        type(found[name]).__name__
        for name, backend in backends.items()
        if backend.get_name() == BACKEND_NAME and backend is not SpeContextBackend
    }
    if others:
        raise ConfigError(
            f"model: its layers of the kind {', '.join(sorted(others))} attend in a way that "
            "--attention-backend specontext does not know; serve it with another backend."
        )
    if not ours:
        raise ConfigError(NO_FULL_LAYER.format(model=vllm_config.model_config.model))
    return tuple(sorted(ours, key=extract_layer_index))


NO_FULL_LAYER = (
    "model: {model} has no layer that attends to its whole context, so there is nothing to select "
    "from; serve it with another backend, or with --disable-sliding-window where the window is as "
    "long as the contexts."
)


def shape_of(vllm_config: Any, layer_names: tuple[str, ...]) -> LayerShape:
    """The shape that our layers share.

    Raises:
        ConfigError: they differ.
    """
    layers = vllm_config.compilation_config.static_forward_context
    impls = [layers[name].impl for name in layer_names]
    shapes = {LayerShape(impl.num_heads, impl.num_kv_heads, impl.head_size) for impl in impls}
    # One provider attends for all of them.
    if len(shapes) > 1 or len({(impl.scale, impl.provider.soft_cap) for impl in impls}) > 1:
        raise ConfigError(OTHER_SHAPES)
    return shapes.pop()


OTHER_SHAPES = (
    "model: its layers of full attention differ in their KV heads, head sizes, scales or caps on "
    "logits, but --attention-backend specontext chooses pages for all of them at once; serve it "
    "with another backend."
)
