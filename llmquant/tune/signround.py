"""Learns the rounding of one block's weights from what the block should give: the driver of signround."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from llmquant.algorithms import Codes
from llmquant.algorithms.search import search
from llmquant.algorithms.signround import Rounding
from llmquant.config.base import QuantConfig
from llmquant.config.candidates import Candidate
from llmquant.formats import get_format
from llmquant.primitives.stats import InputStats
from llmquant.quantize.weight import importance_of

Call = tuple[Sequence[Any], Mapping[str, Any]]
"""Positional and keyword arguments of a block's forward."""

Progress = Callable[[int, int], object]
"""Called with steps done and steps in all."""

SCALE_RATE = 1.0
"""How far factors of scales move, as shares, when shifts move one step between codes."""

_FEW_BITS = 5  # up to so many, the rounding of a bfloat16 is nothing beside that of the weight


@dataclass(frozen=True, eq=False)
class Learnable:
    """A weight whose rounding is to be learned.

    Attributes:
        candidate: which says its shape and how it stands.
        config: of an integer format, with scales per group or row.
        stats: of its inputs; `search` weighs errors by their mean square where it is there.
        codes: of each matrix, what to start from instead of search's: of GPTQ, for instance.
    """

    candidate: Candidate
    config: QuantConfig
    stats: InputStats | None = None
    codes: Sequence[Codes] | None = None


def learn_block(
    block: nn.Module,
    weights: Mapping[str, Learnable],
    inputs: Sequence[Call],
    targets: Sequence[Tensor],
    *,
    steps: int = 50,
    batch: int = 8,
    seed: int = 0,
    lr: float | None = None,
    progress: Progress | None = None,
) -> dict[str, list[Codes]]:
    """Codes for the weights of a block under which it gives what it should, as nearly as some steps can learn.

    Signed gradient descent on the mean squared error of the block's output (Cheng et al., 2023, arXiv:2309.05516).
    The rate falls linearly to zero; the step with the least error on its sequences is kept.

    Args:
        block: called with `inputs`; its first output counts. It is left as it was.
        weights: name of a parameter within the block -> what is to become of it.
        inputs: of each sequence, what the block is called with: what the blocks before it give, quantized as they are.
        targets: of each sequence, the output of the unquantized block behind unquantized ones.
        steps: how many; 0 gives the start.
        batch: sequences a step.
        seed: of the order in which sequences are seen.
        lr: the first step of a shift, in steps between codes; by default 1 / steps.
        progress: called after each step.

    Returns:
        Of each weight the codes of its matrices (one, or one an expert), for `quantize_weight(..., codes=...)`.
    """
    parts = {name: _Part(block.get_parameter(name), weight) for name, weight in weights.items()}
    dtype = _dtype(block, parts.values(), inputs)
    fixed = {name: p.detach() for name, p in block.named_parameters() if name not in parts}
    best, least = {name: part.codes() for name, part in parts.items()}, float("inf")
    for step, chosen in enumerate(_batches(len(inputs), batch, steps, seed)):
        values = {name: part.value(dtype) for name, part in parts.items()}
        loss = sum(_backward(block, fixed | values, inputs[i], targets[i], dtype) for i in chosen) / len(chosen)
        if loss < least:
            best, least = {name: part.codes() for name, part in parts.items()}, loss
        for name, part in parts.items():
            part.step(values[name].grad, (lr or 1 / steps) * (1 - step / steps))
        if progress:
            progress(step + 1, steps)
    return best


class _Part:
    """A weight of the block, as the roundings of its matrices."""

    def __init__(self, weight: Tensor, learnable: Learnable) -> None:
        self.weight, self.candidate = weight.detach(), learnable.candidate
        self.bits = get_format(learnable.config.format).bits
        logical = self._matrices(self.weight)
        spec = learnable.config.spec(*logical.shape[-2:])
        starts = learnable.codes or [_search(m, learnable, i) for i, m in enumerate(logical)]
        self.roundings = [Rounding(m, start, spec) for m, start in zip(logical, starts, strict=True)]

    def codes(self) -> list[Codes]:
        return [rounding.codes() for rounding in self.roundings]

    def value(self, dtype: torch.dtype) -> Tensor:
        """A leaf in place of the parameter."""
        found = torch.empty_like(self.weight, dtype=dtype)
        for matrix, rounding in zip(self._matrices(found), self.roundings, strict=True):
            matrix.copy_(rounding.value(dtype))
        return found.requires_grad_()

    def step(self, gradient: Tensor | None, rate: float) -> None:
        if gradient is None:
            return  # nothing in the batch met it
        for matrix, rounding in zip(self._matrices(gradient), self.roundings, strict=True):
            rounding.step(matrix, rate, rate * SCALE_RATE)

    def _matrices(self, weight: Tensor) -> Tensor:
        """[matrices, out, in]"""
        shaped = weight.view(-1, *self.candidate.shape[-2:])
        return shaped.mT if self.candidate.transposed else shaped


def _search(matrix: Tensor, learnable: Learnable, index: int) -> Codes:
    """What `quantize_weight` would choose by search."""
    stats, rows = learnable.stats or InputStats(), matrix.float().contiguous()
    if len(learnable.candidate.shape) == 3:
        stats = stats.of_expert(index)
    return search(rows, importance_of(rows, stats.mean_square), learnable.config.spec(*rows.shape))


def _dtype(block: nn.Module, parts: Iterable[_Part], inputs: Sequence[Call]) -> torch.dtype:
    """What weights are multiplied in: their own dtype, or bfloat16 for few bits where processor and block bear it."""
    found = list(parts)
    own = found[0].weight
    fast = own.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    if fast and own.dtype is torch.float32 and all(part.bits <= _FEW_BITS for part in found) and inputs:
        return torch.bfloat16 if _bears_autocast(block, inputs[0]) else own.dtype
    return own.dtype


def _bears_autocast(block: nn.Module, call: Call) -> bool:
    """Whether a block runs where products alone are bfloat16; some add them to sums of float32 in place."""
    args, kwargs = call
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            block(*args, **kwargs)
    except RuntimeError:
        return False
    return True


def _batches(count: int, batch: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Which sequences each step sees: all of them in a drawn order, then again in another."""
    generator = torch.Generator().manual_seed(seed)
    left: list[int] = []
    for _ in range(steps):
        while len(left) < min(batch, count):
            left += torch.randperm(count, generator=generator).tolist()
        yield left[:batch]
        left = left[batch:]


def _backward(block: nn.Module, values: dict[str, Tensor], call: Call, target: Tensor, dtype: torch.dtype) -> float:
    """Adds to the gradients of values what one sequence says; returns its mean squared error.

    The gradients are those of the sum: their signs count alone, and small numbers would vanish in float16.
    """
    args, kwargs = call
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        given = functional_call(block, values, tuple(args), dict(kwargs))
        output = given if isinstance(given, Tensor) else given[0]
        loss = F.mse_loss(output.float(), target.float(), reduction="sum")
    loss.backward()
    return float(loss.detach()) / target.numel()
