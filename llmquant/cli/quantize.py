"""`llmquant quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from llmquant.cli.console import console, errors, progress_bar, size, write_json
from llmquant.errors import ConfigError

if TYPE_CHECKING:
    from llmquant.calibrate.collect import Calibration
    from llmquant.config.fqn import FqnToConfig
    from llmquant.quantize import QuantizationReport

DEFAULT_RECIPE = "int4-g32"


def quantize(
    model: Annotated[str, typer.Argument(help="Local folder of a Hugging Face model, or its hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; it appears when it is complete.")],
    recipe: Annotated[
        str | None,
        typer.Option(help="Name of a recipe (see `llmquant recipes`), path of a YAML file, or a scheme like int4-g64."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=SCHEME",
            help="Scheme for the weights that KEY names: an FQN, `re:` and a pattern, or _embedding, _head, _experts, "
            "_default. Goes before the recipe's keys and replaces an equal one; may repeat. Without --recipe, only "
            "these keys hold.",
        ),
    ] = None,
    algorithm: Annotated[
        str | None, typer.Option(help="rtn (round to nearest) or search (the default: least-squares scales).")
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            help="Text that schemes with static activations (s8-, sf8-) are calibrated on: builtin (the default), "
            "wikitext2 (its train split), or the path of a text file."
        ),
    ] = None,
    calib_tokens: Annotated[int, typer.Option(help="Tokens to calibrate on, in windows of 512.")] = 8192,
    seed: Annotated[int, typer.Option(help="Which windows of the text are taken.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of what stays in float: auto, float32, bfloat16 or float16.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, for instance 500MB or 2GB.")] = "2GB",
    json: Annotated[
        Path | None, typer.Option(help="Write the report of every weight to this file ('-': stdout).")
    ] = None,
) -> None:
    """Make a quantized copy of a model.

    Works tensor by tensor: memory stays near the size of one shard, whatever the model's size. Only schemes with
    static activations load the model first, to calibrate it.

    Schemes: `none`, or a format with suffixes: `int1` to `int8`, `float8`, `float8-e5m2`, then `-g<size>`, `-row` or
    `-tensor` (float8 also `-b<size>`: square blocks), then `-s8` (int2 to int6 in groups: scales of one byte), then
    `-sym` or `-asym`. For instance `int4-g64-asym`. In front
    of that, `a8-` quantizes the inputs of products to int8 too (`a8-int4-g32`); `a8` may be followed by `-g<size>` or
    `-token`, then `-sym` or `-asym`. `f8-` makes inputs float8 (`f8-float8`); it may be followed by `-g<size>`,
    `-token` or `-tensor`. `s8-`, `s8-asym-` and `sf8-` do the same with one scale for all inputs, from a calibration
    run. The prototypes `mxfp8`, `mxfp4`, `nvfp4` and their like are formats, and in front of one they say it of inputs
    (`mxfp8-mxfp8`, `nvfp4-nvfp4`).

    Examples:

    * `llmquant quantize ./SmolLM2 -o ./SmolLM2-int4 --recipe int4-g32`

    * `llmquant quantize ./m -o ./q --recipe int4-g64 --set _embedding=int8 --set 're:.*down_proj=int6-g32'`
    """
    from llmquant.checkpoint.files import check_target
    from llmquant.checkpoint.source import parse_dtype
    from llmquant.checkpoint.stream import quantize_checkpoint

    config = build_config(recipe, set_ or [], algorithm)
    stats = None
    if needs_calibration(config):
        check_target(output, overwrite)  # before the long part
        stats = calibrate(model, config, calib or "builtin", calib_tokens, seed, dtype)
    elif calib is not None:
        raise ConfigError("no scheme here needs --calib: it is for static activations", hint="for instance s8-int8")
    with progress_bar("Quantizing") as progress:
        report = quantize_checkpoint(
            model,
            output,
            config,
            stats=stats,
            dtype=parse_dtype(dtype),
            overwrite=overwrite,
            max_shard_bytes=parse_size(max_shard_size),
            progress=progress,
        )
    for warning in report.warnings:
        errors.print(f"[yellow]warning:[/] {warning}", highlight=False)
    if json:
        write_json(report.to_dict(), json)
    if not json or str(json) != "-":
        print_report(report, output)


def needs_calibration(config: FqnToConfig) -> bool:
    """Whether any scheme has a static activation."""
    found = (getattr(value, "activation", None) for _, value in config.items())
    return any(activation is not None and activation.static for activation in found)


def calibrate(model: str, config: FqnToConfig, text: str, tokens: int, seed: int, dtype: str) -> Calibration | None:
    """Loads the plain model, shows it a text, and lets go of it. None where no weight gets a static activation.

    Raises:
        CalibrationError: for a model that reads more than one text at a time.
    """
    from llmquant.calibrate.collect import collect_stats
    from llmquant.calibrate.data import calibration_windows
    from llmquant.checkpoint.source import open_source, parse_dtype
    from llmquant.errors import CalibrationError
    from llmquant.integrations.transformers import load_tokenizer
    from llmquant.quantize import make_plan

    source = open_source(model, parse_dtype(dtype))
    if not make_plan(source.skeleton, config).calibrated:
        return None
    if source.config.get("is_encoder_decoder"):
        raise CalibrationError(
            "an encoder and a decoder read two texts, of which --calib has one",
            where=model,
            hint="in Python, llmquant.collect_stats with batches of your own and quantize_checkpoint(..., stats=stats)",
        )
    windows = calibration_windows(load_tokenizer(source.folder), text, tokens=tokens, seed=seed)
    kind: Any = type(source.skeleton)
    plain = kind.from_pretrained(source.folder, dtype=source.dtype)
    with progress_bar("Calibrating") as progress:
        found = collect_stats(plain, config, windows, progress=progress)
    for warning in found.warnings:
        errors.print(f"[yellow]warning:[/] {warning}", highlight=False)
    errors.print(f"calibrated on {found.tokens} tokens of {text} (seed {seed})", highlight=False)
    return found


def build_config(recipe: str | None, pairs: list[str], algorithm: str | None) -> Any:
    """The `FqnToConfig` that the options describe."""
    from llmquant.config import recipe as recipes
    from llmquant.config.schemes import parse_scheme

    overrides = {}
    for pair in pairs:
        key, equals, scheme = pair.rpartition("=")
        if not equals or not key:
            raise ConfigError(f"--set needs KEY=SCHEME, not {pair!r}", hint="for instance --set _embedding=int8")
        overrides[key] = parse_scheme(scheme)
    if recipe is None and overrides:
        config = recipes.to_config(overrides)
    else:
        config = recipes.to_config(recipe or DEFAULT_RECIPE).overridden_by(overrides)
    return recipes.with_algorithm(config, algorithm) if algorithm else config


def parse_size(text: str) -> int:
    """Bytes of `500MB`, `2GB`, `1000`. Raises `ConfigError`."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number, factor = (text[:-2], units[text[-2:].upper()]) if text[-2:].upper() in units else (text, 1)
    try:
        found = int(float(number) * factor)
    except (ValueError, OverflowError):
        found = 0
    if found <= 0:
        raise ConfigError(f"cannot read the size {text!r}", hint="for instance 500MB or 2GB")
    return found


