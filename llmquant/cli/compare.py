"""`llmquant compare`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from llmquant.cli.console import console, errors, write_json

if TYPE_CHECKING:
    from llmquant.measure.activations import ActivationReport, LayerError


def compare(
    fp: Annotated[str, typer.Argument(help="The plain model: folder or hub id.")],
    quantized: Annotated[str, typer.Argument(help="Its quantized copy.")],
    text: Annotated[
        str, typer.Option(help="builtin (CPython's help topics), wikitext2, or the path of a text file.")
    ] = "builtin",
    tokens: Annotated[int, typer.Option(min=1, help="To read, from the start of the text.")] = 512,
    jump: Annotated[
        float, typer.Option(help="How far in dB a block must fall below all before it to be named as the first jump.")
    ] = 6.0,
    dtype: Annotated[str, typer.Option(help="To compute in: auto, float32, bfloat16 or float16.")] = "auto",
    top: Annotated[int, typer.Option(min=1, help="Layers to list; --json has all.")] = 15,
    json: Annotated[Path | None, typer.Option(help="Also write all figures to this file ('-': only stdout).")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw them to this file (.png, .svg or .pdf); needs llmquant[plot].")
    ] = None,
) -> None:
    """Show where a quantized model leaves the path of the plain one: the outputs of every layer on the same text.

    SQNR is the energy of a layer's output over that of its error, in dB: 20 dB is an error of a tenth. Errors pile up
    along the blocks, so look for the block where it falls at once. Both models are in memory.

    Examples:

    * `llmquant compare ./SmolLM2 ./SmolLM2-int4 --plot path.png`

    * `llmquant compare ./SmolLM2 ./SmolLM2-int3 --text my.txt --tokens 2048 --json layers.json`
    """
    import torch

    from llmquant.checkpoint.source import locate, parse_dtype
    from llmquant.integrations.loading import load, load_tokenizer
    from llmquant.measure.activations import compare_activations
    from llmquant.measure.text import load_text
    from llmquant.measure.windows import make_windows, tokenize

    if plot:
        from llmquant.cli.bench_plot import require_matplotlib

        require_matplotlib()
    folder, wanted = locate(fp), parse_dtype(dtype) or "auto"
    ids, bos = tokenize(load_tokenizer(folder), load_text(text).content)
    window = make_windows(ids, min(tokens, len(ids)), 1, bos)
    with errors.status("Running both models"), torch.inference_mode():
        report = compare_activations(load(folder, dtype=wanted), load(locate(quantized), dtype=wanted), window)
    if json:
        write_json({"plain": fp, "quantized": quantized, "text": text, **report.to_dict()}, json)
    if not json or str(json) != "-":
        print_report(report, jump, top)
    if plot:
        from llmquant.cli.tune_plot import draw_activations

        draw_activations(report, plot, f"{Path(quantized).name} against {Path(fp).name}, {report.tokens} tokens", jump)
        errors.print(f"plot: {plot}", highlight=False, soft_wrap=True)


def print_report(report: ActivationReport, jump: float, top: int) -> None:
    """The blocks in order, the worst other layers, and the first jump."""
    from llmquant.measure.activations import worst

    path = report.path()
    console.print("[bold]Blocks, in order[/]" if path is not report.rows else "[bold]Layers, in order[/]")
    console.print(table_of(list(path)), highlight=False)
    others = [row for row in report.rows if row.kind == "quantized"]
    if others and path is not report.rows:
        console.print(f"\n[bold]Quantized layers, the worst {min(top, len(others))} of {len(others)}[/]")
        console.print(table_of(worst(others, top)), highlight=False)
    first = report.first_jump(jump)
    told = f"more than {jump:g} dB below all before it"
    said = f"first jumps at {first.name}: {first.sqnr:.1f} dB, {told}" if first else f"jumps nowhere: nothing is {told}"
    console.print(f"\nThe error {said}.", highlight=False, soft_wrap=True)
    if report.unmatched:
        more = ", ".join(report.unmatched[:3]) + (" and more" if len(report.unmatched) > 3 else "")
        errors.print(f"[yellow]not compared:[/] {more}", highlight=False, soft_wrap=True)


def table_of(rows: list[LayerError]) -> Table:
    """One line a layer."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", overflow="fold")
    for name in ("SQNR, dB", "mean |difference|", "mean |output|"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        sqnr = "equal" if math.isinf(row.sqnr) else f"{row.sqnr:.2f}"
        table.add_row(row.name, sqnr, f"{row.mean_abs_difference:.4g}", f"{row.mean_abs:.4g}")
    return table
