"""`llmquant push` and `llmquant card`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmquant.cli.console import console

_Model = Annotated[str, typer.Argument(metavar="OUT", help="Folder of what llmquant quantized.")]
_Base = Annotated[str | None, typer.Option(help="Hub id of the original, where its card or config does not tell.")]
_Eval = Annotated[Path | None, typer.Option("--eval", help="What `llmquant eval OUT --json FILE` wrote, for the card.")]


def push(
    model: _Model,
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hugging Face hub: USER/NAME; made if need be.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository; by default as the account says.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    base_model: _Base = None,
    evaluation: _Eval = None,
) -> None:
    """Upload a quantized checkpoint to the Hugging Face hub, as one commit.

    It is verified first, and gets a model card (README.md, see `llmquant card`) unless it has one. Needs a token:
    `hf auth login`, or HF_TOKEN. If it breaks off the repository stays as it was, and files that arrived are not sent
    again.
    """
    from llmquant.hub.push import push_to_hub

    address = push_to_hub(
        *(model, repo_id),
        private=private,
        revision=revision,
        message=message,
        base_model=base_model,
        evaluation=evaluation,
    )
    console.print(address, highlight=False, soft_wrap=True)


def card(
    model: _Model,
    repo_id: Annotated[str | None, typer.Option(help="Where it will lie on the hub, for the snippet.")] = None,
    base_model: _Base = None,
    evaluation: _Eval = None,
) -> None:
    """Print the model card of a quantized checkpoint: recipe, sizes, evaluation, how to load it."""
    from llmquant.hub.card import model_card

    typer.echo(model_card(model, repo_id=repo_id, base_model=base_model, evaluation=evaluation), nl=False)
