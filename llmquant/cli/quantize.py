"""`llmquant quantize`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from llmquant.cli.console import Terminal, console, errors, size, write_json
from llmquant.cli.plan_view import print_kept, print_plan
from llmquant.errors import ConfigError

if TYPE_CHECKING:
    from llmquant.checkpoint.crew import Crew
    from llmquant.checkpoint.origin import Origin
    from llmquant.checkpoint.plan import CheckpointPlan
    from llmquant.config.recipe import Recipe
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
    bits: Annotated[
        float | None,
        typer.Option(
            help="Instead of --recipe: choose a scheme for each weight, so that all stay within so many bits per "
            "quantized weight (scales included) and the model stays nearest the plain one. Loads the model."
        ),
    ] = None,
    schemes: Annotated[
        str | None,
        typer.Option(help="What --bits chooses from, with commas: int2-g32,int3-g64,int4-g64,int6-g64,int8."),
    ] = None,
    save_recipe: Annotated[Path | None, typer.Option(help="Write what --bits chose as a recipe (YAML).")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the scores and what --bits chose (.png, .svg, .pdf); llmquant[plot].")
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option(
            help="How codes and scales are chosen: search (the default: least-squares scales), rtn (round to nearest), "
            "hqq (an error that lets outliers be); after reading a text: gptq (errors of a column are made up for by "
            "later ones), signround (learned on each block's output; best, slowest). awq and smoothquant scale "
            "channels of the plain model by a text, then let search or, as in awq+gptq, another one choose."
        ),
    ] = None,
    rotate: Annotated[
        str | None,
        typer.Option(
            help="Turn the residual stream by a hadamard or a random matrix before anything else: the same function, "
            "weights without outliers. Best with gptq; a tied head gets a weight of its own."
        ),
    ] = None,
    rotate_seed: Annotated[int, typer.Option(help="Of that matrix.")] = 0,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            help="Weigh errors by how large the inputs of each column are. Read from this file if it is there; else "
            "gathered from a text, and written to it for the next time."
        ),
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            help="Text that is read for gptq, --imatrix and static activations (s8-, sf8-): builtin (the default), "
            "wikitext2 (its train split), or the path of a text file."
        ),
    ] = None,
    calib_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of it to read, in windows of 512; by default 65536 block by block, else 8192."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Which windows of the text are taken.")] = 0,
    observer: Annotated[
        str | None,
        typer.Option(
            help="How the range of a static activation follows from what was seen: minmax (the default), average "
            "(moving averages), channel, percentile (99.99; percentile-99.9 for another), histogram (least error)."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="In which signround learns each block: 50. More, and more tokens, are better."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of what stays in float: auto, float32, bfloat16 or float16.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, for instance 500MB or 2GB.")] = "2GB",
    jobs: Annotated[
        int | None,
        typer.Option(help="Tensors at work at a time: 1, or with --max-memory as many as there are processors."),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(help="What the process may come to take, for instance 4GB; bounds how many tensors are at work."),
    ] = None,
    ignore_memory: Annotated[
        bool, typer.Option("--ignore-memory", help="Go on where memory will hardly do; otherwise that is refused.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub repository.")] = None,
    drop_shards: Annotated[
        bool,
        typer.Option(
            "--drop-shards",
            help="Delete each shard that was downloaded by this run from the hub's cache when nothing needs it any "
            "more. It is downloaded again by a run that goes on after an interruption and needs it.",
        ),
    ] = False,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw",
            help="For architectures that transformers does not know: names are the keys of the files, and every matrix "
            "but norms and embeddings, by their keys, is a weight. llmquant.load_raw reads the result.",
        ),
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python code beside the weights to build the model.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show sizes, what stays in float, memory and disk needed, and write nothing. --json gives it as JSON.",
        ),
    ] = False,
    json: Annotated[
        Path | None, typer.Option(help="Write the report of every weight, or the plan, to this file ('-': stdout).")
    ] = None,
) -> None:
    """Make a quantized copy of a model.

    Works tensor by tensor: memory stays near the size of the largest, whatever the model's size. What is finished is
    kept in OUT.partial: the same command, after it was interrupted or killed, goes on behind it and ends with the same
    bytes. Where a text is read (gptq, --imatrix, static activations) the model runs first; gptq works block by block.
    --rotate, awq and smoothquant load the model too, and need room on the disk for a plain copy of it beside the
    output while they run.

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

    * `llmquant quantize ./m -o ./q --recipe int4-g64 --algorithm gptq --calib ./text.txt`

    * `llmquant quantize ./m -o ./q --recipe int4-g64 --algorithm gptq --rotate hadamard`

    * `llmquant quantize ./m -o ./q --recipe int4-g64 --set _embedding=int8 --set 're:.*down_proj=int6-g32'`

    * `llmquant quantize org/model -o ./q --drop-shards --dry-run`

    * `llmquant quantize ./m -o ./q --bits 4.25 --schemes int3-g64,int4-g64,int6-g64 --plot choice.png`
    """
    from llmquant.checkpoint.crew import Crew
    from llmquant.checkpoint.files import check_target
    from llmquant.checkpoint.origin import Origin
    from llmquant.cli.budget import Choice, check_alone, check_unused
    from llmquant.config.recipe import split_algorithm
    from llmquant.convert.budget import Budget
    from llmquant.convert.calibrated import Reading
    from llmquant.convert.job import Conversion

    budget, choice = None, Choice(Path(model).resolve().name, save_recipe, plot)
    if bits is None:
        check_unused({"--schemes": schemes, "--save-recipe": save_recipe, "--plot": plot})
    else:
        check_alone(recipe)
        budget = Budget(bits, schemes, parse_pairs(set_ or []), split_algorithm(algorithm)[1])
    asked, shard_bytes = build_recipe(recipe, set_ or [], algorithm), parse_size(max_shard_size)
    asked = replace(asked, changes=replace(asked.changes, rotate=rotate or asked.changes.rotate))
    origin = Origin(model, revision, drop_shards, raw, trust_remote_code)
    crew = Crew(jobs, None if max_memory is None else parse_size(max_memory))
    if dry_run:
        check_planned(asked, budget)
        show_plan(plan_of(origin, output, asked, dtype, shard_bytes, crew), json)
        return
    check_target(output, overwrite)  # before the long part
    choice.check()
    reading = Reading(calib, calib_tokens, seed, observer, steps)
    report, reports = Conversion(asked, reading, budget, rotate_seed, imatrix, dtype).write(
        *(origin, output),
        overwrite=overwrite,
        max_shard_bytes=shard_bytes,
        crew=crew,
        ignore_memory=ignore_memory,
        listener=Terminal(),
        on_mixture=choice.tell,
    )
    for warning in report.warnings:
        errors.print(f"[yellow]warning:[/] {warning}", highlight=False)
    if json:
        write_json(report.to_dict() | reports, json)
    if not json or str(json) != "-":
        print_report(report, output)


def check_planned(asked: Recipe, budget: object) -> None:
    """Raises `ConfigError` where what is to be done is not known before the model has run."""
    if budget is not None:
        raise ConfigError(
            "--bits chooses schemes by running the model, which --dry-run does not", hint="--dry-run with --recipe"
        )
    if asked.changes:
        raise ConfigError(
            "a rotation, awq and smoothquant write a changed plain model first, which --dry-run cannot plan",
            hint="--dry-run without them gives the sizes; add room for the plain model",
        )


def plan_of(
    origin: Origin, output: Path, asked: Recipe, dtype: str, max_shard_bytes: int, crew: Crew
) -> CheckpointPlan:
    """What would be done."""
    from llmquant.checkpoint.plan import plan_checkpoint
    from llmquant.checkpoint.source import parse_dtype

    return plan_checkpoint(
        *(origin, output, asked.config),
        dtype=parse_dtype(dtype),
        max_shard_bytes=max_shard_bytes,
        jobs=crew.jobs,
        max_memory=crew.max_memory,
    )


def show_plan(plan: CheckpointPlan, json: Path | None) -> None:
    """Prints a plan, writes it as JSON, or both."""
    if json:
        write_json(plan.to_dict(), json)
    if not json or str(json) != "-":
        print_plan(plan)


def build_recipe(recipe: str | None, pairs: list[str], algorithm: str | None) -> Recipe:
    """The recipe that the options describe."""
    from llmquant.config import recipe as recipes

    overrides = parse_pairs(pairs)
    if recipe is None and overrides:
        found = recipes.to_recipe(overrides)
    else:
        found = recipes.to_recipe(recipe or DEFAULT_RECIPE)
        found = replace(found, config=found.config.overridden_by(overrides))
    return recipes.change_algorithm(found, algorithm) if algorithm is not None else found


def parse_pairs(pairs: list[str]) -> dict[str, Any]:
    """Key -> config of `--set`. Raises `ConfigError`."""
    from llmquant.config.schemes import parse_scheme

    overrides = {}
    for pair in pairs:
        key, equals, scheme = pair.rpartition("=")
        if not equals or not key:
            raise ConfigError(f"--set needs KEY=SCHEME, not {pair!r}", hint="for instance --set _embedding=int8")
        overrides[key] = parse_scheme(scheme)
    return overrides


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
    print_kept(report.skipped)
    ratio = report.bytes_after / max(report.bytes_before, 1)
    console.print(
        f"{size(report.bytes_before)} -> {size(report.bytes_after)} ({ratio:.1%}) in {report.seconds:.1f} s: {output}",
        highlight=False,
        soft_wrap=True,
    )
