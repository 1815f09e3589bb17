import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from specontext_vllm.retrieval.checkpoint import HeadError, dummy_checkpoint, read_checkpoint
from specontext_vllm.retrieval.head import RetrievalHead
from specontext_vllm.retrieval.rope import apply_rope, rope_parameters, rope_table
from tests.retrieval.eagle3_files import Layout, make_tensors, write_checkpoint

LAYOUTS = {
    "safeailab": Layout(),
    "mha": Layout(num_kv_heads=6),
    "mqa": Layout(num_kv_heads=1),
    "other_target_width": Layout(format="specforge", target_hidden_size=56),
    "four_aux_layers": Layout(num_aux=4, config={"eagle_aux_hidden_state_layer_ids": [0, 2, 5, 8]}),
    "qk_norm": Layout(format="speculators", qk_norm=True),
    "bias": Layout(format="speculators", bias=True),
    "norm_before_fc": Layout(format="speculators", norm_before_fc=True),
    "fc_norm": Layout(format="speculators", fc_norm=True),
    "all_of_it": Layout(
        format="speculators", qk_norm=True, bias=True, fc_norm=True, own_embedding=True
    ),
}
EPS = 1e-5


def naive_norm(row, weight):
    """RMSNorm of one vector in plain Python, double precision."""
    mean = sum(value * value for value in row.tolist()) / len(row)
    return (
        torch.tensor([value / math.sqrt(mean + EPS) for value in row.tolist()], dtype=torch.float64)
        * weight.double()
    )


def naive_rope(vector, position, theta=10_000.0):
    """Rotates pair (i, i + D/2) of one vector by position * theta^(-2i/D)."""
    half, out = len(vector) // 2, vector.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / len(vector))
        cos, sin = math.cos(angle), math.sin(angle)
        out[i] = vector[i] * cos - vector[half + i] * sin
        out[half + i] = vector[half + i] * cos + vector[i] * sin
    return out


def naive_head(layout, aux, embeds, positions):
    """(fused, q, k), token by token and head by head, from the file's own tensors."""
    t = make_tensors(layout)
    block = "layers.0." if layout.format == "speculators" else "midlayer."
    fused, q, k = [], [], []
    for n, position in enumerate(positions.tolist()):
        states = [state[n].double() for state in aux]
        if layout.fc_norm:
            states = [naive_norm(state, t[f"fc_norm.{i}.weight"]) for i, state in enumerate(states)]
        feature = torch.cat(states)
        if layout.norm_before_fc:
            feature = naive_norm(feature, t["input_norm.weight"])
        feature = t["fc.weight"].double() @ feature
        x = torch.cat(
            (
                naive_norm(embeds[n].double(), t[block + "input_layernorm.weight"]),
                naive_norm(feature, t[block + "hidden_norm.weight"]),
            )
        )
        fused.append(feature)
        for kind, heads, rows in (("q", layout.num_heads, q), ("k", layout.num_kv_heads, k)):
            y = t[f"{block}self_attn.{kind}_proj.weight"].double() @ x
            if layout.bias:
                y = y + t[f"{block}self_attn.{kind}_proj.bias"].double()
            rows.append([])
            for head in y.split(layout.head_dim):
                if layout.qk_norm:
                    head = naive_norm(head, t[f"{block}self_attn.{kind}_norm.weight"])
                rows[-1].append(naive_rope(head, position))
        assert len(q[-1]) == layout.num_heads
    return (
        torch.stack(fused),
        torch.stack([torch.stack(r) for r in q]),
        torch.stack([torch.stack(r) for r in k]),
    )


def make_inputs(layout, tokens, seed=5):
    generator = torch.Generator().manual_seed(seed)
    aux = [
        3 * torch.randn(tokens, layout.target_width, generator=generator)
        for _ in range(layout.num_aux)
    ]
    embeds = 0.02 * torch.randn(tokens, layout.hidden_size, generator=generator)
    positions = torch.randint(0, 64, (tokens,), generator=generator)
    return aux, embeds, positions


