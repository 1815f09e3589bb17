"""Small random models that are shown pictures, each with a processor and a tokenizer of letters."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.engine.families import gemma3

IMAGE, VIDEO, BEGIN, END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
SPECIAL = ["<pad>", IMAGE, VIDEO, BEGIN, END, "<|line|>"]
LETTERS = [chr(code) for code in range(32, 127)]
TEXT = {
    "vocab_size": len(SPECIAL) + len(LETTERS),
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
PLACES = {"image_token_id": 1, "video_token_id": 2}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
AROUND = {**PLACES, "vision_start_token_id": 3, "vision_end_token_id": 4}
TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}PLACE{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def tokenizer() -> Any:
    """A token for each letter."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {token: i for i, token in enumerate([*SPECIAL, *LETTERS])}
    letters = Tokenizer(models.WordLevel(words, unk_token=SPECIAL[0]))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token=SPECIAL[0], additional_special_tokens=SPECIAL[1:]
    )


def qwen2_5_vl() -> tuple[Any, Callable[[Any], Any], str]:
    """Positions in three dimensions, and windows in its vision tower."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    text = {name: value for name, value in TEXT.items() if name != "head_dim"}
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2}
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": MROPE},
        vision_config={**vision, "out_hidden_size": 128, "fullatt_block_indexes": [1]},
        **AROUND,
    )

    def processor(letters: Any) -> Any:
        letters.image_token, letters.video_token = IMAGE, VIDEO
        size = {"shortest_edge": 28**2, "longest_edge": 28**2 * 40}
        return Qwen2_5_VLProcessor(
            Qwen2VLImageProcessor(size=size), letters, Qwen2VLVideoProcessor(size=size)
        )

    return config, processor, f"{BEGIN}{IMAGE}{END}"


def qwen3_vl() -> tuple[Any, Callable[[Any], Any], str]:
    """Positions in three dimensions in turns, and states of the vision tower in several layers."""
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2}
    config = Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        vision_config={**vision, "out_hidden_size": 128, "deepstack_visual_indexes": [0, 1]},
        **AROUND,
    )

    def processor(letters: Any) -> Any:
        for name, token in zip(("image", "video", "vision_start", "vision_end"), SPECIAL[1:5]):
            setattr(letters, f"{name}_token", token)
            setattr(letters, f"{name}_token_id", letters.convert_tokens_to_ids(token))
        size = {"shortest_edge": 32**2, "longest_edge": 32**2 * 40}
        return Qwen3VLProcessor(
            Qwen2VLImageProcessor(size=size, patch_size=16, merge_size=2),
            letters,
            Qwen3VLVideoProcessor(size=size),
        )

    return config, processor, f"{BEGIN}{IMAGE}{END}"


def mistral3() -> tuple[Any, Callable[[Any], Any], str]:
    """Pixtral's vision tower: a picture is rows of tokens, each with an end of its own."""
    from transformers import Mistral3Config, PixtralImageProcessor, PixtralProcessor

    vision = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    config = Mistral3Config(
        text_config={**TEXT, "model_type": "mistral", "sliding_window": None},
        vision_config={
            **vision,
            "model_type": "pixtral",
            "num_attention_heads": 2,
            "patch_size": 14,
            "image_size": 168,
        },
        image_token_index=1,
        spatial_merge_size=2,
    )

    def processor(letters: Any) -> Any:
        return PixtralProcessor(
            PixtralImageProcessor(size={"longest_edge": 168}, patch_size=14),
            letters,
            patch_size=14,
            spatial_merge_size=2,
            image_token=IMAGE,
            image_break_token="<|line|>",
            image_end_token=END,
        )

    return config, processor, IMAGE


def write_gemma3(folder: Path) -> None:
    """A random Gemma 3 with a vision tower: the tokens of a picture attend to later ones."""
    from transformers import AutoModelForImageTextToText, Gemma3Config

    vision = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96}
    config = Gemma3Config(
        text_config=gemma3().to_dict(),
        vision_config={**vision, "num_attention_heads": 2, "patch_size": 14, "image_size": 56},
        mm_tokens_per_image=4,
        image_token_index=1,
        boi_token_index=2,
        eoi_token_index=3,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # Embeddings are tied, so that a token would be its own successor.
                parameter.copy_(torch.randn_like(parameter) * (0.015 if "embed" in name else 0.3))
    model.save_pretrained(folder)


SEEING = {family.__name__: family for family in (qwen2_5_vl, qwen3_vl, mistral3)}


def write_seeing(folder: Path, family: str) -> torch.nn.Module:
    """A random model of a family with all that a server reads."""
    from transformers import AutoModelForImageTextToText

    config, processor, place = SEEING[family]()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # Layers of vision are wide enough as they are: a picture is to be seen, not to
                # drown the text.
                parameter.copy_(torch.randn_like(parameter) * (0.1 if "vis" in name else 0.3))
    model.save_pretrained(folder)
    letters = tokenizer()
    letters.chat_template = TEMPLATE.replace("PLACE", place)
    made = processor(letters)
    made.chat_template = letters.chat_template
    made.save_pretrained(folder)
    return model.eval()


def picture(seed: int, width: int = 140, height: int = 112) -> str:
    """A picture of random squares, as a data URL."""
    from PIL import Image

    squares = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(squares).resize((width, height), Image.Resampling.NEAREST).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def decoded(url: str) -> Any:
    """The picture of a data URL."""
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