def print_report(report: QuantizationReport, output: Path) -> None:
    """The report for people: one line a scheme, then what stayed in float and why."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (("scheme", "left"), ("algorithm", "left"), ("weights", "right"), ("before", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("after", justify="right")
    groups: dict[tuple[str, str], list[Any]] = {}
    for weight in report.quantized.values():
        groups.setdefault((weight.scheme, weight.algorithm), []).append(weight)
    for (scheme, algorithm), found in groups.items():
        before, after = sum(w.bytes_before for w in found), sum(w.bytes_after for w in found)
        table.add_row(scheme, algorithm, str(len(found)), size(before), size(after))
    console.print(table)
    for reason, names in grouped_reasons(report.skipped).items():
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        console.print(f"kept in float: {', '.join(names[:2])}{more} ({reason})", highlight=False, soft_wrap=True)
    ratio = report.bytes_after / max(report.bytes_before, 1)
    console.print(
        f"{size(report.bytes_before)} -> {size(report.bytes_after)} ({ratio:.1%}) in {report.seconds:.1f} s: {output}",
        highlight=False,
        soft_wrap=True,
    )


def grouped_reasons(skipped: dict[str, str]) -> dict[str, list[str]]:
    """Reason -> FQNs."""
    groups: dict[str, list[str]] = {}
    for fqn, reason in skipped.items():
        groups.setdefault(reason, []).append(fqn)
    return groups
