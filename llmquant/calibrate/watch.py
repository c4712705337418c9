"""Which weights are watched for what, and what their observers say in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmquant.calibrate.capture import Watched
from llmquant.calibrate.moments import Gram, HessianObserver, MeanSquareObserver
from llmquant.calibrate.observers import MinMaxObserver, Observer, observer_factory
from llmquant.config.candidates import Candidate
from llmquant.errors import CalibrationError
from llmquant.primitives.dynamic import Activation
from llmquant.primitives.stats import InputStats

RANGE, MEAN_SQUARE, HESSIAN = "low", "mean_square", "hessian"


class Notes:
    """What is kept of the inputs of one matrix: their range, their mean squares, their Hessian, as far as asked for."""

    def __init__(self, fields: frozenset[str], gram: Gram, observer: Callable[[], Observer] = MinMaxObserver) -> None:
        self.tokens = 0
        self.range = observer() if RANGE in fields else None
        self.hessian = HessianObserver(gram) if HESSIAN in fields else None
        self.mean_square = MeanSquareObserver() if MEAN_SQUARE in fields else None

    def update(self, x: Tensor) -> None:
        """Takes note of inputs [..., K]."""
        self.tokens += x.shape[:-1].numel()
        for kept in (self.range, self.hessian, self.mean_square):
            if kept is not None and x.numel():
                kept.update(x)


class Asked(NamedTuple):
    """A weight to watch.

    candidate: which.
    fields: those of `InputStats` that are asked for; `low` means the range.
    activation: how its inputs are quantized, if they are.
    """

    candidate: Candidate
    fields: frozenset[str]
    activation: Activation | None


class Watch:
    """The weights of a model that a calibration run watches.

    Args:
        model: the model that runs.
        wanted: the weights, and what is asked of each.
        observer: what finds the range of one matrix's inputs, by name, or a function that makes it.
    """

    def __init__(
        self, model: nn.Module, wanted: Sequence[Asked], observer: str | Callable[[], Observer] = "minmax"
    ) -> None:
        gram = Gram()

        def notes(asked: Asked) -> list[Notes]:
            matrices = asked.candidate.shape[0] if len(asked.candidate.shape) == 3 else 1
            made = observer_factory(observer, asked.activation)
            return [Notes(asked.fields, gram, made) for _ in range(matrices)]

        self._notes = [notes(asked) for asked in wanted]
        self.watched = [
            Watched(asked.candidate, model.get_parameter(asked.candidate.name).detach(), kept)
            for asked, kept in zip(wanted, self._notes, strict=True)
        ]

    def stats(self) -> tuple[dict[str, InputStats], tuple[str, ...]]:
        """FQN -> what was seen of its inputs, and warnings about experts that saw too little.

        Raises:
            CalibrationError: for weights that no token reached, and for inputs that are not finite.
        """
        pairs = [(watched.candidate, kept) for watched, kept in zip(self.watched, self._notes, strict=True)]
        _refuse_unseen([candidate.name for candidate, kept in pairs if not any(n.tokens for n in kept)])
        found = {candidate.name: _finite(candidate.name, _stats(candidate, kept)) for candidate, kept in pairs}
        warnings = (_few_tokens(candidate.name, kept, found[candidate.name]) for candidate, kept in pairs)
        return found, tuple(filter(None, warnings))


def _refuse_unseen(names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise CalibrationError(
            "the calibration run never multiplied by these weights",
            where=", ".join(names[:3]) + more,
            hint="more or other tokens, or a scheme for them that needs no calibration",
        )


def _stats(candidate: Candidate, kept: Sequence[Notes]) -> InputStats:
    """Those of one matrix, or of a stack with a dimension of experts in front."""
    tokens = torch.tensor([n.tokens for n in kept])
    fields: dict[str, Tensor] = {"tokens": tokens}
    if kept[0].range is not None:
        fields |= _ranges(kept)
    if kept[0].hessian is not None:
        fields["hessian"] = _pooled([n.hessian.mean() for n in kept if n.hessian], tokens)
        fields["mean_square"] = fields["hessian"].diagonal(dim1=-2, dim2=-1).contiguous()
    elif kept[0].mean_square is not None:
        fields["mean_square"] = _pooled([n.mean_square.mean() for n in kept if n.mean_square], tokens)
    if len(candidate.shape) == 2:
        fields = {name: value[0] for name, value in fields.items()}
    return InputStats(**fields)


def _ranges(kept: Sequence[Notes]) -> dict[str, Tensor]:
    """Ranges [experts]; experts that met no token get the widest range of the others."""
    seen = torch.tensor([bool(n.tokens) for n in kept])
    ends = torch.stack([torch.stack(n.range.bounds()) for n in kept if n.range and n.tokens])  # [seen, 2]
    low, high = torch.full((len(kept),), float(ends[:, 0].min())), torch.full((len(kept),), float(ends[:, 1].max()))
    low[seen], high[seen] = ends[:, 0], ends[:, 1]
    return {"low": low, "high": high}


def _pooled(means: Sequence[Tensor | None], tokens: Tensor) -> Tensor:
    """Means of each expert's inputs, [experts, ...]; one that saw fewer tokens than columns borrows the rest of all.

    So the mean of n < K tokens counts n times, that of all experts' tokens K - n times.
    """
    first = next(mean for mean in means if mean is not None)
    own = torch.stack([torch.zeros_like(first) if mean is None else mean for mean in means])
    columns = own.shape[-1]
    weights = (tokens / tokens.sum()).to(own).view(-1, *[1] * first.dim())
    everyone = (own * weights).sum(0)
    share = (tokens.clamp(max=columns) / columns).to(own).view_as(weights)
    return own if len(means) == 1 else own * share + everyone * (1 - share)


def _finite(name: str, stats: InputStats) -> InputStats:
    for found in (stats.low, stats.high, stats.mean_square):
        if found is not None and not found.isfinite().all():
            raise CalibrationError(
                "the inputs of a weight are not finite",
                where=name,
                hint="a wider dtype for the model, or a check of its weights",
            )
    return stats


def _few_tokens(name: str, kept: Sequence[Notes], stats: InputStats) -> str | None:
    """A warning about experts that saw no token, or fewer than their moments need."""
    if len(kept) == 1:
        return None
    columns = 1 if stats.mean_square is None else stats.mean_square.shape[-1]
    few = [i for i, notes in enumerate(kept) if notes.tokens < columns]
    if not few:
        return None
    named = ", ".join(f"{i} ({kept[i].tokens})" for i in few[:8]) + (
        f" and {len(few) - 8} more" if len(few) > 8 else ""
    )
    if stats.mean_square is None:
        instead = "their inputs get the widest range of the others"
    else:
        instead = f"below {columns} tokens, the inputs of all experts count for the rest"
    return f"{name}: too few tokens chose {len(few)} of {len(kept)} experts ({named}); {instead}"


def weighed(stats: Mapping[str, InputStats], importance: Mapping[str, InputStats]) -> dict[str, InputStats]:
    """Statistics with the mean squares of another run in place of their own."""
    found = dict(stats)
    for name, other in importance.items():
        found[name] = replace(found.get(name, InputStats()), mean_square=other.mean_square)
    return found
