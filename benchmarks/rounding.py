"""Case `rounding`: how far attention and log-probabilities are from float64, ours beside stock
vLLM's, and how many answers part by that.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks import report
from benchmarks.children import ChildError, engine_env, run_child
from benchmarks.machine import gpus
from benchmarks.shapes import DEMO_MODEL
from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.synthetic.tasks import make_problem, random_for, sentence

DTYPES = ("bfloat16", "float16")
KV_HEADS = 2
DECODED = 32
"""Newest tokens of a context that are decoded, each as a request of its own."""
SHARPNESS = 2.0
"""Standard deviation of the random scores: some tokens count, as in a model."""
STOCK_BLOCK = 32
"""Tokens of a block that vLLM's CPU attention reads."""

REPLY = 64
FORCED = 48
"""Tokens of a reply that are forced at most."""
NEAR = 20
"""Likeliest tokens of a step that are recorded: vLLM's own limit."""
MAX_MODEL_LEN = 1536
SINGLY = "stock, one request at a time"
OURS = "specontext, budget over the context"

ONE_LAYER = "One layer's attention: error relative to float64"
TABLES = {
    ONE_LAYER: (
        report.Column("step", "step"),
        report.Column("dtype", "dtype"),
        report.Column("inputs", "queries, keys, values"),
        report.Column("tokens", "tokens", ","),
        report.Column("group", "query heads to a KV head"),
        report.Column("head_dim", "head size"),
        report.Column("ours_rms", "ours, rms", ".2e"),
        report.Column("stock_rms", "stock, rms", ".2e"),
        report.Column("ratio", "ours / stock", ".3f"),
        report.Column("ours_max", "ours, max", ".2e"),
        report.Column("stock_max", "stock, max", ".2e"),
        report.Column("least_rms", "rounded once, at the end", ".2e"),
        report.Column("weights_rms", "and weights rounded, too", ".2e"),
    ),
    "The model: log-probabilities beside those of float64, and answers beside stock's": (
        report.Column("engine", "engine"),
        report.Column("engine_dtype", "dtype"),
        report.Column("prompt_rms", "prompt tokens, rms error", ".2e"),
        report.Column("decode_rms", "decoded tokens, rms error", ".2e"),
        report.Column("prompts", "questions, texts"),
        report.Column("answers", "answers that part from stock's"),
        report.Column("texts", "texts that do"),
        report.Column("gap", "at the parting, stock's two tokens are apart, median", ".4f"),
        report.Column("widest", "at most", ".4f"),
    ),
}


