"""`llmquant inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from llmquant.cli.console import console, shape_name, size, write_json


def inspect(
    model: Annotated[str, typer.Argument(metavar="OUT", help="Model folder, quantized by llmquant or plain.")],
    json: Annotated[Path | None, typer.Option(help="Write everything to this file instead ('-': stdout).")] = None,
) -> None:
    """Show every weight of a checkpoint: format, block, bytes, the kernel that serves it here and why; and totals.

    Reads headers only, and verifies that all shards belong to one save and are whole.
    """
    from llmquant.checkpoint.inspect import inspect_checkpoint

    found = inspect_checkpoint(model)
    if json:
        write_json(found.to_dict(), json)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("weight", "shape", "format", "block", "scale"):
        table.add_column(name, no_wrap=name in ("weight", "format"))
    table.add_column("bytes", justify="right")
    table.add_column("kernel")
    for row in found.rows:
        block = shape_name(row.block) if row.block else ""
        name = f"{row.activation}-{row.format}" if row.activation else row.format
        table.add_row(row.fqn, shape_name(row.shape), name, block, row.scale, f"{row.bytes:,}", row.kernel)
    console.print(table)
    for reason in sorted({f"{row.kernel}: {row.reason}" for row in found.rows if row.quantized}):
        console.print(f"kernel {reason}", highlight=False, soft_wrap=True)
    totals = found.totals()
    bits = totals["bits_per_quantized_weight"]
    console.print(
        f"{totals['quantized_weights']} quantized weights, {totals['plain_tensors']} plain tensors, "
        f"{size(totals['bytes'])}; {totals['bits_per_weight']:.2f} bits per weight"
        + (f", {bits:.3f} per quantized weight" if bits else ""),
        highlight=False,
        soft_wrap=True,
    )