def make_head(tmp_path, layout, dtype=torch.float32, max_position=64):
    checkpoint = read_checkpoint(write_checkpoint(tmp_path, layout))
    return RetrievalHead(checkpoint, max_position=max_position, dtype=dtype, device="cpu")


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_fuse_and_project_match_the_loops(tmp_path, layout, tokens):
    head = make_head(tmp_path, layout)
    aux, embeds, positions = make_inputs(layout, tokens)
    want_fused, want_q, want_k = naive_head(layout, aux, embeds, positions)
    fused = head.fuse(aux)
    q, k = head.project(embeds, fused, positions)
    assert q.shape == (tokens, layout.num_heads, layout.head_dim)
    assert k.shape == (tokens, layout.num_kv_heads, layout.head_dim)
    for got, want in ((fused, want_fused), (q, want_q), (k, want_k)):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_keys_are_projects_keys(tmp_path, layout):
    head = make_head(tmp_path, layout)
    aux, embeds, positions = make_inputs(layout, 13)
    fused = head.fuse(aux)
    torch.testing.assert_close(
        head.keys(embeds, fused, positions), head.project(embeds, fused, positions)[1]
    )


def test_bfloat16_stays_near_float32(tmp_path):
    layout = LAYOUTS["all_of_it"]
    exact, rounded = make_head(tmp_path, layout), make_head(tmp_path, layout, torch.bfloat16)
    aux, embeds, positions = make_inputs(layout, 9)
    want = exact.project(embeds, exact.fuse(aux), positions)
    fused = rounded.fuse([state.bfloat16() for state in aux])
    got = rounded.project(embeds.bfloat16(), fused, positions)
    assert fused.dtype == torch.bfloat16
    for a, b in zip(got, want):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).norm() / b.norm() < 2e-2


def test_norm_rounds_where_llama_does(tmp_path):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    head = make_head(tmp_path, Layout(), torch.bfloat16)
    norm = LlamaRMSNorm(40, eps=EPS).to(torch.bfloat16)
    norm.weight.data = head.embed_norm.data
    x = torch.randn(11, 40, dtype=torch.bfloat16)
    assert torch.equal(head._norm(x, head.embed_norm), norm(x))


def test_embed(tmp_path):
    layout = Layout(own_embedding=True)
    head = make_head(tmp_path, layout)
    ids = torch.tensor([0, 76, 3])
    assert torch.equal(head.embed(ids), make_tensors(layout)["embed_tokens.weight"][ids])


def test_embed_without_a_table_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="pass the target's embeddings"):
        make_head(tmp_path, Layout()).embed(torch.tensor([1]))


def test_wrong_number_of_hidden_states_is_refused(tmp_path):
    with pytest.raises(ValueError, match="reads 3 auxiliary hidden states and was given 2"):
        make_head(tmp_path, Layout()).fuse([torch.zeros(1, 40)] * 2)


def test_weights_are_frozen_fused_and_counted(tmp_path):
    layout = LAYOUTS["all_of_it"]
    head = make_head(tmp_path, layout, torch.bfloat16)
    assert not any(parameter.requires_grad for parameter in head.parameters())
    assert head.queries_and_keys.weight.shape == ((6 + 3) * 10, 80)
    q_norms, k_norms = 6 * 10, 3 * 10
    values = 40 * 120 + 3 * 40 + 2 * 40 + 90 * 80 + 90 + q_norms + k_norms + 77 * 40
    assert head.num_bytes == 2 * values


