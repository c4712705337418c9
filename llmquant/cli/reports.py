"""`llmquant report` and `llmquant compare-reports`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from llmquant.cli.console import console, errors, size, write_json

if TYPE_CHECKING:
    from llmquant.report.compare import Cell, Change, Comparison

_COLOURS = {"better": "green", "worse": "red", "mixed": "yellow", "gone": "yellow", "not comparable": "yellow"}


def report(
    folder: Annotated[Path, typer.Argument(help="A folder with results.jsonl, as `llmquant sweep` writes it.")],
) -> None:
    """Write the report of finished results again: report.html, report.md and plots/, beside them.

    `llmquant sweep` does this at its end; here is how it is done alone, after an update or on another machine.

    Example: `llmquant report ./sweep`
    """
    from llmquant.report import write_report

    with errors.status("Drawing"):
        page = write_report(folder)
    console.print(f"report: {page}", highlight=False, soft_wrap=True, markup=False)


def compare_reports(
    before: Annotated[
        Path, typer.Argument(help="Results: a sweep's folder, its results.jsonl, or the JSON of `llmquant eval`.")
    ],
    after: Annotated[Path, typer.Argument(help="Results to compare with them.")],
    json: Annotated[Path | None, typer.Option(help="Also write all of it to this file ('-': only stdout).")] = None,
    fail_on_worse: Annotated[
        bool, typer.Option("--fail-on-worse", help="Exit with 1 if a cell is worse, gone, or cannot be compared.")
    ] = False,
) -> None:
    """Show what changed between two sets of results: which cells are new, gone, better or worse.

    A figure counts as better or worse if it moved by more than two standard errors of the difference; figures without
    an error count by any difference, bytes by more than 0.1 %. Times are not compared. Differences of protocol come
    first: figures measured under different ones do not compare, and no verdict is given.

    Examples:

    * `llmquant compare-reports ./sweep-1.0 ./sweep-1.1`

    * `llmquant compare-reports main.json pr.json --fail-on-worse`
    """
    from llmquant.report.compare import compare
    from llmquant.report.read import read_rows

    comparison = compare(read_rows(before), read_rows(after))
    if json:
        write_json(comparison.to_dict(), json)
    if not json or str(json) != "-":
        print_comparison(comparison)
    reasons = comparison.failing()
    if fail_on_worse and reasons:
        errors.print(f"[bold red]worse:[/] {escape('; '.join(reasons))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1)


def print_comparison(comparison: Comparison) -> None:
    """Protocol and versions first, then what changed, then how many cells did not."""
    _print_differences("Different protocols, whose figures do not compare", comparison.protocol, "bold yellow")
    _print_differences("Different versions, kernels or machines", comparison.versions, "bold")
    quiet = ("equal", "within error")
    changed = [cell for cell in comparison.cells if cell.verdict not in quiet]
    if changed:
        console.print(table_of(changed), highlight=False)
    for verdict in quiet:
        count = sum(cell.verdict == verdict for cell in comparison.cells)
        if count:
            console.print(f"{count} {'cells' if count > 1 else 'cell'} {verdict}", highlight=False)


def _print_differences(title: str, differences: tuple[tuple[str, str, str], ...], style: str) -> None:
    if differences:
        console.print(f"[{style}]{title}[/]")
        for name, old, new in differences:
            console.print(f"  {name}: {old} -> {new}", highlight=False, markup=False, soft_wrap=True)
        console.print()


def table_of(cells: list[Cell]) -> Table:
    """One line a cell: its verdict and what moved."""
    models = {cell.model for cell in cells}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("cell", "verdict", "what moved"):
        table.add_column(name, overflow="fold")
    for cell in cells:
        name = f"{cell.model}: {cell.label}" if len(models) > 1 else cell.label
        moved = [*cell.notes, *(told(change) for change in cell.changes if change.better is not None)]
        colour = _COLOURS.get(cell.verdict, "default")
        words = escape("\n".join(moved))
        table.add_row(escape(f"{name} ({cell.text})"), f"[{colour}]{cell.verdict}[/]", words)
    return table


def told(change: Change) -> str:
    """`KL 0.25 -> 0.21, better (8.9 standard errors)`"""
    write = size if change.figure == "bytes" else lambda value: f"{value:.4g}"
    verdict = "better" if change.better else "worse"
    moved = abs(change.after - change.before)
    by = f" ({moved / change.stderr:.1f} standard errors)" if change.stderr else ""
    return f"{change.figure} {write(change.before)} -> {write(change.after)}, {verdict}{by}"
