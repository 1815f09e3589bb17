"""Where the kernels come from, what is said where they are missing, and what tracing sees."""

from __future__ import annotations

import shutil

import pytest
import torch

from specontext_vllm import cpu_kernels
from specontext_vllm.config import PAGE_SIZE


def test_the_kernels_are_built_where_there_is_a_compiler():
    if shutil.which("c++") is None or torch.version.cuda:
        pytest.skip("no C++ compiler, or a build of torch for GPUs")
    assert cpu_kernels.why_not() is None, "run: python setup.py build_ext --inplace"


def reason(monkeypatch, **patches):
    for name, value in patches.items():
        monkeypatch.setattr(cpu_kernels, name, value)
    return cpu_kernels.why_not.__wrapped__()


def test_the_switch_turns_them_off(monkeypatch):
    monkeypatch.setenv(cpu_kernels.SWITCH, "0")
    assert reason(monkeypatch).startswith("SPECONTEXT_CPU_KERNELS: found 0, so ")


def test_a_missing_library_is_said_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv(cpu_kernels.SWITCH, raising=False)
    (tmp_path / "avx512-torch1_0.so").touch()  # Of another torch.
    said = reason(monkeypatch, FOLDER=tmp_path)
    assert said.startswith("no C++ kernels for torch ") and "--no-build-isolation" in said


def test_a_broken_library_is_said(monkeypatch, tmp_path):
    monkeypatch.delenv(cpu_kernels.SWITCH, raising=False)
    major, minor = torch.__version__.split(".")[:2]
    (tmp_path / f"default-torch{major}_{minor}.so").write_text("no library")
    said = reason(monkeypatch, FOLDER=tmp_path)
    assert "does not load" in said and "install specontext-vllm from source again" in said


def decode_arguments():
    query, output = torch.randn(2, 4, 32), torch.empty(2, 4, 32)
    pages = torch.randn(6, PAGE_SIZE, 64)
    table = torch.arange(4, dtype=torch.int32).view(4, 1)
    return query, pages, table, torch.tensor([3, 16, 0, 9], dtype=torch.int32), output, 0.2


def test_operators_say_to_torch_what_they_write(ops):
    slots = torch.tensor([3, -1, 40])
    key, cache = torch.randn(3, 2, 32), torch.zeros(4, 2, PAGE_SIZE, 64)
    scores = torch.randn(4, 8)
    lens, starts = torch.tensor([120], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    table = torch.arange(8, dtype=torch.int32)[None]
    pages, lengths = torch.zeros(2, 5, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    nothing, four = (torch.tensor([n], dtype=torch.int32) for n in (0, 4))
    chosen = (pages, lengths, torch.ones(1, 2), 0, 1, four, 1, 1)
    queries, keys = torch.randn(1, 4, 32), torch.randn(8, 2, PAGE_SIZE, 32)
    page_max, page_lse = torch.zeros(4, 8), torch.zeros(4, 8)
    packed = torch.zeros(1, 2, 128, 32)
    rows = (table, lens, starts)
    for name, arguments in {
        "sparse_decode": decode_arguments(),
        "write_kv": (key, key, cache, slots),
        "score_pages": (queries, keys, *rows, page_max, page_lse, 0, 1, nothing, 1, 0),
        "select_pages": (scores, scores, lens, starts, table, *chosen),
        "pack_pages": (cache, table[0, :4], lengths.repeat(2), table[0, :4], packed, False),
    }.items():
        torch.library.opcheck(getattr(ops, name).default, arguments)


def test_a_compiled_function_runs_them(ops):
    query, pages, table, lengths, _, scale = decode_arguments()

    def attend(query):
        output = torch.empty_like(query)
        ops.sparse_decode(query * 2, pages, table, lengths, output, scale)
        return output + 1

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query), attend(query))
