"""`llmquant export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from llmquant.cli.console import console, errors, progress_bar, size, write_json

if TYPE_CHECKING:
    from llmquant.export.report import ExportReport


def export(
    model: Annotated[str, typer.Argument(metavar="OUT", help="Folder or hub id of what llmquant quantized.")],
    to: Annotated[str, typer.Option(help="compressed-tensors, gguf, torchao or hf16.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder to write (or NAME.gguf); it appears when it is complete."),
    ],
    misfits: Annotated[
        str,
        typer.Option(
            help="What becomes of weights that the other format cannot hold exactly: refuse (names them and writes "
            "nothing), round-scales (codes stay, scales are rounded), requantize (gguf: new codes), dequantize."
        ),
    ] = "refuse",
    dtype: Annotated[str, typer.Option(help="Of what is not quantized: auto, float32, bfloat16 or float16.")] = "auto",
    pre_tokenizer: Annotated[
        str | None, typer.Option(help="gguf: llama.cpp's name for how text is cut into words, if it cannot be told.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file, for instance 500MB or 2GB.")] = "2GB",
    json: Annotated[
        Path | None, typer.Option(help="Write what became of every weight to this file ('-': stdout).")
    ] = None,
) -> None:
    """Write a quantized checkpoint in another program's format, with the same codes.

    * `compressed-tensors`: for transformers with that package, and vLLM. int4, int8, float8, mxfp4, mxfp8, nvfp4.

    * `gguf`: for llama.cpp. Llama, Mistral, Qwen2, Qwen3; the smallest of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, MXFP4 and Q6_K
    that holds a weight exactly.

    * `torchao`: for transformers with torchao. Integers of two to eight bits, float8.

    * `hf16`: a plain checkpoint, dequantized.

    Examples:

    * `llmquant export ./q --to gguf -o q.gguf`

    * `llmquant export ./q --to compressed-tensors -o ./q-vllm --dtype float16`
    """
    from llmquant.checkpoint.source import parse_dtype
    from llmquant.cli.quantize import parse_size
    from llmquant.export.run import export_checkpoint

    with progress_bar(f"export to {to}") as progress:
        report = export_checkpoint(
            *(model, to, output),
            overwrite=overwrite,
            progress=progress,
            misfits=misfits,
            dtype=parse_dtype(dtype),
            pre_tokenizer=pre_tokenizer,
            max_shard_bytes=parse_size(max_shard_size),
        )
    for warning in report.warnings:
        errors.print(f"[yellow]note:[/] {warning}", highlight=False, soft_wrap=True)
    if json:
        write_json(report.to_dict(), json)
    if not json or str(json) != "-":
        print_report(report, output)


def print_report(report: ExportReport, output: Path) -> None:
    """One line for each way that weights went."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("format", "how", "weights", "why"):
        table.add_column(name, justify="right" if name == "weights" else "left")
    for (how, name, reason), fqns in report.groups().items():
        table.add_row(name, how, str(len(fqns)), reason)
    console.print(table)
    console.print(f"{size(report.bytes)} in {report.seconds:.1f} s: {output}", highlight=False, soft_wrap=True)