def test_dummy_head_is_of_order_one():
    checkpoint = dummy_checkpoint(
        hidden_size=128,
        num_layers=6,
        num_heads=8,
        num_kv_heads=2,
        head_dim=16,
        rope_theta=1e4,
        max_position=50,
        dtype=torch.float32,
        seed=0,
    )
    head = RetrievalHead(checkpoint, max_position=50, dtype=torch.float32, device="cpu")
    aux = [torch.randn(31, 128) for _ in range(3)]
    q, k = head.project(torch.randn(31, 128), head.fuse(aux), torch.arange(31))
    assert 0.5 < q.std() < 2 and 0.5 < k.std() < 2


# Rotary table: against transformers' LlamaRotaryEmbedding, which builds its angles by its own path.


def llama_rotary(spec, parameters, q, k, positions):
    config = LlamaConfig(
        hidden_size=spec.num_heads * spec.head_dim,
        num_attention_heads=spec.num_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.trained_length,
        rope_parameters=dict(parameters),
    )
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    rotated = apply_rotary_pos_emb(q[None].transpose(1, 2), k[None].transpose(1, 2), cos, sin)
    return [x.transpose(1, 2)[0] for x in rotated]


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}
OWN_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SCALINGS = {
    "within_training": (None, 63, {"rope_type": "default"}),
    "at_the_trained_length": (None, 64, {"rope_type": "default"}),
    "yarn_just_beyond": (
        None,
        65,
        {"rope_type": "yarn", "factor": 65 / 64, "original_max_position_embeddings": 64},
    ),
    "yarn_far_beyond": (
        None,
        1999,
        {"rope_type": "yarn", "factor": 1999 / 64, "original_max_position_embeddings": 64},
    ),
    "own_linear": (
        {"rope_type": "linear", "factor": 4.0},
        500,
        {"rope_type": "linear", "factor": 4.0},
    ),
    "own_llama3": (LLAMA3, 500, LLAMA3),
    "own_yarn": (OWN_YARN, 500, OWN_YARN),
    "own_yarn_attention_factor": (
        OWN_YARN | {"attention_factor": 1.25},
        500,
        OWN_YARN | {"attention_factor": 1.25},
    ),
}


