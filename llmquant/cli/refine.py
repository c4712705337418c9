"""`llmquant refine`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmquant.cli.console import console, progress_bar, write_json

if TYPE_CHECKING:
    from llmquant.tune.refine import RefineReport


def refine(
    model: Annotated[str, typer.Argument(help="The quantized model: folder or hub id.")],
    baseline: Annotated[str, typer.Option(help="Its 16-bit original.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; it appears when it is complete.")],
    calib: Annotated[
        str, typer.Option(help="Text to learn from: builtin, wikitext2 (its train split), or the path of a text file.")
    ] = "builtin",
    calib_tokens: Annotated[int, typer.Option(help="Tokens to learn from and to judge by, in windows of 512.")] = 65536,
    steps: Annotated[int, typer.Option(min=1, help="Steps of one window each.")] = 200,
    lr: Annotated[float, typer.Option(help="The first step of a scale, as a share of it.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Which windows of the text are taken, and their order.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Of what stays in float, and to compute in: auto, float32, bfloat16 or float16.")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the report to this file ('-': only stdout).")] = None,
) -> None:
    """Train the scales of a quantized model to make it say what its original says; the codes stay as they are.

    The file stays as large and the model as fast. The last windows of the text are not learned from: what did best on
    them is written, which is the model as it was if nothing was better. Both models are in memory.

    Examples:

    * `llmquant refine ./SmolLM2-int4 --baseline ./SmolLM2 -o ./SmolLM2-int4-refined`

    * `llmquant refine ./q --baseline ./m -o ./r --calib my.txt --steps 400`
    """
    from llmquant.calibrate.data import calibration_windows
    from llmquant.checkpoint.files import check_target
    from llmquant.checkpoint.save import save
    from llmquant.checkpoint.source import extras, locate, parse_dtype
    from llmquant.integrations.loading import load, load_tokenizer
    from llmquant.tune.refine import refine_

    check_target(output, overwrite)  # before the long part
    folder, wanted = locate(model), parse_dtype(dtype) or "auto"
    windows = calibration_windows(load_tokenizer(folder), calib, tokens=calib_tokens, seed=seed)
    quantized = load(folder, dtype=wanted)
    teacher = load(locate(baseline), dtype=wanted)
    with progress_bar("Refining") as progress:
        report = refine_(quantized, teacher, windows, steps=steps, lr=lr, seed=seed, progress=progress)
    save(quantized, output, overwrite=overwrite, extras=extras(folder))
    if json:
        write_json(report.to_dict(), json)
    if not json or str(json) != "-":
        print_report(report, output)


def print_report(report: RefineReport, output: Path) -> None:
    """What was gained, for people."""
    found = f"KL {report.kl_before:.5f} -> {report.kl_after:.5f} nats on windows held out"
    which = f"after step {report.best_step}" if report.best_step else "nothing was better than the start"
    lines = [f"{found} ({which}), {len(report.trained)} weights in {report.seconds:.0f} s: {output}"]
    lines += [f"kept: {name} ({why})" for name, why in report.kept.items()]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
