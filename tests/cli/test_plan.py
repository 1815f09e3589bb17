"""`specontext plan`: its figures are the memory model's, and bad input is named."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.shapes import Shape
from specontext_vllm import draft_plan, planning
from specontext_vllm.cli import app
from specontext_vllm.config import ConfigError, SpeContextConfig
from specontext_vllm.distillation.teacher import TeacherError, read_config
from specontext_vllm.engine.draft_length import StepBytes, best_length, gain
from specontext_vllm.other_layers import OtherLayers, States, other_layers
from specontext_vllm.residency.memory_model import KVShape, MemoryModel
from specontext_vllm.retrieval.cache import HeadCache
from specontext_vllm.retrieval.checkpoint import dummy_checkpoint
from tests.engine.families import gemma4, granite_hybrid, qwen3_next

GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Shape.named("8b").write(tmp_path_factory.mktemp("model"))


def run(*arguments, columns=200):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": str(columns)})


def test_the_model_is_read_from_its_config(folder):
    shape = Shape.named("8b")
    for path in (folder, folder / "config.json"):
        model = planning.read_model(path)
        assert (
            model.kv.num_layers,
            model.kv.num_kv_heads,
            model.kv.head_dim,
            model.kv.itemsize,
        ) == (32, 8, 128, 2)
        embedding = 2 * shape.vocab_size * shape.hidden_size
        assert (
            model.weight_bytes == shape.weight_bytes + embedding and model.max_model_len == 131072
        )
    small_kv = planning.read_model(folder, "fp8").kv
    assert small_kv == replace(model.kv, itemsize=1) and model.kv.retriever_page_bytes > 0
    head = dummy_checkpoint(
        hidden_size=64,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rope_theta=1e4,
        max_position=100,
        dtype=torch.bfloat16,
        seed=0,
    )
    small = dict(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        vocab_size=32,
        max_position_embeddings=100,
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        torch_dtype="bfloat16",
    )
    (folder / "small").mkdir()
    (folder / "small" / "config.json").write_text(json.dumps(small))
    model = planning.read_model(folder / "small")
    assert model.kv.retriever_page_bytes == HeadCache.bytes_per_block(
        2, 16, 64, torch.bfloat16, torch.float8_e4m3fn
    )
    assert model.head_bytes == pytest.approx(
        sum(tensor.nbytes for tensor in head.tensors.values()), rel=0.02
    )  # norms are left out


def test_the_tables_are_the_engines_numbers(folder, tmp_path):
    out = tmp_path / "deep" / "plan.png"
    result = run(
        "--model",
        folder,
        "--gpu-gib",
        80,
        "--host-gib",
        128,
        "--requests",
        20,
        "--length",
        65536,
        "--out",
        out,
    )
    assert result.exit_code == 0, result.output
    model = planning.read_model(folder)
    room = (
        int(planning.UTILIZATION * 80 * GIB)
        - model.weight_bytes
        - model.head_bytes
        - planning.ACTIVATIONS
    )
    memory = MemoryModel(
        model.kv,
        budget_pages=128,
        table_pages=128,
        max_num_seqs=20,
        max_model_len=65536,
        captured_rows=40,
    )
    plan = memory.plan(room, 128 * GIB)
    assert (
        f"{plan.num_pages * 16:,}" in result.output and f"{plan.host_layers} of 32" in result.output
    )
    assert "tables, for vLLM's default graphs of up to 40 rows" in result.output
    for tokens in memory.thresholds(plan, 20):
        assert f"{tokens:,}" in result.output
    assert out.read_bytes()[:4] == b"\x89PNG" and str(out) in result.output


def test_rows_follow_the_time_law(folder):
    model = planning.read_model(folder)
    made = planning.make_plan(
        model,
        SpeContextConfig(budget=2048),
        gpu_bytes=40 * GIB,
        host_bytes=100 * GIB,
        requests=20,
        max_model_len=40960,
        miss_rate=0.1,
        link_bytes_per_s=50e9,
    )
    offloading = [row for row in made.rows if row.get("resident", 32) < 32]
    assert offloading and made.rows[0]["resident"] == 32 and made.rows[0]["moved_mb"] == 0
    for row in offloading:
        moved = (32 - row["resident"]) * 20 * 128 * 0.1 * model.kv.page_bytes
        assert row["moved_mb"] == pytest.approx(moved / 1e6) and row[
            "transfer_ms"
        ] == pytest.approx(1e3 * moved / 50e9)
        assert (
            row["step_ms"] == max(row["compute_ms"], row["transfer_ms"])
            and row["dense_ms"] > row["compute_ms"]
        )


@pytest.mark.parametrize("columns", [80, 40])
def test_no_figure_is_cut_on_a_narrow_terminal(folder, columns):
    narrow, wide = (
        run("--model", folder, "--gpu-gib", 80, "--host-gib", 256, columns=width)
        for width in (columns, 300)
    )
    assert "131,072" in narrow.output and "\u2026" not in narrow.output
    assert [word for word in narrow.output.split() if word[0].isdigit()] == [
        word for word in wide.output.split() if word[0].isdigit()
    ]
    assert columns < 80 or max(map(len, narrow.output.splitlines())) <= 80


def test_a_picture_is_drawn_when_it_is_asked_for(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("--model", folder, "--gpu-gib", 80, "--host-gib", 128)
    assert result.exit_code == 0 and "Picture" not in result.output and not list(tmp_path.iterdir())


def test_without_a_host_pool_nothing_is_said_of_what_only_two_tiers_have(folder, tmp_path):
    result = run("--model", folder, "--gpu-gib", 80, "--out", tmp_path / "plan.png")
    assert result.exit_code == 0 and "tokens that fit" in result.output
    tables = result.output.split("Picture: ")[0]
    assert not any(
        word in tables for word in ("hot buffer", "host", "mirror", "staging", "PCIe", "transfer")
    )


def test_the_longest_context_is_vllms(folder, tmp_path):
    """vLLM multiplies max_position_embeddings by some kinds' factor, and not by others'."""
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 4096}
    scalings = {
        "linear": ({"rope_type": "linear", "factor": 4.0}, 16384),
        "yarn": ({"rope_type": "yarn", "factor": 4.0}, 4096),
        "none": (None, 4096),
    }
    for name, (scaling, longest) in scalings.items():
        config["rope_parameters"] = {"rope_theta": 1e4, **(scaling or {"rope_type": "default"})}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert planning.read_model(tmp_path).max_model_len == longest, name


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--gpu-gib", 12], "--gpu-gib: 92% of 12.0 GiB do not hold the weights"),
        (["--gpu-gib", 80, "--budget", 32], "budget: found 32"),
        (["--gpu-gib", 24, "--requests", 1024], "--requests: 1024 requests of"),
    ],
)
def test_bad_input_is_named(folder, arguments, named):
    result = run("--model", folder, *arguments)
    assert result.exit_code == 2 and named in result.output, result.output


def test_of_more_requests_than_have_hot_buffers_it_says_how_many_run(folder):
    result = run("--model", folder, "--gpu-gib", 24, "--host-gib", 80, "--requests", 1024)
    assert result.exit_code == 0
    assert " ".join(result.output.split()).count(" of 1024 ") == 1, result.output


def test_a_folder_without_a_model(tmp_path):
    result = run("--model", tmp_path, "--gpu-gib", 80)
    assert result.exit_code == 2 and "holds no config.json" in result.output
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model"}')
    result = run("--model", tmp_path, "--gpu-gib", 80)
    assert result.exit_code == 2 and "not that of a causal language model" in result.output, (
        result.output
    )


def test_a_broken_value_is_named_with_what_is_wrong(tmp_path):
    """transformers says it on a second line."""
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": "many"}')
    result = run("--model", tmp_path, "--gpu-gib", 80)
    assert result.exit_code == 2 and "expected int, got str (value: 'many')" in result.stderr
    with pytest.raises(TeacherError, match=r"expected int, got str \(value: 'many'\)\); download"):
        read_config(tmp_path)


def test_models_that_the_engine_refuses_are_not_planned(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 1024,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("--model", tmp_path, "--gpu-gib", 80)
    assert result.exit_code == 2 and "windows or states in every" in result.output, result.output
    (tmp_path / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
    assert run("--model", tmp_path, "--gpu-gib", 80, "--out", tmp_path / "plan.png").exit_code == 0


def test_layers_with_windows_keep_and_are_read_as_many_tokens(folder, tmp_path):
    """By hand: every second layer of 32 reads its newest 1,000 tokens, in 63 or 64 pages."""
    kinds = ["sliding_attention", "full_attention"] * 16
    changes = {"layer_types": kinds, "sliding_window": 1000, "model_type": "mistral"}
    config = json.loads((folder / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    dense, model = planning.read_model(folder), planning.read_model(tmp_path)
    page = 8 * 16 * 2 * 128 * 2
    assert (model.kv.num_layers, model.kv.page_bytes) == (16, page)
    assert model.others == OtherLayers(16, 16, 1000, page)
    options = dict(
        gpu_bytes=60 * GIB,
        host_bytes=0,
        requests=4,
        max_model_len=32768,
        miss_rate=None,
        link_bytes_per_s=50e9,
    )
    config = SpeContextConfig(budget=2048)
    made = planning.make_plan(model, config, **options)
    whole = planning.make_plan(dense, config, **options)
    assert made.kv_bytes == whole.kv_bytes - 4 * 16 * 64 * page
    row = next(row for row in made.rows if row["length"] == 16384)
    assert row["full_share"] == pytest.approx(1024 / (1024 + 64))
    beside = next(row for row in whole.rows if row["length"] == 16384)
    saved = 4 * 16 * (1024 - 64) * page
    assert beside["full_share"] == 1
    assert beside["dense_ms"] - row["dense_ms"] == pytest.approx(1e3 * saved / 4.3e12)
    # Sparse layers read 128 pages, the others their window's.
    saved = 4 * 16 * (128 - 64) * page
    assert beside["compute_ms"] - row["compute_ms"] == pytest.approx(1e3 * saved / 4.3e12)
    result = run("--model", tmp_path, "--gpu-gib", 60, "--requests", 4, columns=80)
    assert "16 of 32" in result.output and "94%" in result.output, result.output
    assert all(len(line) <= 80 for line in result.output.splitlines())
    # Beside two tiers the windows have blocks for twice as much, which are no longer shared.
    tiered = planning.make_plan(model, config, **options | {"host_bytes": 10 * GIB})
    assert tiered.kv_bytes == whole.kv_bytes - 2 * 4 * 16 * 64 * page


def test_states_and_their_blocks_by_hand(tmp_path):
    """Three linear layers to one of full attention, in bfloat16."""
    qwen3_next().save_pretrained(tmp_path)
    model = planning.read_model(tmp_path)
    size = 2 * (3 * (2 * 2 * 128 + 4 * 128) + 4 * 128 * 128)
    # 536 tokens' keys and values of two heads of 32; in pages of 16 they are 544.
    token, tokens = 2 * 2 * 32 * 2, 544
    assert 535 * token < size <= 536 * token
    assert model.others == OtherLayers(3, states=States(3, size, 2, tokens, 1, 3, tokens * token))
    assert planning.read_model(tmp_path, prefix_caching=False).others.states.kept == 1
    assert planning.read_model(tmp_path, "fp8").others.states.block_tokens == 1072
    options = dict(gpu_bytes=3 * GIB, requests=4, max_model_len=1024, miss_rate=None)
    made = planning.make_plan(
        model, SpeContextConfig(budget=128), host_bytes=0, link_bytes_per_s=5e10, **options
    )
    # Requests have two blocks of each of three groups, with the head's caches of a block.
    room = int(0.92 * 3 * GIB) - model.weight_bytes - model.head_bytes - planning.ACTIVATIONS
    block = tokens * token + tokens // 16 * model.kv.retriever_page_bytes
    assert made.kv_bytes == room - 4 * 2 * 3 * block
    assert made.tiers.num_pages == tokens // 16 * (made.kv_bytes // block)
    (row,) = (row for row in made.rows if row["length"] == 1024)
    assert row["full_share"] == pytest.approx(1024 * token / (1024 * token + 3 * size))
    # States are read and written in each step, dense or not.
    read = model.weight_bytes + model.head_bytes + 4 * (1024 * token + 2 * 3 * size)
    assert row["dense_ms"] == pytest.approx(1.7 + 1e3 * read / 4.3e12)
    assert row["dense_ms"] - row["compute_ms"] == pytest.approx(
        4e3 * (1024 * token - 128 * token - 64 * model.kv.retriever_page_bytes) / 4.3e12
    )
    result = run("--model", tmp_path, "--gpu-gib", 3, "--requests", 4, "--length", 1024)
    for text in (f"{3 * size / 2**20:.2f} MiB", "544", "1 of 4", "states of 3 layers, 4 requests"):
        assert text in result.output, result.output


def test_two_tiers_and_states_have_blocks_of_their_own(tmp_path):
    granite_hybrid().save_pretrained(tmp_path)
    model = planning.read_model(tmp_path, prefix_caching=False)
    states = model.others.states
    options = dict(gpu_bytes=int(2.2 * GIB), requests=3, max_model_len=1024, miss_rate=None)
    made, alone = (
        planning.make_plan(
            model,
            SpeContextConfig(budget=128),
            host_bytes=host,
            link_bytes_per_s=5e10,
            **options,
        )
        for host in (GIB // 50, 0)
    )
    assert (states.group_layers, states.groups, states.kept) == (2, 1, 1)
    # One of a request, twice those of three more, and vLLM's null block.
    apart = (1 + 1 + 2 * 3) * states.block_bytes
    held = 3 * (states.block_bytes + model.block_pages * model.kv.retriever_page_bytes)
    assert made.kv_bytes - alone.kv_bytes == held - apart
    assert made.alone.num_pages == alone.tiers.num_pages < made.tiers.num_pages
    assert made.tiers.num_pages % model.block_pages == 0
    arguments = ("--model", tmp_path, "--gpu-gib", 2.2, "--length", 1024, "--requests", 3)
    result = run(*arguments, "--host-gib", 0.02, "--budget", 128, "--no-enable-prefix-caching")
    assert f"{made.tiers.num_pages * 16:,}" in result.output, result.output


@pytest.mark.parametrize(
    ("full", "states", "group", "empty"),
    [(4, 36, 4, 0), (4, 5, 5, 1), (7, 3, 3, 2), (4, 4, 4, 0)],
)
def test_groups_of_layers_are_vllm_s(full, states, group, empty):
    """The smaller number of layers, or the larger where it is less than half as much again."""
    text = granite_hybrid()
    text.num_hidden_layers = full + states
    text.layer_types = ["full_attention"] * full + ["linear_attention"] * states
    found = other_layers(text, full, torch.bfloat16, 2)
    assert (found.states.group_layers, found.states.groups) == (group, -(-states // group))
    kv = KVShape(full, 2, 32, 2, retriever_page_bytes=1000)
    model = planning.Model(kv, 0, 0, 1024, found)
    more = -(-full // group) - 1
    assert model.empty_page_bytes == empty * kv.page_bytes + more * 1000


def test_what_an_engine_refuses_beside_states_is_not_planned(folder, tmp_path):
    qwen3_next().save_pretrained(tmp_path)
    model = planning.read_model(tmp_path)
    options = dict(
        gpu_bytes=4 * GIB,
        requests=4,
        max_model_len=1024,
        miss_rate=None,
        link_bytes_per_s=50e9,
    )
    sparse, lossless = (SpeContextConfig(budget=128, mode=mode) for mode in ("sparse", "lossless"))
    windows = replace(model, others=replace(model.others, windowed=2, window=64, page_bytes=1))
    unknown = replace(model, others=OtherLayers(3, unknown=3))
    drafter = draft_plan.Drafter(1, 1, 2, 32)
    for planned_model, config, host, drafts, sentence in (
        (model, lossless, 0, None, "--mode: found lossless, but 3 layers of this model keep a st"),
        (model, sparse, 0, drafter, "--drafter: found a folder, but 3 layers of this model keep"),
        (windows, sparse, GIB, None, "--host-gib: found 1, but 3 layers .* beside 2 with windows"),
        (unknown, sparse, GIB, None, "--host-gib: found 1, but 3 layers .* does not know"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            planning.make_plan(planned_model, config, host_bytes=host, drafter=drafts, **options)
    assert planning.make_plan(unknown, sparse, host_bytes=0, **options).tiers.num_pages


def test_the_heads_are_those_of_layers_of_full_attention(tmp_path):
    gemma4(readers=0).save_pretrained(tmp_path)
    model = planning.read_model(tmp_path)
    assert (model.kv.num_layers, model.kv.num_kv_heads, model.kv.head_dim) == (3, 2, 64)
    assert model.others.page_bytes == model.kv.page_bytes // 2 and not model.readers


def test_layers_that_read_the_kv_of_another_one_keep_none(tmp_path):
    """By hand: the last four of ten layers, of which two have a window."""
    dense, shared = tmp_path / "dense", tmp_path / "shared"
    gemma4(pairs=5, readers=0).save_pretrained(dense)
    gemma4(pairs=5, readers=4).save_pretrained(shared)
    whole, model = planning.read_model(dense), planning.read_model(shared)
    assert (model.kv.num_layers, model.readers, model.read) == (3, 2, whole.kv)
    others = model.others
    assert (others.count, others.windowed, others.readers, others.unknown) == (5, 3, 2, 0)
    assert others.read_bytes(1024) == whole.others.kv_bytes(1024) == whole.others.read_bytes(1024)
    assert 5 * others.kv_bytes(1024) == 3 * others.read_bytes(1024)
    options = {
        "gpu_bytes": 3 * GIB,
        "host_bytes": 0,
        "requests": 4,
        "max_model_len": 1024,
        "miss_rate": None,
        "link_bytes_per_s": 50e9,
    }
    config = SpeContextConfig(budget=256)
    made = planning.make_plan(model, config, **options)
    beside = planning.make_plan(replace(whole, weight_bytes=model.weight_bytes), config, **options)
    for row, other in zip(made.rows, beside.rows, strict=True):
        assert row["dense_ms"] == other["dense_ms"] and row["compute_ms"] == other["compute_ms"]
        assert row["gpu_gib"] == pytest.approx(0.6 * other["gpu_gib"])
    result = run("--model", shared, "--gpu-gib", 3, "--length", 1024)
    assert "layers that read the KV of another one" in result.output, result.output
    assert "5 of 10" in result.output


def test_lossless_mode_is_planned_by_the_schedulers_own_choice(folder):
    made = planned(folder, mode="lossless", requests=24)
    read = StepBytes(
        made.model.weight_bytes + made.model.head_bytes,
        32 * made.model.kv.page_bytes / 16,
        made.model.kv.retriever_page_bytes / 16,
        2048,
    )
    assert made.lossless is not None
    for acceptance, choices in made.lossless.choices.items():
        for length, (drafts, times) in zip(made.lossless.lengths, choices, strict=True):
            share = read.sparse_share([length] * 24)
            assert drafts == best_length(acceptance, share)
            assert times == gain(drafts, acceptance, share)
        start = made.lossless.starts[acceptance]
        assert start is not None and 2048 < start < 32768 and start % 16 == 0
        for length, pays in ((start - 16, False), (start, True), (start + 16, True)):
            share = read.sparse_share([length] * 24)
            assert (best_length(acceptance, share) > 0) == pays
    assert list(made.lossless.starts.values()) == sorted(
        made.lossless.starts.values(), reverse=True
    )
    # A few tokens of one request: its steps are weights.
    assert planned(folder, mode="lossless", requests=1, length=4096).lossless.starts[0.9] is None
    result = run("--model", folder, "--gpu-gib", 141, "--requests", 24, "--mode", "lossless")
    assert result.exit_code == 0, result.output
    assert f"{made.lossless.starts[0.8]:,}" in result.output
    drafts, times = made.lossless.choices[0.9][-1]
    assert f"{times:.2f} ({drafts})" in result.output


def test_a_drafters_weights_and_kv_are_counted(folder, tmp_path):
    from benchmarks.drafts.head import write_eagle3

    head = write_eagle3(Shape.named("tiny"), tmp_path)
    drafter = draft_plan.read_drafter(head)
    file = head / "model.safetensors"
    assert drafter == draft_plan.Drafter(file.stat().st_size, 1, 2, 32)
    alone, both = planned(folder), planned(folder, drafter=drafter)
    page = 2 * 16 * 2 * 32 * 2
    assert both.tiers.parts["drafter's KV"] == both.tiers.num_pages * page
    assert both.kv_bytes == alone.kv_bytes - file.stat().st_size
    assert both.tiers.num_pages < alone.tiers.num_pages
    options = ("--model", folder, "--gpu-gib", 80, "--requests", 4, "--length", 32768)
    result = run(*options, "--drafter", head)
    assert "drafter's KV" in result.output and f"{both.tiers.num_pages * 16:,}" in result.output
    file.unlink()
    result = run(*options, "--drafter", head)
    assert result.exit_code == 2 and "--drafter: " in result.output
    assert "holds no *.safetensors and no *.bin" in result.output


def planned(folder, *, mode="sparse", requests=4, length=32768, drafter=None):
    return planning.make_plan(
        planning.read_model(folder),
        SpeContextConfig(budget=2048, mode=mode),
        gpu_bytes=(80 if mode == "sparse" else 141) * GIB,
        host_bytes=0,
        requests=requests,
        max_model_len=131072 if mode == "lossless" and length == 32768 else length,
        miss_rate=None,
        link_bytes_per_s=50e9,
        drafter=drafter,
    )