@pytest.mark.parametrize("scaling, max_position, expected", SCALINGS.values(), ids=SCALINGS)
def test_rotary_matches_transformers(tmp_path, scaling, max_position, expected):
    layout = Layout(config={"rope_theta": 50_000.0})
    checkpoint = read_checkpoint(write_checkpoint(tmp_path, layout))
    spec = replace(checkpoint.spec, rope_scaling=scaling)
    head = RetrievalHead(
        replace(checkpoint, spec=spec), max_position=max_position, dtype=torch.float32, device="cpu"
    )
    expected = expected | {"rope_theta": 50_000.0}
    assert rope_parameters(spec, max_position) == expected
    positions = torch.tensor([0, 1, 17, max_position // 2, max_position - 1])
    q, k = torch.randn(5, 6, 10), torch.randn(5, 3, 10)
    want_q, want_k = llama_rotary(spec, expected, q, k, positions)
    got = apply_rope(torch.cat((q, k), dim=1), head.cos_sin, positions)
    torch.testing.assert_close(got[:, :6], want_q, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[:, 6:], want_k, rtol=1e-5, atol=1e-5)


def test_yarn_attention_factor_is_in_the_table(tmp_path):
    spec = read_checkpoint(write_checkpoint(tmp_path, Layout())).spec
    table = rope_table(spec, 640, "cpu")
    assert table.shape == (640, 10) and table.dtype == torch.float32
    mscale = 0.1 * math.log(10) + 1  # YaRN paper, equation 22
    torch.testing.assert_close(table[0, :5], torch.full((5,), mscale))


def test_yarn_extrapolates_fast_pairs_and_interpolates_slow_ones(tmp_path):
    spec = replace(
        read_checkpoint(write_checkpoint(tmp_path, Layout())).spec, head_dim=64, trained_length=2048
    )
    plain = 10_000.0 ** (-torch.arange(0, 64, 2) / 64)
    table = rope_table(spec, 8 * 2048, "cpu")
    angles = torch.atan2(table[1, 32:], table[1, :32])
    torch.testing.assert_close(angles[:8], plain[:8])
    torch.testing.assert_close(angles[-4:], plain[-4:] / 8)


LONGROPE = {
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0],
    "factor": 8.0,
}
OLDER_NAMES = {
    "mrope": ({"type": "mrope", "mrope_section": [2, 2, 1]}, {}),
    "su": (
        {"type": "su", "original_max_position_embeddings": 16} | LONGROPE,
        {"rope_type": "longrope", "original_max_position_embeddings": 16} | LONGROPE,
    ),
}


@pytest.mark.parametrize("older, today", OLDER_NAMES.values(), ids=OLDER_NAMES)
def test_a_type_under_its_older_name_gives_the_table_of_todays(tmp_path, older, today):
    tables = []
    for settings in (older, today):
        spec = read_checkpoint(
            write_checkpoint(
                tmp_path, Layout(config={"rope_scaling": settings, "max_position_embeddings": 128})
            )
        ).spec
        tables.append(rope_table(spec, 128, "cpu"))
    assert torch.equal(*tables)


def test_the_original_length_may_stand_beside_the_scaling(tmp_path):
    """As in Phi-3's configs; transformers puts it before what stands within."""
    within = {"rope_type": "longrope", "original_max_position_embeddings": 16} | LONGROPE
    tables = []
    for config in (
        {"rope_scaling": within},
        {
            "rope_scaling": within | {"original_max_position_embeddings": 999},
            "original_max_position_embeddings": 16,
        },
    ):
        tables.append(
            rope_table(
                read_checkpoint(write_checkpoint(tmp_path, Layout(config=config))).spec, 128, "cpu"
            )
        )
    assert torch.equal(*tables)


@pytest.mark.parametrize(
    "scaling, sentence",
    [
        pytest.param({"rope_type": "spiral"}, "knows only dynamic, linear", id="unknown"),
        pytest.param(
            {"rope_type": "linear"},
            "No rotary angles can be made with .*Missing required keys.*factor",
            id="incomplete",
        ),
    ],
)
def test_unusable_scaling_is_refused(tmp_path, scaling, sentence):
    spec = replace(read_checkpoint(write_checkpoint(tmp_path, Layout())).spec, rope_scaling=scaling)
    with pytest.raises(HeadError, match=sentence):
        rope_table(spec, 100, "cpu")


@pytest.mark.parametrize("is_same", [True, False], ids=["the drafter's", "of another training"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_matrices_that_a_drafter_has_are_views_of_its_own(tmp_path, layout, is_same):
    """Of a drafter's fc, and of its projection of queries, keys and values the first rows."""
    alone = make_head(tmp_path, layout)
    fc, qk = alone.fc_weight.detach().clone(), alone.queries_and_keys.weight
    qkv = torch.cat((qk, torch.randn(9, qk.shape[1])))
    if not is_same:
        fc[-1, -1] += 1e-3
        qkv[len(qk) - 1, 0] += 1e-3
    drafter = [torch.ones(4), qkv[:3].clone(), fc[:, 1:].clone(), fc, qkv]
    checkpoint = read_checkpoint(tmp_path)
    head = RetrievalHead(
        checkpoint, max_position=64, dtype=torch.float32, device="cpu", others=drafter
    )
    assert head.shared_bytes == (fc.nbytes + qk.nbytes if is_same else 0)
    assert head.num_bytes == alone.num_bytes
    places = head.fc_weight.data_ptr(), head.queries_and_keys.weight.data_ptr()
    assert (places == (fc.data_ptr(), qkv.data_ptr())) is is_same
    aux, embeds, positions = make_inputs(layout, 5)
    for got, want in zip(
        head.project(embeds, head.fuse(aux), positions),
        alone.project(embeds, alone.fuse(aux), positions),
        strict=True,
    ):
        assert torch.equal(got, want)
