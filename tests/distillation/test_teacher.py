"""What the teacher hands over against transformers' eager attention weights and hidden states, for
every family; and what is refused.
"""

import pytest
import torch

from specontext_vllm.distillation.losses import AttentionTarget
from specontext_vllm.distillation.shape import DraftShape, aux_layers_for
from specontext_vllm.distillation.teacher import (
    Teacher,
    TeacherError,
    check_teacher,
    load_teacher,
    read_config,
    read_tokenizer,
)
from specontext_vllm.retrieval.checkpoint import HeadError
from tests.distillation.tiny_models import FAMILIES, make_config, write_model
from tests.engine.families import FULL, SLIDING, gemma3, gpt_oss, write
from tests.engine.families import WINDOW as WIDTH

WINDOW = 7
NEAR = {"rtol": 1e-3, "atol": 2e-3}
CASES = [(family, 2, False) for family in FAMILIES] + [
    ("llama", 4, False),
    ("qwen3", 1, False),
    ("llama", 2, True),
    ("qwen2", 1, True),
]


@pytest.mark.parametrize("over_layers", ["max", "mean"])
@pytest.mark.parametrize(
    ("family", "kv_heads", "tied"),
    CASES,
    ids=[f"{f}-{k}kv{'-tied' if t else ''}" for f, k, t in CASES],
)
def test_lesson_is_what_transformers_computes(tmp_path, family, kv_heads, tied, over_layers):
    from transformers import AutoModelForCausalLM

    write_model(
        tmp_path, make_config(family, num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    )
    aux_layers = DraftShape.for_target(read_config(tmp_path), max_position=64).aux_layers
    teacher = Teacher(load_teacher(tmp_path, torch.device("cpu"), torch.float32), (*aux_layers, 5))
    ids, at = torch.randint(0, 97, (2, 40)), torch.tensor([[38, 11, 25], [9, 30, 4]])
    lesson = teacher(ids, at, AttentionTarget(WINDOW, over_layers))

    eager = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        shown = eager(ids, output_attentions=True, output_hidden_states=True)
        # hidden_states ends with the normed output; what enters the norm is the last layer's.
        last = {}
        eager.model.norm.register_forward_pre_hook(
            lambda _, arguments: last.update(state=arguments[0])
        )
        eager(ids)
    torch.testing.assert_close(lesson.embeds, eager.get_input_embeddings()(ids))
    aux = torch.cat([*(shown.hidden_states[i] for i in aux_layers), last["state"]], -1)
    torch.testing.assert_close(lesson.aux, aux, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(teacher.logits(lesson.hidden), shown.logits, rtol=1e-4, atol=1e-3)
    some = torch.tensor([3, 50, 96])
    torch.testing.assert_close(
        teacher.logits(lesson.hidden, some), shown.logits[..., some], rtol=1e-4, atol=1e-3
    )

    for b in range(2):
        for s, p in enumerate(at[b].tolist()):
            # Position p among the tokens without token 0; its attention without token 0, which is
            # no page's reason.
            rows = torch.stack([layer[b, :, p + 1] for layer in shown.attentions])[..., 1:]
            rows = rows / rows.sum(-1, keepdim=True)
            grouped = rows.unflatten(1, (kv_heads, -1)).amax(2)
            wanted = grouped.amax(0) if over_layers == "max" else grouped.mean(0)
            wanted[:, max(0, p - WINDOW) :] = 0
            torch.testing.assert_close(lesson.mass[b, :, s], wanted.sum(-1), rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(
                lesson.target[b, :, s],
                wanted / wanted.sum(-1, keepdim=True).clamp(min=1e-6),
                rtol=1e-3,
                atol=1e-4,
            )


# Not olmo3: vLLM serves it by transformers' class, which it changes for good in its process.
@pytest.mark.parametrize("family", [gpt_oss, gemma3], ids=lambda family: family.__name__)
def test_windows_and_sinks_are_the_model_s_and_full_layers_alone_are_watched(family, tmp_path):
    """Lessons, and the second run in the middle of a text, against transformers' eager attention
    with a mask of its own for each kind of layer.
    """
    from transformers import AutoModelForCausalLM

    write(tmp_path, family())
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    teacher = Teacher(load_teacher(tmp_path, torch.device("cpu"), torch.float32), (1, 2))
    ids = torch.randint(0, 97, (2, 160), generator=torch.Generator().manual_seed(0))
    at = torch.tensor([[150, 90], [30, 159 - 1]])
    lesson = teacher(ids, at, AttentionTarget(WINDOW), keep_cache=True)
    model.model.do_not_compile = True
    full = [place for place, kind in enumerate(model.config.layer_types) if kind == FULL]
    assert [attention.layer_idx for attention in teacher.watched] == full

    def eager(read):
        """States that enter the layers, logits and weights where full layers read ``read``."""
        length = ids.shape[1]
        windows = torch.ones(length, length, dtype=torch.bool).tril()
        windows &= ~torch.ones_like(windows).tril(-WIDTH)
        masks = {
            kind: torch.zeros(length, length).masked_fill(~allowed, torch.finfo().min)[None, None]
            for kind, allowed in ((FULL, read), (SLIDING, windows))
        }
        with torch.no_grad():
            return model(
                ids, attention_mask=masks, output_hidden_states=True, output_attentions=True
            )

    read = torch.ones(160, 160, dtype=torch.bool).tril()
    shown = eager(read)
    torch.testing.assert_close(lesson.aux, torch.cat(shown.hidden_states[1:3], -1), **NEAR)
    torch.testing.assert_close(lesson.hidden, shown.hidden_states[-1], **NEAR)
    for b in range(2):
        for s, p in enumerate(at[b].tolist()):
            rows = torch.stack([shown.attentions[layer][b, :, p + 1] for layer in full])
            rows = rows[..., 1:160]
            rows = rows / rows.sum(-1, keepdim=True)
            wanted = rows.unflatten(1, (2, -1)).amax(2).amax(0)
            wanted[:, max(0, p - WINDOW) :] = 0
            torch.testing.assert_close(lesson.mass[b, :, s], wanted.sum(-1), rtol=1e-3, atol=1e-5)

    # Tokens 130 to 139 read pages 0, 3 and 8 in layers of full attention.
    chosen = torch.zeros(2, 2, 10, 9, dtype=torch.bool)
    chosen[..., [0, 3, 8]] = True
    states = teacher.decode(ids, lesson.cache, 130, chosen)
    read[130:140] &= torch.isin(torch.arange(160) // 16, torch.tensor([0, 3, 8]))
    sparse = torch.cat(eager(read).hidden_states[1:3], -1)[:, 130:140]
    torch.testing.assert_close(states, sparse, **NEAR)
    assert (states - lesson.aux[:, 130:140]).abs().max() > 0.01


def test_the_teacher_is_left_as_it_was(tmp_path):
    teacher = Teacher(
        load_teacher(
            write_model(tmp_path, make_config("llama")), torch.device("cpu"), torch.float32
        ),
        (1, 2, 3),
    )
    teacher(torch.randint(0, 97, (1, 20)), torch.tensor([[15]]), AttentionTarget(WINDOW))
    assert not any(module._forward_pre_hooks for module in teacher.model.modules())
    assert not any(hasattr(layer.self_attn, "observer") for layer in teacher.layers)
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def refused_configs():
    from transformers import (
        DeepseekV3Config,
        Gemma2Config,
        Gemma4TextConfig,
        GPT2Config,
        Llama4TextConfig,
        MistralConfig,
        Qwen3NextConfig,
        T5Config,
    )

    return {
        "mistral-window": (MistralConfig(sliding_window=4096), "look back 4096 tokens"),
        "states": (Qwen3NextConfig(layer_types=["linear_attention"] * 48), "that keep a state"),
        "llama4": (Llama4TextConfig(), "kinds chunked_attention"),
        "gemma2": (Gemma2Config(), "caps the logits"),
        "gemma4": (Gemma4TextConfig(), "differ in their heads"),
        "deepseek": (DeepseekV3Config(), "MLA"),
        "t5": (T5Config(), "encoder-decoder"),
        "gpt2": (GPT2Config(), "rms_norm_eps"),
    }


@pytest.mark.parametrize(
    "name", ["mistral-window", "states", "llama4", "gemma2", "gemma4", "deepseek", "t5", "gpt2"]
)
def test_a_model_that_is_not_served_is_refused(name):
    config, why = refused_configs()[name]
    with pytest.raises(TeacherError, match=why) as caught:
        check_teacher(config)
    assert str(caught.value).startswith(f"--model: {config.model_type} ") and "\n" not in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({}, "no config.json"),
        ({"config.json": "{"}, "cannot be read"),
        ({"config.json": '{"model_type": "nobody"}'}, "cannot be read"),
    ],
    ids=["empty", "broken", "unknown"],
)
def test_a_folder_that_is_no_model_is_refused(tmp_path, files, why):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(TeacherError, match=why):
        read_config(tmp_path)


def test_missing_weights_and_tokenizer_are_refused(tmp_path):
    make_config("llama").save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match="AutoModelForCausalLM"):
        load_teacher(tmp_path, torch.device("cpu"), torch.float32)
    with pytest.raises(TeacherError, match="AutoTokenizer|slow tokenizer"):
        read_tokenizer(tmp_path)


def test_aux_layers_of_shallow_models():
    assert (
        aux_layers_for(5) == (1, 2, 3)
        and aux_layers_for(6) == (1, 3, 4)
        and aux_layers_for(32) == (2, 16, 29)
    )
    with pytest.raises(HeadError, match="it has 4 layers"):
        aux_layers_for(4)
