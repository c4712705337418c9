"""The command `llmquant`."""

from __future__ import annotations

import sys

import typer

import llmquant
from llmquant.cli import (
    bench,
    compare,
    evaluate,
    export,
    info,
    inspect,
    push,
    quantize,
    recipes,
    refine,
    reports,
    sensitivity,
    sweep,
)
from llmquant.cli import import_ as importing
from llmquant.cli import run as run_program
from llmquant.cli import verify as verify_checkpoint
from llmquant.cli.console import errors
from llmquant.errors import LlmQuantError

app = typer.Typer(
    name="llmquant",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a large language model smaller, keep it as ordinary safetensors, and see what it cost.",
    epilog="Start with: `llmquant quantize MODEL -o OUT --recipe int4-g32`, then `llmquant eval OUT --baseline MODEL`.",
)
app.command("quantize")(quantize.quantize)
app.command("refine")(refine.refine)
app.command("eval")(evaluate.evaluate)
app.command("sweep")(sweep.sweep)
app.command("export")(export.export)
app.command("push")(push.push)
app.command("card")(push.card)
app.command("import")(importing.import_model)
app.command("inspect")(inspect.inspect)
app.command("verify")(verify_checkpoint.verify)
app.command("recipes")(recipes.recipes)
app.command("sensitivity")(sensitivity.sensitivity)
app.command("compare")(compare.compare)
app.command("report")(reports.report)
app.command("compare-reports")(reports.compare_reports)
app.command("bench")(bench.bench)
app.command("info")(info.info)
app.command("run", context_settings={"allow_interspersed_args": False})(run_program.run)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"llmquant {llmquant.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", callback=_version, is_eager=True
    ),
) -> None:
    del version


def main() -> None:
    """Runs the command line. Exit status: 0 done, 1 a limit broken, 2 or its own an error told, 130 interrupted.

    `verify` has two of its own: 1 for what is wrong, 3 for what nobody vouches for.
    """
    try:
        app()
    except LlmQuantError as error:
        errors.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.status)
    except KeyboardInterrupt:
        errors.print("interrupted; nothing was left half-written")
        sys.exit(130)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
