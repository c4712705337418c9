"""`llmquant verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmquant.cli.console import console, progress_bar, size, write_json

if TYPE_CHECKING:
    from llmquant.checkpoint.verify import VerifyReport

STATUS = {"right": 0, "wrong": 1, "unverifiable": 3}
_SHOWN = 20


def verify(
    model: Annotated[str, typer.Argument(metavar="OUT", help="Model folder, quantized by llmquant or plain.")],
    json: Annotated[Path | None, typer.Option(help="Write everything to this file instead ('-': stdout).")] = None,
) -> None:
    """Read a whole checkpoint and name every tensor that is not as it was saved.

    Headers must fit their files, tensors lie where the index says, shards belong to the save that config.json
    describes; the bytes of each tensor must have the sha256 that was saved with them, packed codes no stray bits, and
    codes and scales no NaN or infinity. Nothing is executed, and little memory taken.

    Exit status: 0 all is right, 1 something is wrong, 2 it cannot be looked at, 3 nothing wrong was found, but not
    every tensor was saved with a checksum (plain models, and those of versions before there were any).
    """
    from llmquant.checkpoint.verify import verify as read

    with progress_bar("verifying") as bar:
        report = read(model, bar)
    if json:
        write_json(report.to_dict(), json)
    else:
        _print(report)
    raise typer.Exit(STATUS[report.status])


def _print(report: VerifyReport) -> None:
    for problem in report.problems:
        console.print(f"[bold red]wrong:[/] {_plain(problem.where)}: {_plain(problem.what)}", soft_wrap=True)
    for name in report.unverifiable[:_SHOWN]:
        console.print(f"[yellow]no checksum:[/] {_plain(name)}", highlight=False, soft_wrap=True)
    if len(report.unverifiable) > _SHOWN:
        console.print(f"[yellow]no checksum:[/] {len(report.unverifiable) - _SHOWN} more", highlight=False)
    console.print(
        f"{report.status}: {report.tensors} tensors, {size(report.bytes)}; {report.matched} have their checksum, "
        f"{len(report.unverifiable)} have none, {len(report.problems)} problems",
        highlight=False,
        soft_wrap=True,
    )


def _plain(text: str) -> str:
    """A text from a file as one that acts neither on the terminal nor as markup."""
    from rich.markup import escape

    return escape("".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text))
