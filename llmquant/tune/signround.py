"""Learns the rounding of one block's weights from what the block should give: the driver of signround."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
from llmquant.tune.batches import drawn

Call = tuple[Sequence[Any], Mapping[str, Any]]
"""Positional and keyword arguments of a block's forward."""

Progress = Callable[[int, int], object]
"""Called with steps done and steps in all."""

SCALE_RATE = 16
"""How far the largest codes may move by their scale, in steps, when shifts move by one; never farther as a share.

So scales of up to four bits move as fast as shifts, which was measured to be best for three and four; with more bits
that would be many codes at a time.
"""

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
    The rate falls linearly to zero. What is learned is kept if it is better than the start on the last sequences seen:
    errors of different sequences do not compare, so that the least of all steps may be that of an easy batch.

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
    work = _Block(block, weights, inputs, targets)
    start, before = work.codes(), work.values()
    chosen: list[int] = []
    for step, chosen in enumerate(drawn(len(inputs), batch, steps, seed)):
        work.step(chosen, (lr or 1 / steps) * (1 - step / steps))
        if progress:
            progress(step + 1, steps)
    return work.codes() if work.error(work.values(), chosen) < work.error(before, chosen) else start


class _Block:
    """A block whose weights are being learned."""

    def __init__(
        self, block: nn.Module, weights: Mapping[str, Learnable], inputs: Sequence[Call], targets: Sequence[Tensor]
    ) -> None:
        self.block, self.inputs, self.targets = block, inputs, targets
        self.parts = {name: _Part(block.get_parameter(name), weight) for name, weight in weights.items()}
        self.others = {name: p.detach() for name, p in block.named_parameters() if name not in weights}
        self.dtype = _dtype(block, self.parts.values(), inputs)

    def codes(self) -> dict[str, list[Codes]]:
        return {name: part.codes() for name, part in self.parts.items()}

    def values(self) -> dict[str, Tensor]:
        """Leaves in place of the parameters."""
        return {name: part.value(self.dtype).requires_grad_() for name, part in self.parts.items()}

    def step(self, chosen: Sequence[int], rate: float) -> None:
        """One step down the error of some sequences."""
        values = self.values()
        with torch.enable_grad():
            for i in chosen:
                self._error(values, i).backward()
        for name, part in self.parts.items():
            part.step(values[name].grad, rate)

    @torch.no_grad()
    def error(self, values: Mapping[str, Tensor], chosen: Sequence[int]) -> float:
        return sum(float(self._error(values, i)) for i in chosen)

    def _error(self, values: Mapping[str, Tensor], index: int) -> Tensor:
        """The squared error of one sequence, summed: signs of gradients count alone, and a mean's vanish in float16."""
        args, kwargs = self.inputs[index]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            given = functional_call(self.block, {**self.others, **values}, tuple(args), dict(kwargs))
            output = given if isinstance(given, Tensor) else given[0]
            return F.mse_loss(output.float(), self.targets[index].float(), reduction="sum")


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
        """The weight as it is rounded now."""
        found = torch.empty_like(self.weight, dtype=dtype)
        for matrix, rounding in zip(self._matrices(found), self.roundings, strict=True):
            matrix.copy_(rounding.value(dtype))
        return found

    def step(self, gradient: Tensor | None, rate: float) -> None:
        if gradient is None:
            return  # nothing in the batch met it
        for matrix, rounding in zip(self._matrices(gradient), self.roundings, strict=True):
            rounding.step(matrix, rate, rate * min(1.0, SCALE_RATE / 2**self.bits))

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
