"""How `llmquant quantize --dry-run` shows a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from llmquant.cli.console import console, errors, size

if TYPE_CHECKING:
    from llmquant.checkpoint.needs import Needs
    from llmquant.checkpoint.plan import CheckpointPlan


def print_plan(plan: CheckpointPlan) -> None:
    """A plan for people."""
    console.print(_sizes(plan))
    print_kept(plan.kept)
    if plan.calibrated:
        _line(f"calibrated on a text: {len(plan.calibrated)} weights ({_what(plan)}); the run takes memory of its own")
    ratio = plan.bytes_after / max(plan.bytes_before, 1)
    _line(f"{size(plan.bytes_before)} -> {size(plan.bytes_after)} ({ratio:.1%}) in {plan.shards} files: {plan.output}")
    for text in _needs(plan.needs):
        _line(text)
    for warning in plan.warnings:
        errors.print(f"[yellow]warning:[/] {warning}", highlight=False, soft_wrap=True)


def print_kept(kept: object) -> None:
    """What stays in float, a line a reason."""
    groups: dict[str, list[str]] = {}
    for fqn, reason in dict(kept).items():  # type: ignore[call-overload]
        groups.setdefault(reason, []).append(fqn)
    for reason, names in groups.items():
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        _line(f"kept in float: {', '.join(names[:2])}{more} ({reason})")


def _sizes(plan: CheckpointPlan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("scheme", "algorithm"):
        table.add_column(name)
    for name in ("weights", "before", "after"):
        table.add_column(name, justify="right")
    for row in plan.schemes:
        table.add_row(row.scheme, row.algorithm, str(row.weights), size(row.bytes_before), size(row.bytes_after))
    before, after = (sum(getattr(row, name) for row in plan.schemes) for name in ("bytes_before", "bytes_after"))
    table.add_row("in float", "", "", size(plan.bytes_before - before), size(plan.bytes_after - after))
    return table


def _needs(needs: Needs) -> list[str]:
    free = "" if needs.memory_free is None else f", and {size(needs.memory_free)} can be had"
    lines = [
        f"memory: {size(needs.peak_memory)} at the peak ({size(needs.memory)} beside the program{free})",
        f"disk: {size(needs.disk)} to write, {size(needs.disk_free)} free",
    ]
    if needs.download:
        lines.append(f"download: {size(needs.download)}; {size(needs.cache)} of it at a time in the hub's cache")
    return lines


def _what(plan: CheckpointPlan) -> str:
    return ", ".join(sorted({name for needed in plan.calibrated.values() for name in needed}))


def _line(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)
