"""What each group of weights costs in each scheme, in bytes and in quality, kept as JSON between runs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.errors import LlmQuantError

VERSION = 1  # of how scores are computed and kept: older files are not read


@dataclass(frozen=True)
class Option:
    """One scheme for a group. `score` is its cost, less being better: nats a token, but for data-free scores."""

    bytes: int
    score: float


@dataclass(frozen=True)
class GroupScores:
    """A group of weights and what each scheme costs it.

    Attributes:
        name: of the group.
        weights: FQNs.
        elements: how many weights.
        options: scheme -> what it costs.
    """

    name: str
    weights: tuple[str, ...]
    elements: int
    options: Mapping[str, Option]


@dataclass(frozen=True)
class Scores:
    """Scores of all groups of a model, in model order.

    Attributes:
        method: `fisher`, `measured` or `data-free`.
        tokens: how many they were taken on.
        groups: one entry a group.
        measured: what was measured besides: a name of a choice (see `budget`) -> mean KL in nats.
    """

    method: str
    tokens: int
    groups: tuple[GroupScores, ...]
    measured: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Scores:
        """The inverse of `to_dict`."""
        groups = tuple(
            GroupScores(
                g["name"], tuple(g["weights"]), g["elements"], {s: Option(**o) for s, o in g["options"].items()}
            )
            for g in content["groups"]
        )
        return cls(content["method"], content["tokens"], groups, dict(content["measured"]))

    def with_measured(self, name: str, kl: float) -> Scores:
        """The same, with one more measurement."""
        return replace(self, measured={**self.measured, name: kl})


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rho of two equally long lists, -1..1: how far they agree on the order. Ties share their mean rank."""
    ranks = torch.stack([_ranks(torch.tensor(values, dtype=torch.float64)) for values in (x, y)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    below = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    return below + (equal - 1) / 2


# --- kept between runs ------------------------------------------------------------------------------------


def fingerprint(model: nn.Module, *facts: Any) -> str:
    """sha256 of a model's parameters and buffers, names and bytes, and of facts, tensors or JSON."""
    digest = hashlib.sha256(f"scores {VERSION}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_raw(tensor))
    for fact in facts:
        digest.update(_raw(fact) if isinstance(fact, Tensor) else json.dumps(fact, sort_keys=True).encode())
    return digest.hexdigest()


def _raw(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def cache_folder() -> Path:
    """Where scores are kept: `LLMQUANT_CACHE`, or else `llmquant` in the user's folder for caches."""
    if own := os.environ.get("LLMQUANT_CACHE"):
        return Path(own) / "scores"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmquant" / "scores"


@dataclass(frozen=True)
class Store:
    """One file of scores, or none: a folder of None keeps nothing.

    Attributes:
        folder: of all files of scores.
        key: what the scores depend on, as `fingerprint` gives it.
    """

    folder: Path | None
    key: str

    @property
    def path(self) -> Path | None:
        """The file."""
        return None if self.folder is None else self.folder / f"{self.key[:32]}.json"

    def read(self) -> Scores | None:
        """The scores; None where there are none, or where the file cannot be read as such."""
        if self.path is None:
            return None
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            return Scores.from_dict(content["scores"]) if content["key"] == self.key else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def write(self, scores: Scores) -> None:
        """Keeps the scores; the file appears whole.

        Raises:
            LlmQuantError: where the folder cannot be written to.
        """
        if self.path is None:
            return
        draft = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps({"key": self.key, "scores": scores.to_dict()}), encoding="utf-8")
            draft.replace(self.path)
        except OSError as error:
            raise LlmQuantError(
                f"scores cannot be kept: {error.strerror}",
                where=str(self.path),
                hint="LLMQUANT_CACHE=FOLDER names another place",
            ) from error


def names(groups: Iterable[GroupScores]) -> list[str]:
    """The weights of some groups."""
    return [name for group in groups for name in group.weights]
