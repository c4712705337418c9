"""`llmquant eval`."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from llmquant.cli.console import console, progress_bar, size
from llmquant.cli.tasks import Tasks, print_tasks, record_of_tasks


def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder or hub id, quantized or plain.")],
    baseline: Annotated[str | None, typer.Option(help="The 16-bit original: adds KL, top-1 and the change.")] = None,
    text: Annotated[
        str, typer.Option(help="builtin (CPython's help topics, no download), wikitext2, or the path of a text file.")
    ] = "builtin",
    context: Annotated[int, typer.Option(help="Tokens a window; the first of each is not scored.")] = 2048,
    windows: Annotated[int, typer.Option(help="Windows to score, from the start of the text; 0 for all.")] = 8,
    dtype: Annotated[
        str, typer.Option(help="To compute in: auto (the model's own), float32, bfloat16 or float16.")
    ] = "auto",
    json: Annotated[Path | None, typer.Option(help="Also write the record to this file.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Also run these tasks of lm-eval on the model: arc_easy,hellaswag,mmlu_*")
    ] = None,
    task_path: Annotated[
        Path | None, typer.Option(help="A folder with tasks of your own, as lm-eval has them.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="The first documents of each task only.")] = None,
    tasks_only: Annotated[bool, typer.Option("--tasks-only", help="Run the tasks and measure nothing else.")] = False,
) -> None:
    """Measure perplexity and size, and how far a model is from its 16-bit original.

    Perplexity here is per token, over disjoint windows of the text as it is; it is not lm-eval's word perplexity.
    Compare only figures with the same protocol, which is printed with them. KL is in nats, from the baseline to the
    model. Tasks are run by lm-eval (`pip install llmquant[tasks]`), with its prompts, metrics and standard errors, on
    the model alone; `--task-path evals/tasks --tasks common_knowledge` is an example that needs no network.
    """
    chosen = Tasks(tasks, task_path, limit, tasks_only)
    found = chosen.load()
    record = record_of_tasks(model) if tasks_only else run(model, baseline, text, context, windows, dtype)
    if found:
        record["tasks"] = chosen.run(found, model, dtype)
    if json:
        from llmquant.measure.record import write_record

        write_record(record, json)
    if not tasks_only:
        print_record(record)
    if found:
        print_tasks(record["tasks"])


def run(model: str, baseline: str | None, text: str, context: int, windows: int, dtype: str) -> dict[str, Any]:
    """Evaluates a model, its baseline first and then out of memory; returns the record."""
    from llmquant.checkpoint.source import locate, parse_dtype
    from llmquant.integrations.transformers import load, load_tokenizer
    from llmquant.measure.evaluate import Protocol, Reference, backends
    from llmquant.measure.evaluate import evaluate as measure
    from llmquant.measure.memory import footprint, reset_peak_rss
    from llmquant.measure.record import build_record, machine, versions
    from llmquant.measure.text import load_text
    from llmquant.measure.windows import make_windows, tokenize

    folder, wanted = locate(model), parse_dtype(dtype) or "auto"
    content = load_text(text)
    ids, bos = tokenize(load_tokenizer(folder), content.content)
    cut = make_windows(ids, context, windows or None, bos)
    reference = None
    try:
        if baseline:
            original = load(locate(baseline), dtype=wanted)
            with progress_bar("Baseline") as progress:
                reference = Reference.compute(original, cut, progress)
            del original
            gc.collect()
            reset_peak_rss()
        candidate = load(folder, dtype=wanted)
        with progress_bar("Model") as progress:
            evaluation = measure(candidate, cut, reference, progress)
    finally:
        if reference:
            reference.close()
    name = str(candidate.dtype).removeprefix("torch.")
    protocol = Protocol.describe(content, cut, bos, name, backends(candidate))
    return build_record(
        model=model,
        baseline=baseline,
        protocol=protocol,
        evaluation=evaluation,
        footprint=footprint(candidate, folder),
        versions=versions(),
        machine=machine(),
    )


def print_record(record: dict[str, Any]) -> None:
    """The record for people."""
    protocol, ppl, sizes = record["protocol"], record["perplexity"], record["bytes"]
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    change = "" if ppl["change"] is None else f" (baseline {ppl['baseline']:.3f}, {ppl['change']:+.2%})"
    table.add_row("perplexity", f"{ppl['value']:.3f} ± {ppl['stderr']:.3f}{change}")
    if record["kl"]:
        kl = record["kl"]
        table.add_row(
            "KL", f"{kl['mean']:.5f} ± {kl['stderr']:.5f} nats (median {kl['median']:.5f}, p99 {kl['p99']:.4f})"
        )
        table.add_row("same top-1", f"{record['top1']:.2%}")
    table.add_row("on disk", size(sizes["disk"]))
    table.add_row("weights in memory", size(sizes["weights"]))
    table.add_row("peak resident", size(sizes["peak_rss"]))
    quantized = sizes["bits_per_quantized_weight"]
    table.add_row(
        "bits per weight",
        f"{sizes['bits_per_weight']:.2f}" + (f" ({quantized:.3f} where quantized)" if quantized else ""),
    )
    console.print(table, highlight=False)
    console.print(
        f"[dim]{protocol['text']} {protocol['text_sha256'][:12]}, {protocol['windows']} windows of "
        f"{protocol['context']}, BOS {protocol['bos']}, {protocol['tokens_scored']} tokens scored, "
        f"{protocol['dtype']}, {protocol['backend']}, "
        f"{record['seconds']:.0f} s[/]",
        highlight=False,
        soft_wrap=True,
    )
