"""`llmquant sweep`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmquant.cli.console import console, errors
from llmquant.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from llmquant.study.engines import Engine, Progress
    from llmquant.study.run import Sweep
    from llmquant.study.spec import Resources, Study

_YAML = (".yaml", ".yml")


def sweep(
    what: Annotated[
        list[str], typer.Argument(metavar="STUDY.yaml | MODEL...", help="A study's file, or folders or hub ids.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder of the study; NAME-study unless you say.")] = None,
    recipes: Annotated[
        str | None, typer.Option(help="Names, paths or schemes, with commas: int8,int4-g64,./mine.yaml.")
    ] = None,
    bits: Annotated[
        str | None, typer.Option(help="Budgets, with commas: a scheme for each weight, as `quantize --bits`.")
    ] = None,
    schemes: Annotated[str | None, typer.Option(help="What --bits chooses from, with commas.")] = None,
    algorithms: Annotated[
        str | None,
        typer.Option(help="With commas: each is tried with each recipe whose formats have it."),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Texts to measure on, with commas: builtin (the default), wikitext2, or paths.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens a window; 2048 unless you say.")] = None,
    windows: Annotated[int | None, typer.Option(help="Windows to score; 8 unless you say, 0 for all.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="To compute quality in; float32 unless you say."),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="With commas: quality,noise,size,speed,layers,tasks."),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Names of lm-eval's tasks, with commas; llmquant[tasks].")] = None,
    calib: Annotated[
        str | None, typer.Option(help="Text that recipes read: builtin (the default), wikitext2 (train), or a path.")
    ] = None,
    calib_tokens: Annotated[int | None, typer.Option(help="Tokens of it; as for `quantize`.")] = None,
    seed: Annotated[int | None, typer.Option(help="Which windows of it.")] = None,
    engine: Annotated[str, typer.Option(help="What runs cells: local (processes) or ray; llmquant[ray].")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster, whose machines all see --out; else Ray starts here.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time, with --engine local.")] = 1,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of each cell; by default the cores are shared out. Last digits depend on it, so that cells of "
            "another number are computed anew.",
        ),
    ] = None,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Keep the quantized checkpoints, in OUT/models.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed/--keep-failed", help="Whether cells that failed before are tried again.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list the cells, which of them are there, and the disk they need.")
    ] = False,
) -> None:
    """Compare many ways to quantize a model, and make a report of them.

    Each candidate is measured against the 16-bit model, whose predictions are computed once. Everything that is
    finished is kept under a hash of what it depends on (bytes of the model, recipe, text, protocol, versions), so that
    the same command goes on behind an interruption, and a recipe more costs one cell. A cell that fails is noted, and
    the others go on. Sizes and speed are measured last, one at a time.

    Options change what a study's file says. Exit status: 0 done, 1 if a cell failed, 2 an error before any, 130 after
    Ctrl-C, which stops the workers and keeps what is finished.

    Examples:

    * `llmquant sweep ./SmolLM2 --recipes int8,int4-g64,int3-g32 --algorithms search,gptq --calib ./train.txt`

    * `llmquant sweep evals/studies/smollm2.yaml --text ./wiki.test.raw --dry-run`

    * `llmquant sweep study.yaml --engine ray --address 10.0.0.1:6379 --out /shared/study`
    """
    calibration = {"text": calib, "tokens": calib_tokens, "seed": seed}
    given = {
        **{"recipes": recipes, "bits": bits, "schemes": schemes, "algorithms": algorithms, "texts": text},
        **{"context": context, "windows": windows, "dtype": dtype, "metrics": metrics, "tasks": tasks},
    }
    study = build_study(what, {k: v for k, v in given.items() if v is not None}, calibration)
    folder = out or Path(f"{study.name}-study")
    make = choose_engine(engine, address, jobs, study.resources)
    if dry_run:
        from llmquant.cli.sweep_view import print_plan

        print_plan(study, folder, jobs, threads, retry_failed)
        return
    done = _run(study, folder, make, jobs, threads, keep_models, retry_failed)
    _tell(done)
    if done.failed:
        raise typer.Exit(1)


def build_study(what: list[str], given: dict[str, Any], calibration: dict[str, Any]) -> Study:
    """The study of a file, or of models, with what options say in place of what the file says. Raises `StudyError`."""
    from llmquant.study.spec import parse_study, read_study

    reading = {key: value for key, value in calibration.items() if value is not None}
    if any(name.endswith(_YAML) for name in what):
        if len(what) > 1:
            raise ConfigError("one study's file at a time, and no models beside it", where=", ".join(what))
        content, where = read_study(Path(what[0])), what[0]
    else:
        name = Path(what[0]).resolve().name if Path(what[0]).exists() else what[0].rpartition("/")[2]
        content, where = {"name": name, "models": what}, "command line"
    if reading:
        own = content.get("calibration")
        content["calibration"] = {**(own if isinstance(own, dict) else {}), **reading}
    return parse_study({**content, **given}, where)


def choose_engine(
    name: str, address: str | None, jobs: int, resources: Resources
) -> Callable[[Callable[[str], Path], Progress], Engine]:
    """What makes the engine. Raises `ConfigError` for one that does not exist and for options that another one has."""
    if name not in ("local", "ray"):
        raise ConfigError(f"there is no engine {name!r}", hint="local or ray")
    if address is not None and name != "ray":
        raise ConfigError("--address is of --engine ray")
    if name == "ray":
        from llmquant.study.engines.ray import RayEngine, require_ray

        require_ray()
        return lambda log, progress: RayEngine(address, resources)
    from llmquant.study.engines.local import LocalEngine

    return lambda log, progress: LocalEngine(jobs, log, progress)


def _run(
    study: Study, folder: Path, make: Any, jobs: int, threads: int | None, keep_models: bool, retry_failed: bool
) -> Sweep:
    from llmquant.cli.sweep_view import watching
    from llmquant.study.run import run_study

    try:
        with watching() as watch:
            return run_study(
                study,
                folder,
                engine=make,
                jobs=jobs,
                threads=threads,
                keep_models=keep_models,
                retry_failed=retry_failed,
                watch=watch,
            )
    except KeyboardInterrupt as interruption:
        errors.print("interrupted; what is finished is kept, and the same command goes on behind it")
        raise typer.Exit(130) from interruption


def _tell(done: Sweep) -> None:
    """The results, what went wrong, and where the report is."""
    from llmquant.cli.sweep_view import print_results

    for warning in done.warnings:
        errors.print(f"[yellow]warning:[/] {warning}", highlight=False, soft_wrap=True)
    print_results(done.results)
    try:
        from llmquant.report import write_report

        console.print(f"report: {write_report(done.folder)}", highlight=False, soft_wrap=True)
    except MissingDependencyError as error:
        errors.print(f"no report: {error}", highlight=False, soft_wrap=True, markup=False)
        console.print(f"results: {done.folder / 'results.jsonl'}", highlight=False, soft_wrap=True)
