"""What a choice under a budget found: the recipe, what it was compared with, and the scores behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

import llmquant
from llmquant.config.base import QuantConfig
from llmquant.config.fqn import FqnToConfig
from llmquant.config.recipe import RECIPE_VERSION
from llmquant.config.schemes import parse_scheme
from llmquant.tune.scores import Scores

MIXED = "mixed"


@dataclass(frozen=True)
class Contender:
    """A choice by name, its size and, where it was measured, its cost.

    Attributes:
        name: `mixed`, or the scheme that all open weights have.
        schemes: group -> scheme.
        bits: per quantized weight, scales, zero points and padding included: fixed weights count, those that stay in
            float do not. It is what `llmquant eval` and `llmquant inspect` print as bits per quantized weight.
        bytes: of all quantized weights.
        kl: mean KL from the plain model in nats a token, or None.
    """

    name: str
    schemes: Mapping[str, str]
    bits: float
    bytes: int
    kl: float | None = None


@dataclass(frozen=True)
class Mixture:
    """What `choose_mixture` found.

    Attributes:
        config: weight -> scheme, and what was fixed.
        chosen: the answer, one of `compared` where anything was measured.
        compared: the mixture and every uniform recipe of no larger size, measured on the same tokens.
        scores: of all groups in all schemes.
        budget: bits per quantized weight, as asked for.
    """

    config: FqnToConfig
    chosen: Contender
    compared: tuple[Contender, ...]
    scores: Scores
    budget: float

    @property
    def is_uniform(self) -> bool:
        """Whether a uniform recipe turned out better than the mixture."""
        return self.chosen.name != MIXED

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "budget": self.budget,
            "chosen": vars(self.chosen),
            "compared": [vars(other) for other in self.compared],
            "scores": self.scores.to_dict(),
        }

    def to_yaml(self, source: str = "") -> str:
        """An ordinary recipe file, with a header that says what made it."""
        content = {
            "llmquant_recipe": RECIPE_VERSION,
            "description": f"{self.chosen.bits:.3f} bits per quantized weight, chosen by scores.",
            "weights": {key: _spelled(config) for key, config in self.config.items()},
        }
        header = "".join(f"# {line}\n" for line in self._lines(source))
        return header + yaml.safe_dump(content, sort_keys=False, width=120)

    def _lines(self, source: str) -> list[str]:
        what = "a uniform recipe, better than the mixture" if self.is_uniform else "a mixture"
        lines = [
            f"Made by llmquant {llmquant.__version__}{f' for {source}' if source else ''}: {what} within "
            f"{self.budget:g} bits per quantized weight.",
            f"Scores: {self.scores.method} on {self.scores.tokens} tokens. It takes {self.chosen.bytes:,} bytes, "
            "scales and padding included.",
        ]
        return lines + [f"Mean KL of {c.name} ({c.bits:.3f} bits): {c.kl:.5f} nats" for c in self.compared]

    def __str__(self) -> str:
        kinds = list(self.chosen.schemes.values())
        counts = ", ".join(f"{kinds.count(name)} {name}" for name in sorted(set(kinds)))
        measured = "" if self.chosen.kl is None else f", KL {self.chosen.kl:.4f} nats"
        lines = [f"{self.chosen.name}: {self.chosen.bits:.3f} bits per quantized weight{measured} (groups: {counts})"]
        lines += [f"  {c.name}: {c.bits:.3f} bits, KL {c.kl:.4f}" for c in self.compared if c is not self.chosen]
        return "\n".join(lines + (["  a uniform recipe beats the mixture, so it is the answer"] * self.is_uniform))


def _spelled(config: Any) -> str | dict[str, Any]:
    """A scheme where it says all, else the fields of the config."""
    if config is None:
        return "none"
    assert isinstance(config, QuantConfig)
    return config.scheme if parse_scheme(config.scheme) == config else config.to_dict()
