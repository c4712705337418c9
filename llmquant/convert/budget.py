"""A scheme for each weight under a budget, chosen on the plain model of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmquant.convert.calibrated import FEW_TOKENS, Reading
from llmquant.convert.listener import Listener, Silent
from llmquant.errors import CalibrationError, ConfigError

if TYPE_CHECKING:
    from llmquant.checkpoint.origin import Origin
    from llmquant.config.base import QuantConfig
    from llmquant.tune.mixture import Mixture


@dataclass(frozen=True)
class Budget:
    """So many bits, and what they are spent on.

    Attributes:
        bits: the most bits per quantized weight.
        schemes: to choose from, with commas or as a list; None is the usual ones.
        fixed: keys of an `FqnToConfig` whose weights are not open to the choice.
        algorithm: for all weights whose format has it; scores are taken with it where it needs no calibration run.
        cache: where scores are kept; True is the user's own folder for them.
    """

    bits: float
    schemes: str | Sequence[str] | None = None
    fixed: Mapping[str, Any] | None = None
    algorithm: str | None = None
    cache: Path | bool = True

    def options(self) -> list[QuantConfig]:
        """The schemes as configs. Raises `ConfigError`."""
        from llmquant.tune.budget import SCHEMES
        from llmquant.tune.scope import parse_schemes

        return with_algorithm(list(parse_schemes(self.schemes or SCHEMES).values()), self.algorithm)

    def choose(
        self, model: str | Origin, reading: Reading, dtype: str = "auto", listener: Listener | None = None
    ) -> Mixture:
        """The choice for a model.

        Args:
            model: folder or hub id.
            reading: what scores are taken on.
            dtype: to compute in.
            listener: hears how it goes.

        Raises:
            BudgetError and what else `choose_mixture` raises.
        """
        from llmquant.config.fqn import FqnToConfig
        from llmquant.tune.budget import choose_mixture

        options = self.options()
        plain, tokenizer, _ = load_plain(model, dtype)
        with (listener or Silent()).bar("Choosing") as progress:
            return choose_mixture(
                plain,
                self.bits,
                options,
                reading.text or "builtin",
                tokenizer=tokenizer,
                fixed=FqnToConfig(self.fixed) if self.fixed else None,
                tokens=FEW_TOKENS if reading.tokens is None else reading.tokens,
                seed=reading.seed,
                cache=self.cache,
                progress=progress,
            )


def with_algorithm(options: list[QuantConfig], algorithm: str | None) -> list[QuantConfig]:
    """The same with another algorithm wherever a format has it. Raises `ConfigError` if none has it."""
    changed = [option.with_algorithm(algorithm) for option in options] if algorithm else options
    if algorithm and all(option.algorithm != algorithm for option in changed):
        raise ConfigError(f"none of the schemes has the algorithm {algorithm!r}")
    return changed


def load_plain(model: str | Origin, dtype: str) -> tuple[Any, Any, Path]:
    """A plain model that reads one text, its tokenizer and its folder.

    Raises:
        CalibrationError: for a model that reads two texts.
        AlreadyQuantizedError, ModelNotFoundError: as `quantize_checkpoint`.
    """
    from llmquant.checkpoint.source import open_source, parse_dtype
    from llmquant.integrations.loading import load_tokenizer

    source = open_source(model, parse_dtype(dtype))
    if source.config.get("is_encoder_decoder"):
        raise CalibrationError("an encoder and a decoder read two texts, of which there is one here", where=str(model))
    return source.load(), load_tokenizer(source.folder), source.folder
