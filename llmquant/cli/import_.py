"""`llmquant import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from llmquant.cli.console import console, errors, progress_bar, size, write_json
from llmquant.cli.quantize import parse_size
from llmquant.foreign.report import ImportReport


def import_model(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model folder or hub id, quantized by another library.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Folder to make.")],
    requantize: Annotated[
        str | None,
        typer.Option(
            help="Scheme for weights that no format holds, for instance int4-g64; none leaves them plain. Without it "
            "they are refused by name."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the model when it is loaded: auto, float32, bfloat16, float16.")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, for instance 500MB or 2GB.")] = "2GB",
    json: Annotated[
        Path | None, typer.Option(help="Write the report of every weight to this file ('-': stdout).")
    ] = None,
) -> None:
    """Take over a checkpoint that another library quantized: codes, scales and zero points as they are.

    Reads checkpoints of compressed-tensors (packed, integer and float8 ones, NVFP4, MXFP4, MXFP8), GPTQ (2, 3, 4 and 8
    bits), AWQ, bitsandbytes (NF4, with double quantization or without, and int8) and transformers' fp8 in blocks. Works
    tensor by tensor, without going through 16 bits; what is not quantized is copied.

    Examples:

    * `llmquant import ./Llama-3-8B-GPTQ -o ./Llama-3-8B-int4`

    * `llmquant import ./model-with-desc-act -o ./ours --requantize int4-g32-asym`
    """
    from llmquant.checkpoint.source import parse_dtype
    from llmquant.foreign import import_checkpoint

    with progress_bar("importing") as bar:
        report = import_checkpoint(
            *(model, output),
            requantize=requantize,
            dtype=parse_dtype(dtype),
            overwrite=overwrite,
            max_shard_bytes=parse_size(max_shard_size),
            progress=bar,
        )
    for warning in report.warnings:
        errors.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    if json:
        write_json(report.to_dict(), json)
    if not json or str(json) != "-":
        _print(report, output)


def _print(report: ImportReport, output: Path) -> None:
    """One line a scheme and way, and the totals."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("format", "block", "scale", "taken", "weights", "before", "after"):
        table.add_column(name, justify="right" if name in ("weights", "before", "after") else "left")
    groups: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for weight in report.weights.values():
        found = groups.setdefault((weight.scheme, weight.taken), [])
        found.append((weight.bytes_before, weight.bytes_after))
    for (scheme, taken), found in groups.items():
        form, block, scale = (*scheme.split(" ", 2), "", "")[:3]
        before, after = map(sum, zip(*found, strict=True))
        table.add_row(form, block, scale, taken, str(len(found)), size(before), size(after))
    console.print(table)
    for note in dict.fromkeys(weight.note for weight in report.weights.values() if weight.note):
        console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)
    console.print(
        f"{report.source}: {len(report.weights)} weights taken over, {len(report.copied)} tensors copied; "
        f"{size(report.bytes_before)} -> {size(report.bytes_after)} in {report.seconds:.1f} s: {output}",
        highlight=False,
        soft_wrap=True,
    )