# -- one layer
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One layer's attention: the last N of T tokens look back over all before them and themselves.

    Attributes:
        query: ``[N, KV heads * group, D]``. key, value: ``[T, KV heads, D]``.
        decode: whether each of the N tokens is a request of its own, with one token to decode; else
            they are one prefill.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    decode: bool

    @property
    def scale(self) -> float:
        return self.query.shape[-1] ** -0.5

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    def starts(self) -> Tensor:
        """``[requests + 1]`` int32 offsets of the requests' query tokens."""
        count = len(self.query)
        return torch.arange(
            0, count + 1, 1 if self.decode else count, dtype=torch.int32, device=self.query.device
        )

    def lengths(self) -> Tensor:
        """``[requests]`` int32 context lengths."""
        tokens, count = len(self.key), len(self.query)
        first = tokens - count + 1 if self.decode else tokens
        return torch.arange(first, tokens + 1, dtype=torch.int32, device=self.query.device)

    def blocks(self, size: int) -> tuple[Tensor, Tensor]:
        """Shuffled blocks of ``size`` tokens, ``[blocks, size, KV heads, 2 * D]``, and each
        request's, ``[requests, blocks]`` int32.
        """
        kv = torch.cat([self.key, self.value], -1)
        count = -(-len(kv) // size)
        padded = kv.new_zeros(count * size, *kv.shape[1:])
        padded[: len(kv)] = kv
        places = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(kv.device)
        blocks = torch.empty_like(padded).view(count, size, *kv.shape[1:])
        blocks[places] = padded.view_as(blocks)
        return blocks, places.int().repeat(len(self.lengths()), 1)


def random_layer(
    dtype: torch.dtype, tokens: int, group: int, head_dim: int, decode: bool, device: torch.device
) -> Layer:
    """Random queries, keys and values, the same on every device."""
    generator = torch.Generator().manual_seed(tokens + group + head_dim)
    query = (
        torch.randn(DECODED if decode else tokens, KV_HEADS * group, head_dim, generator=generator)
        * SHARPNESS
    )
    key, value = torch.randn(2, tokens, KV_HEADS, head_dim, generator=generator)
    return Layer(*(part.to(device, dtype) for part in (query, key, value)), decode)


def exact(layer: Layer, weights: torch.dtype | None = None) -> Tensor:
    """``[N, heads, D]`` in float64.

    Args:
        weights: what the softmax's weights (the largest is 1) are rounded to before they are
            multiplied by the values, which attention in 16-bit matrix units does; None: not at all.
    """
    count, tokens = len(layer.query), len(layer.key)
    seen = torch.ones(count, tokens, dtype=torch.bool, device=layer.query.device).tril(
        tokens - count
    )
    out = torch.empty(layer.query.shape, dtype=torch.float64, device=layer.query.device)
    for head in range(layer.key.shape[1]):
        for at in range(head * layer.group, (head + 1) * layer.group):
            scores = layer.query[:, at].double() @ layer.key[:, head].double().T * layer.scale
            scores.masked_fill_(~seen, float("-inf"))
            weight = (scores - scores.amax(-1, keepdim=True)).exp_()
            total = weight.sum(-1, keepdim=True)
            if weights is not None:
                weight = weight.to(weights).double()
            out[:, at] = weight @ layer.value[:, head].double() / total
    return out


def ours(layer: Layer, provider: Callable[..., Any] | None = None) -> Tensor:
    """What the provider chosen for this device makes of it, or the given one (the arguments of
    ``AttentionProvider``).
    """
    from specontext_vllm.attention.provider import PrefillRows
    from specontext_vllm.attention.registry import choose_provider
    from specontext_vllm.step_data import PageTable

    heads, kv_heads, d = layer.query.shape[1], layer.key.shape[1], layer.query.shape[2]
    shape = (heads, kv_heads, d, layer.scale, layer.query.dtype)
    attention = (
        provider(*shape) if provider else choose_provider("auto", *shape, layer.query.device.type)
    )
    blocks, block_table = layer.blocks(PAGE_SIZE)
    cache = blocks.transpose(1, 2).contiguous()
    lengths, output = layer.lengths(), torch.full_like(layer.query, float("nan"))
    if layer.decode:
        rows = len(lengths)
        table = PageTable.allocate(rows, kv_heads, block_table.shape[1], layer.query.device)
        by_head = (
            block_table[:, None] * kv_heads
            + torch.arange(kv_heads, dtype=torch.int32, device=lengths.device)[:, None]
        )
        table.pages.copy_(by_head.flatten(0, 1))
        table.lengths.copy_(lengths.repeat_interleave(kv_heads))
        attention.plan(table, rows)
        attention.decode(layer.query, cache, table, rows, output)
    else:
        starts = layer.starts()
        rows = PrefillRows(
            starts, lengths, block_table, len(layer.query), len(layer.key), starts.tolist()
        )
        attention.prefill(layer.query, cache, rows, output)
    return output


def stock(layer: Layer) -> Tensor:
    """What stock vLLM's default backend makes of it: FlashAttention on a GPU, its C++ kernels on a
    CPU.

    Raises:
        RuntimeError: a GPU for which vLLM has no FlashAttention.
    """
    return _flash_attention(layer) if layer.query.device.type == "cuda" else _cpu_attention(layer)


def _flash_attention(layer: Layer) -> Tensor:
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    from specontext_vllm.attention.flash import flash_attention_version

    version = flash_attention_version(layer.query.shape[-1], layer.query.dtype)
    if version is None:
        raise RuntimeError(
            f"vLLM's FlashAttention does not run {layer.query.dtype} with heads of "
            f"{layer.query.shape[-1]} on this GPU"
        )
    blocks, block_table = layer.blocks(PAGE_SIZE)
    keys, values = (part.contiguous() for part in blocks.chunk(2, -1))
    output = torch.full_like(layer.query, float("nan"))
    flash_attn_varlen_func(
        layer.query,
        keys,
        values,
        out=output,
        max_seqlen_q=1 if layer.decode else len(layer.query),
        cu_seqlens_q=layer.starts(),
        max_seqlen_k=len(layer.key),
        seqused_k=layer.lengths(),
        block_table=block_table,
        causal=True,
        softmax_scale=layer.scale,
        fa_version=version,
    )
    return output


def _cpu_attention(layer: Layer) -> Tensor:
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    current_platform.import_kernels()
    (tokens, kv_heads, d), dtype = layer.key.shape, layer.query.dtype
    isa = _get_attn_isa(dtype, STOCK_BLOCK, d)
    count = -(-tokens // STOCK_BLOCK)
    cache = torch.zeros(count, kv_heads, 2 * STOCK_BLOCK, d, dtype=dtype)
    keys, values = cache.chunk(2, dim=2)
    # The kernels keep an order of their own within a block.
    ops.cpu_attn_reshape_and_cache(
        layer.key,
        layer.value,
        keys,
        values,
        torch.arange(tokens),
        isa,
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype="auto",
    )
    starts, lengths = layer.starts(), layer.lengths()
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(lengths),
        num_heads=layer.query.shape[1],
        num_kv_heads=kv_heads,
        head_dim=d,
        seq_lens=lengths,
        dtype=dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
        dynamic_causal=None,
        kv_cache_dtype="auto",
    )
    output = torch.full_like(layer.query, float("nan"))
    ops.cpu_attention_with_kv_cache(
        query=layer.query,
        key_cache=keys,
        value_cache=values,
        output=output,
        query_start_loc=starts,
        seq_lens=lengths,
        scale=layer.scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=torch.arange(count, dtype=torch.int32).repeat(len(lengths), 1),
        softcap=0,
        scheduler_metadata=schedule,
        s_aux=None,
        dynamic_causal=None,
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype="auto",
    )
    return output


def relative(outputs: Sequence[Tensor], references: Sequence[Tensor]) -> tuple[float, float]:
    """Root mean square and maximum of the error over all layers, each divided by its reference's
    root mean square; NaN stays NaN.
    """
    errors = [
        (out.double() - ref) / ref.square().mean().sqrt()
        for out, ref in zip(outputs, references, strict=True)
    ]
    together = torch.cat([error.flatten() for error in errors])
    return float(together.square().mean().sqrt()), float(together.abs().max())


def compare(layers: Sequence[Layer]) -> dict[str, float]:
    """Errors of ours and stock's over layers of one shape, beside the least that the dtype allows."""
    references, dtype = [exact(layer) for layer in layers], layers[0].query.dtype
    mine, theirs = (
        relative([ours(layer) for layer in layers], references),
        relative([stock(layer) for layer in layers], references),
    )
    least = relative([ref.to(dtype) for ref in references], references)
    weights = relative([exact(layer, dtype).to(dtype) for layer in layers], references)
    return {
        "ours_rms": mine[0],
        "stock_rms": theirs[0],
        "ratio": mine[0] / theirs[0],
        "ours_max": mine[1],
        "stock_max": theirs[1],
        "least_rms": least[0],
        "weights_rms": weights[0],
    }


def model_layers(
    model: str, prompt: list[int], dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries ``[T, heads, D]``, keys and values ``[T, KV heads, D]`` of every layer of a model
    that reads the prompt, as transformers computes them.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

    seen = []

    def attend(
        _: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        __: Any,
        scaling: float | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        seen.append(tuple(part[0].transpose(0, 1).contiguous() for part in (query, key, value)))
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return mixed.transpose(1, 2), None

    AttentionInterface.register("rounding", attend)
    AttentionMaskInterface.register("rounding", lambda *_, **__: None)
    loaded = (
        AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="rounding")
        .to(device)
        .eval()
    )
    with torch.no_grad():
        loaded(torch.tensor([prompt], device=device), use_cache=False)
    return seen


def measure_layers(
    model: str, prompt: list[int], lengths: list[int], groups: list[int], head_dims: list[int]
) -> Iterator[tuple[str, Any]]:
    """Event ``("row", figures)`` for each dtype, step and shape, then for the model's own layers;
    runs in a child.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in DTYPES:
        dtype = getattr(torch, name)
        captured = model_layers(model, prompt, dtype, device)
        for step in ("prefill", "decode"):
            decode = step == "decode"
            for head_dim in head_dims:
                for group in groups:
                    for tokens in lengths:
                        layer = random_layer(dtype, tokens, group, head_dim, decode, device)
                        shape = {"tokens": tokens, "group": group, "head_dim": head_dim}
                        yield (
                            "row",
                            {
                                "step": step,
                                "dtype": name,
                                "inputs": "random",
                                **shape,
                                **compare([layer]),
                            },
                        )
            layers = [
                Layer(query[-DECODED:].contiguous() if decode else query, key, value, decode)
                for query, key, value in captured
            ]
            shape = {
                "tokens": len(prompt),
                "group": layers[0].group,
                "head_dim": layers[0].query.shape[-1],
            }
            yield (
                "row",
                {
                    "step": step,
                    "dtype": name,
                    "inputs": f"all {len(layers)} layers of {Path(model).name}",
                    **shape,
                    **compare(layers),
                },
            )


# -- the model
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What an engine made of one prompt.

    Attributes:
        tokens: of the greedy reply. near: of each of them the likeliest tokens' log-probabilities.
        prompt: log-probabilities of the prompt's tokens, without the first.
        forced: of the forced tokens, without the first.
    """

    tokens: list[int]
    near: list[dict[int, float]]
    prompt: list[float]
    forced: list[float]


def engines(on_gpu: bool) -> dict[str, dict[str, Any]]:
    """What each engine is started with beside what all share."""
    other = {"stock, Triton attention": {"attention_backend": "TRITON_ATTN"}} if on_gpu else {}
    own = {
        "attention_backend": "specontext",
        "additional_config": {"specontext": {"budget": MAX_MODEL_LEN}},
    }
    return {
        "stock": {},
        "stock, chunks of 64 tokens": {"max_num_batched_tokens": 64},
        **other,
        OURS: own,
    }


def measure_engine(
    model: str,
    dtype: str,
    settings: dict[str, Any],
    prompts: list[list[int]],
    forced: list[list[int]],
    singly: bool,
    on_gpu: bool,
) -> Iterator[tuple[str, Any]]:
    """Events ``("answers", [Answer])``, then, if ``singly``, ``("singly", [Answer])`` with one
    request at a time; runs in a child.
    """
    from vllm import LLM, SamplingParams

    from benchmarks.accuracy import forcing

    shared = {
        "model": model,
        "dtype": dtype,
        "seed": 0,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 256,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.3,
    }
    llm = LLM(**{**shared, **settings}, **forcing.engine_arguments(on_gpu))
    free = SamplingParams(
        temperature=0,
        max_tokens=REPLY,
        ignore_eos=True,
        detokenize=False,
        logprobs=NEAR,
        prompt_logprobs=0,
    )

    def ask(numbers: Sequence[int]) -> list[Answer]:
        asked = [{"prompt_token_ids": prompts[i]} for i in numbers]
        replies = llm.generate(asked, free, use_tqdm=False)
        told = llm.generate(
            asked, [forcing.forced_params(forced[i], on_gpu) for i in numbers], use_tqdm=False
        )
        return [
            _read(reply, other, forced[i])
            for reply, other, i in zip(replies, told, numbers, strict=True)
        ]

    yield "answers", ask(range(len(prompts)))
    if singly:
        yield "singly", [ask([i])[0] for i in range(len(prompts))]


def _read(reply: Any, told: Any, forced: list[int]) -> Answer:
    from benchmarks.accuracy import forcing

    prompt = [
        step[token].logprob
        for step, token in zip(reply.prompt_logprobs[1:], reply.prompt_token_ids[1:], strict=True)
    ]
    near = [
        {token: found.logprob for token, found in step.items()}
        for step in reply.outputs[0].logprobs
    ]
    return Answer(
        list(reply.outputs[0].token_ids),
        near,
        prompt,
        forcing.log_probabilities(told.outputs[0], forced),
    )


def measure_exactly(
    model: str, dtypes: Sequence[str], prompts: list[list[int]], forced: list[list[int]]
) -> Iterator[tuple[str, Any]]:
    """Event ``("exact", (dtype, [(of the prompt's tokens, of the forced ones)]))``: transformers in
    float64 with the weights of that dtype; runs in a child.
    """
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in dtypes:
        loaded = (
            AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, name))
            .to(device, torch.float64)
            .eval()
        )
        out = []
        for prompt, reply in zip(prompts, forced, strict=True):
            ids = torch.tensor([*prompt, *reply], device=device)
            with torch.no_grad():
                logs = loaded(ids[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
            found = logs.gather(1, ids[1:, None])[:, 0].tolist()
            # The first forced token is left out, as in `forcing.log_probabilities`.
            out.append((found[: len(prompt) - 1], found[len(prompt) :]))
        yield "exact", (name, out)


def parting(stock: Answer, other: Answer, end: int | None) -> float | None:
    """How far apart in log-probability stock had the two tokens at which the replies part; None
    where they don't.

    Args:
        end: the token that ends an answer; what comes behind it does not count.
    """
    for place, (mine, theirs) in enumerate(zip(stock.tokens, other.tokens, strict=True)):
        if mine != theirs:
            near = stock.near[place]
            return near[mine] - near.get(theirs, min(near.values()))
        if mine == end:
            break
    return None


def engine_row(
    engine: str,
    dtype: str,
    answers: Sequence[Answer],
    stock: Sequence[Answer],
    exactly: Sequence[tuple[list[float], list[float]]],
    ends: Sequence[int | None],
) -> dict[str, Any]:
    """One line of the second table.

    Args:
        exactly: log-probabilities in float64, see ``measure_exactly``.
        ends: of each prompt the token that ends its answer; None where a text is only continued.
    """
    prompt = [
        a - b
        for answer, (true, _) in zip(answers, exactly, strict=True)
        for a, b in zip(answer.prompt, true, strict=True)
    ]
    decoded = [
        a - b
        for answer, (_, true) in zip(answers, exactly, strict=True)
        for a, b in zip(answer.forced, true, strict=True)
    ]
    found = [
        (end, parting(one, other, end))
        for one, other, end in zip(stock, answers, ends, strict=True)
    ]
    gaps = [gap for _, gap in found if gap is not None]
    texts = sum(end is None for end in ends)
    row = {
        "engine": engine,
        "engine_dtype": dtype,
        "prompt_rms": _rms(prompt),
        "decode_rms": _rms(decoded),
        "prompts": f"{len(ends) - texts}, {texts}",
        "answers": None,
        "texts": None,
        "gap": statistics.median(gaps) if gaps else None,
        "widest": max(gaps, default=None),
    }
    if answers is not stock:
        row["texts"] = sum(end is None and gap is not None for end, gap in found)
        row["answers"] = len(gaps) - row["texts"]
    return row


def _rms(errors: Sequence[float]) -> float:
    return statistics.fmean(error * error for error in errors) ** 0.5


def _prompts(model: Path, count: int) -> tuple[list[list[int]], list[list[int]], list[int | None]]:
    """Of each prompt its tokens, up to 1,000, those that are forced after it, and the token that
    ends its answer (None: only a text to go on with).

    Needles, texts, recitations, texts and so on: an answer leaves the model little doubt, the next
        word of random sentences all there is.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    prompts, forced, ends = [], [], []
    for seed in range(count):
        size = 600 + 16 * (seed % 25)
        if seed % 2:
            rng = random_for(seed, "rounding")
            prompts.append(
                tokenizer(" ".join(sentence(rng) for _ in range(size // 9)))["input_ids"]
            )
            reply = sentence(rng)
        else:
            problem = make_problem(
                ("needle", "recitation")[seed // 2 % 2], seed=seed, approx_tokens=size
            )
            prompts.append(
                list(
                    tokenizer.apply_chat_template(
                        problem.messages,
                        add_generation_prompt=True,
                        tokenize=True,
                        return_dict=False,
                    )
                )
            )
            reply = problem.answer
        forced.append(tokenizer(f" {reply}", add_special_tokens=False)["input_ids"][:FORCED])
        ends.append(None if seed % 2 else tokenizer.eos_token_id)
    return prompts, forced, ends


def main(
    model: Annotated[Path, typer.Option(help="Folder of a model.")] = DEMO_MODEL,
    lengths: Annotated[
        str, typer.Option(help="Comma-separated tokens of a context, of random layers.")
    ] = "1024,2048",
    groups: Annotated[str, typer.Option(help="Query heads to a KV head.")] = "1,4,8",
    head_sizes: Annotated[str, typer.Option(help="Head sizes.")] = "64,128",
    prompts: Annotated[
        int, typer.Option(min=0, help="That each engine answers; 0: only single layers.")
    ] = 24,
    engine_seconds: Annotated[int, typer.Option(min=1, help="Time limit of an engine.")] = 600,
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
) -> None:
    """Errors against float64, and answers that part, in bfloat16 and float16; engines in float32,
    too. Exit code 1 if anything failed.
    """
    on_gpu = bool(gpus())
    shapes = []
    for option, text in (
        ("--lengths", lengths),
        ("--groups", groups),
        ("--head-sizes", head_sizes),
    ):
        shapes.append([int(part) if part.strip().isdigit() else 0 for part in text.split(",")])
        if min(shapes[-1]) < (DECODED if option == "--lengths" else 1):
            typer.echo(
                f"{option}: found {text!r}; give numbers separated by commas, lengths of at least "
                f"{DECODED}.",
                err=True,
            )
            raise typer.Exit(2)
    asked, forced, ends = _prompts(model, max(prompts, 1))
    tables = TABLES if prompts else {ONE_LAYER: TABLES[ONE_LAYER]}
    result = report.Report(
        "rounding",
        f"Rounding: errors against float64, answers that part ({model.resolve().name})",
        tables,
    )
    default = (
        "FlashAttention"
        if on_gpu
        else "C++ kernels for CPUs, which round the softmax's weights where they use matrix units (AMX, bfloat16 only)"
    )
    result.notes.append(
        "Errors over the root mean square of the float64 result, which is computed from the same "
        f"16-bit queries, keys and values. Stock: its {default}. "
        f"Ours reads every page. Decode: the {DECODED} newest tokens, each a request of its own; "
        f"prefill: all. Random: {KV_HEADS} KV heads, scores with a "
        f"standard deviation of {SHARPNESS:g}."
    )
    if prompts:
        result.notes.append(
            "Engines: prompts of 600 to 1,000 tokens, half of them the demo's needles and "
            f"recitations, half random sentences to go on with; {REPLY} tokens "
            "greedily, of which those behind an answer's end don't count; four requests at a time "
            "in chunks of 256 tokens, without a prefix cache, where nothing "
            "else is said. Float64: transformers on the weights of that dtype (norms and rotary "
            "angles are float32 there). Decoded tokens: the right answer's or "
            "another sentence's, forced."
        )
    folder = Path(tempfile.mkdtemp())
    env = engine_env(on_gpu)
    try:
        for _, row in run_child(
            measure_layers,
            str(model),
            asked[0],
            *shapes,
            log=folder / "layers.log",
            seconds=engine_seconds,
            env=env,
        ):
            result.rows.append(row)
    except ChildError as error:
        result.failures["single layers"] = str(error)
    if prompts:
        _ask_engines(result, model, asked, forced, ends, on_gpu, folder, engine_seconds)
    result.write(out)
    result.show()
    raise typer.Exit(1 if result.failures else 0)


def _ask_engines(
    result: report.Report,
    model: Path,
    asked: list[list[int]],
    forced: list[list[int]],
    ends: list[int | None],
    on_gpu: bool,
    folder: Path,
    seconds: int,
) -> None:
    dtypes = (*DTYPES, "float32")
    try:
        exactly = dict(
            value
            for _, value in run_child(
                measure_exactly,
                str(model),
                dtypes,
                asked,
                forced,
                log=folder / "exact.log",
                seconds=seconds,
            )
        )
    except ChildError as error:
        result.failures["float64"] = str(error)
        return
    env = engine_env(on_gpu)
    for dtype in dtypes:
        answers: dict[str, list[Answer]] = {}
        for name, settings in engines(on_gpu).items():
            typer.echo(f"{dtype}: {name}")
            log = folder / f"{dtype}-{'-'.join(name.replace(',', '').split())}.log"
            arguments = (str(model), dtype, settings, asked, forced, name == "stock", on_gpu)
            try:
                for kind, value in run_child(
                    measure_engine, *arguments, log=log, seconds=seconds, env=env
                ):
                    answers[SINGLY if kind == "singly" else name] = value
            except ChildError as error:
                result.failures[f"{name}, {dtype}"] = str(error)
        if "stock" in answers:
            result.rows += [
                engine_row(name, dtype, found, answers["stock"], exactly[dtype], ends)
                for name, found in answers.items()
            ]
