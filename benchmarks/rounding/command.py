"""The command `rounding`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import report
from benchmarks.children import ChildError, engine_env, run_child
from benchmarks.machine import gpus
from benchmarks.rounding.answers import (
    REPLY,
    SINGLY,
    Answer,
    engine_row,
    engines,
    make_prompts,
    measure_engine,
    measure_exactly,
)
from benchmarks.rounding.errors import measure_layers
from benchmarks.rounding.layers import DECODED, DTYPES, KV_HEADS, SHARPNESS
from benchmarks.shapes import DEMO_MODEL

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
    asked, forced, ends = make_prompts(model, max(prompts, 1))
    tables = TABLES if prompts else {ONE_LAYER: TABLES[ONE_LAYER]}
    result = report.Report(
        "rounding",
        f"Rounding: errors against float64, answers that part ({model.resolve().name})",
        tables,
    )
    default = (
        "FlashAttention"
        if on_gpu
        else "C++ kernels for CPUs, which round the softmax's weights where they use matrix units "
        "(AMX, bfloat16 only)"
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
