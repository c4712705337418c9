"""`llmquant recipes`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from llmquant.cli.console import console


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print the YAML of this recipe, to copy and change it.")] = None,
) -> None:
    """List the recipes that come with llmquant."""
    from llmquant.config.recipe import find_recipe, list_recipes

    if name:
        typer.echo(find_recipe(name).read_text(encoding="utf-8"), nl=False)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("recipe", "weights", "description"):
        table.add_column(column, no_wrap=column == "recipe", overflow="fold")
    for found in list_recipes():
        weights = "\n".join(f"{key}: {config or 'none'}" for key, config in found.config.items())
        table.add_row(found.name, weights, found.description)
    console.print(table)
