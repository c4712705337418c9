"""Rotation: the residual stream in another orthogonal basis, where no channel stands out, at no cost at run time.

The offline part of QuaRot (Ashkboos et al., arXiv:2404.00456) and R1 of SpinQuant (Liu et al., arXiv:2405.16406). With
stream x' = Q^T x, a norm with weight g before weights W, and weights V that write the stream:

    W' = W diag(g) Q,    g' = 1,    V' = Q^T V

RMSNorm leaves |x| alone and so commutes with Q. LayerNorm subtracts the mean too, and commutes with a Q that keeps it,
Q 1 = 1; its bias b becomes Q^T (b / g).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from llmquant.errors import BadWeightError, ConfigError, UnknownArchitectureError
from llmquant.quantize import Progress
from llmquant.tune.orthogonal import Kind, make_orthogonal
from llmquant.tune.structure import Feed, Structure, Weight, find_structure

_ROWS = 4096  # worked on at a time, in float64
_SMALLEST_GAIN = 1e-4  # of a norm with a bias, in parts of its largest


@dataclass(frozen=True)
class RotationReport:
    """What `rotate_` did.

    Attributes:
        matrix: the orthogonal matrix in words.
        hidden: channels of the residual stream.
        weights: how many weights were multiplied.
        norms: how many norms were folded into what they feed.
        untied: FQN of a head that shared its weight with the embedding and now has one of its own; None otherwise.
        bytes_added: what that costs, in the model's dtype.
        seconds: how long it took.
    """

    matrix: str
    hidden: int
    weights: int
    norms: int
    untied: str | None
    bytes_added: int
    seconds: float

    def __str__(self) -> str:
        lines = [
            f"residual stream of {self.hidden} channels rotated: {self.matrix}",
            f"  {self.norms} norms folded, {self.weights} weights multiplied in {self.seconds:.1f} s",
        ]
        if self.untied:
            lines.append(
                f"  {self.untied} was tied to the embedding and is not any more: {self.bytes_added / 1e6:.1f} MB more "
                "in float, and _default reaches it now (_head: none keeps it)"
            )
        return "\n".join(lines)


@torch.no_grad()
def rotate_(
    model: nn.Module, kind: Kind = "hadamard", seed: int = 0, *, progress: Progress | None = None
) -> RotationReport:
    """Rotates the residual stream of a plain model in place; what it computes stays the same, up to rounding.

        rotate_(model)
        quantize_(model, "int4-g64")

    Groups of a rotated weight hold values alike in size. Alone that can hurt round-to-nearest on a small model; with an
    algorithm that looks at errors together, like `gptq`, it helps. A tied head gets a weight of its own, for the
    final norm goes into the head and not into the embedding.

    Args:
        model: a transformers model of a known family (`tune/families.py`), not quantized.
        kind: `hadamard` or `random`, see `make_orthogonal`.
        seed: of the matrix.
        progress: called before each weight, with weights done and in all.

    Returns:
        What was done. All checks are made before the first weight changes; a run that is interrupted between two
        weights leaves a model of no use.

    Raises:
        UnknownArchitectureError: for a family that is unknown, or that has norms behind its writers.
        AlreadyQuantizedError, BadWeightError, ConfigError.
    """
    started = time.perf_counter()
    if kind not in get_args(Kind):
        raise ConfigError(f"there is no rotation {kind!r}", hint=" or ".join(get_args(Kind)))
    structure = find_structure(model)
    _check(model, structure)
    matrix, name = make_orthogonal(kind, structure.hidden, seed, keep_mean=structure.family.centered)
    added = _untie(model, structure)
    work = _Rotation(model, structure, matrix, progress)
    work()
    return RotationReport(
        name,
        structure.hidden,
        work.done,
        len(structure.feeds),
        structure.head if structure.tied_to else None,
        added,
        time.perf_counter() - started,
    )


def _check(model: nn.Module, structure: Structure) -> None:
    if structure.post_norms:
        raise UnknownArchitectureError(
            "a norm between the weights that write the residual stream and the stream itself ends every rotation",
            where=structure.post_norms[0],
            hint="awq_ or smoothquant_, which know this family",
        )
    for feed in structure.feeds:
        gain = model.get_parameter(feed.norm) + structure.family.gain_offset
        if not gain.isfinite().all():
            raise BadWeightError("the weight of a norm is not finite", where=feed.norm)
        if feed.bias and gain.abs().min() < _SMALLEST_GAIN * gain.abs().max():
            raise BadWeightError(
                "a channel of a norm has (almost) no weight, but a bias, which then cannot be rotated", where=feed.norm
            )


def _untie(model: Any, structure: Structure) -> int:
    """Gives a tied head a copy of its weight; returns its bytes."""
    if structure.tied_to is None:
        return 0
    weight = model.get_parameter(structure.head)
    path, _, attribute = structure.head.rpartition(".")
    setattr(model.get_submodule(path), attribute, nn.Parameter(weight.clone(), requires_grad=weight.requires_grad))
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    for module in model.modules():
        if hasattr(module, "all_tied_weights_keys"):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)
    return weight.nbytes


class _Rotation:
    """One matrix on its way through a model."""

    def __init__(self, model: nn.Module, structure: Structure, matrix: Tensor, progress: Progress | None) -> None:
        self.model, self.structure, self.matrix, self.progress = model, structure, matrix, progress
        self.total = len(structure.embeddings) + len(structure.writers) + sum(len(f.readers) for f in structure.feeds)
        self.done = 0

    def __call__(self) -> None:
        for weight in self.structure.embeddings:
            self._turn(weight, -1)
        for weight in self.structure.writers:
            self._turn(weight, -1 if weight.transposed or len(weight.shape) == 1 else -2)
            if weight.bias:
                self._multiply(self.model.get_parameter(weight.bias))
        for feed in self.structure.feeds:
            self._feed(feed)

    def _feed(self, feed: Feed) -> None:
        """Folds a norm into its readers, and rotates them."""
        norm, offset = self.model.get_parameter(feed.norm), self.structure.family.gain_offset
        gain = norm.double() + offset
        for weight in feed.readers:
            self._turn(weight, -2 if weight.transposed else -1, gain)
        if feed.bias:
            self._multiply(self.model.get_parameter(feed.bias), 1 / gain)
        norm.fill_(1 - offset)

    def _turn(self, weight: Weight, axis: int, gain: Tensor | None = None) -> None:
        """Multiplies a weight by the matrix along one axis."""
        if self.progress:
            self.progress(self.done, self.total, weight.name)
        self.done += 1
        values = self.model.get_parameter(weight.name).view(weight.shape)
        self._multiply(values if axis == -1 else values.mT, gain)

    def _multiply(self, values: Tensor, gain: Tensor | None = None) -> None:
        """values [..., hidden] <- (values * gain) @ matrix, in place."""
        matrix = self.matrix.to(values.device)
        for rows in values.unbind() if values.dim() == 3 else [values]:
            for part in rows.split(_ROWS) if rows.dim() == 2 else [rows]:
                part.copy_((part.double() if gain is None else part.double() * gain) @ matrix)
