"""`llmquant quantize --bits`: loads the plain model, chooses a scheme for each weight, and says what was compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from llmquant.cli.console import errors, progress_bar, size
from llmquant.errors import CalibrationError, ConfigError, LlmQuantError

if TYPE_CHECKING:
    from llmquant.cli.calibrated import Reading
    from llmquant.config.base import QuantConfig
    from llmquant.config.fqn import FqnToConfig
    from llmquant.tune.mixture import Mixture


@dataclass(frozen=True)
class Budget:
    """What `--bits` and the options beside it say.

    Attributes:
        bits: the most bits per quantized weight.
        schemes: to choose from, with commas; None is the usual ones.
        fixed: what `--set` says.
        algorithm: for all weights whose format has it; scores are taken with it where it needs no calibration run.
        save_recipe, plot: files to write.
    """

    bits: float
    schemes: str | None
    fixed: Mapping[str, Any]
    algorithm: str | None = None
    save_recipe: Path | None = None
    plot: Path | None = None

    def choose(self, model: str, reading: Reading, dtype: str = "auto") -> FqnToConfig:
        """The config for a model; its recipe and its plot are written, and what was compared is told on stderr.

        Args:
            model: folder or hub id.
            reading: what scores are taken on.
            dtype: to compute in.

        Raises:
            BudgetError and what else `choose_mixture` raises.
        """
        from llmquant.cli.calibrated import FEW_TOKENS
        from llmquant.config.fqn import FqnToConfig
        from llmquant.tune.budget import SCHEMES, choose_mixture
        from llmquant.tune.scope import parse_schemes

        if self.plot:
            from llmquant.cli.bench_plot import require_matplotlib

            require_matplotlib()
        options = with_algorithm(list(parse_schemes(self.schemes or SCHEMES).values()), self.algorithm)
        plain, tokenizer, folder = load_plain(model, dtype)
        with progress_bar("Choosing") as progress:
            found = choose_mixture(
                plain,
                self.bits,
                options,
                reading.text or "builtin",
                tokenizer=tokenizer,
                fixed=FqnToConfig(self.fixed) if self.fixed else None,
                tokens=FEW_TOKENS if reading.tokens is None else reading.tokens,
                seed=reading.seed,
                progress=progress,
            )
        print_mixture(found)
        self._write(found, folder.name)
        return found.config

    def _write(self, found: Mixture, model: str) -> None:
        if self.save_recipe:
            write_text(found.to_yaml(model), self.save_recipe)
            errors.print(f"recipe: {self.save_recipe}", highlight=False, soft_wrap=True)
        if self.plot:
            from llmquant.cli.tune_plot import draw_scores

            draw_scores(found.scores, self.plot, found.chosen.schemes, title_of(found, model))
            errors.print(f"plot: {self.plot}", highlight=False, soft_wrap=True)


def with_algorithm(options: list[QuantConfig], algorithm: str | None) -> list[QuantConfig]:
    """The same with another algorithm wherever a format has it. Raises `ConfigError` if none has it."""
    changed = [option.with_algorithm(algorithm) for option in options] if algorithm else options
    if algorithm and all(option.algorithm != algorithm for option in changed):
        raise ConfigError(f"none of the schemes has the algorithm {algorithm!r}")
    return changed


def load_plain(model: str, dtype: str) -> tuple[Any, Any, Path]:
    """A plain model that reads one text, its tokenizer and its folder.

    Raises:
        CalibrationError: for a model that reads two texts.
        AlreadyQuantizedError, ModelNotFoundError: as `quantize_checkpoint`.
    """
    from llmquant.checkpoint.source import open_source, parse_dtype
    from llmquant.integrations.transformers import load_tokenizer

    source = open_source(model, parse_dtype(dtype))
    if source.config.get("is_encoder_decoder"):
        raise CalibrationError("an encoder and a decoder read two texts, of which there is one here", where=model)
    return source.load(), load_tokenizer(source.folder), source.folder


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
