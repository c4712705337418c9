"""The part of `llmquant quantize --bits` that people see: what was compared, the recipe and the plot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from llmquant.cli.console import errors, size
from llmquant.errors import ConfigError, LlmQuantError

if TYPE_CHECKING:
    from llmquant.tune.mixture import Mixture


@dataclass(frozen=True)
class Choice:
    """Tells what a budget chose.

    Attributes:
        model: name for the recipe and the plot.
        save_recipe, plot: files to write.
    """

    model: str
    save_recipe: Path | None = None
    plot: Path | None = None

    def check(self) -> None:
        """Raises `MissingDependencyError` if there is a plot to draw and nothing to draw it with."""
        if self.plot:
            from llmquant.cli.bench_plot import require_matplotlib

            require_matplotlib()

    def tell(self, found: Mixture) -> None:
        """What was compared on stderr; the recipe and the plot to their files."""
        print_mixture(found)
        if self.save_recipe:
            write_text(found.to_yaml(self.model), self.save_recipe)
            errors.print(f"recipe: {self.save_recipe}", highlight=False, soft_wrap=True)
        if self.plot:
            from llmquant.cli.tune_plot import draw_scores

            draw_scores(found.scores, self.plot, found.chosen.schemes, title_of(found, self.model))
            errors.print(f"plot: {self.plot}", highlight=False, soft_wrap=True)


def check_unused(options: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for options that mean nothing without `--bits`."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{name} needs --bits", hint="for instance --bits 4.25")


def check_alone(recipe: str | None) -> None:
    """Raises `ConfigError` where a recipe and a budget would both say what each weight gets."""
    if recipe is not None:
        raise ConfigError(
            "--bits chooses the scheme of every weight, and --recipe names it",
            hint="keep one of them; --set fixes single weights beside --bits",
        )


def print_mixture(found: Mixture) -> None:
    """What was compared, best first, and how many groups have each scheme, on stderr: results of commands are on
    stdout."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("choice", "bits (q)", "size", "KL"):
        table.add_column(name, justify="left" if name == "choice" else "right")
    for other in sorted(found.compared, key=lambda other: other.kl or 0.0):
        bold = "bold" if other == found.chosen else ""
        kl = "-" if other.kl is None else f"{other.kl:.5f}"
        table.add_row(other.name, f"{other.bits:.3f}", size(other.bytes), kl, style=bold)
    errors.print(table, highlight=False)
    kinds = list(found.chosen.schemes.values())
    counts = ", ".join(f"{kinds.count(name)} x {name}" for name in dict.fromkeys(sorted(kinds)))
    errors.print(f"{len(kinds)} groups of weights: {counts}", highlight=False)
    if found.is_uniform:
        errors.print("[yellow]a uniform recipe beats the mixture, so it is taken[/]", highlight=False)


def title_of(found: Mixture, model: str) -> str:
    """The headline of the plot."""
    kl = "" if found.chosen.kl is None else f", KL {found.chosen.kl:.4f} nats"
    return f"{model}: {found.chosen.bits:.2f} bits per quantized weight ({found.chosen.name}{kl})"


def write_text(text: str, path: Path) -> None:
    """Raises `LlmQuantError` where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LlmQuantError(f"cannot write the recipe: {error.strerror}", where=str(path)) from error
