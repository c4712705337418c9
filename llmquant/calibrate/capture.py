"""Shows the inputs of products to observers while a model runs, however its modules write the product.

Weights are recognised by where they lie in memory, so that a linear layer, a tied head, GPT-2's transposed weight and
each expert of a stack are seen alike, without a hook in any module: when the `with` ends, for whatever reason, nothing
is left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llmquant.config.candidates import Candidate

# A product -> the dimension of the weight that sums run over where it comes right after the input. Matrix products may
# have it the other way round, too.
_PRODUCTS: dict[Callable[..., Any], int] = {F.linear: -1}
_PRODUCTS |= {getattr(owner, name): -2 for owner in (torch, Tensor) for name in ("matmul", "mm", "bmm")}
_PRODUCTS |= {getattr(owner, name): -2 for owner in (torch, Tensor) for name in ("addmm", "baddbmm")}
_PRODUCTS[Tensor.__matmul__] = -2


class Shown(Protocol):
    """Whoever is shown the inputs of a matrix."""

    def update(self, x: Tensor) -> None:
        """Takes note of inputs [..., K] of any float dtype."""


@dataclass(frozen=True)
class Watched:
    """A weight and who is shown its inputs: one observer, or one an expert."""

    candidate: Candidate
    weight: Tensor
    observers: Sequence[Shown]

    @property
    def step(self) -> int:
        """Elements from one column of the logical [out, in] matrix to the next."""
        return self.candidate.shape[-1] if self.candidate.transposed else 1

    def places(self) -> dict[int, int]:
        """Address of each matrix -> its number."""
        size = self.weight.numel() // len(self.observers) * self.weight.element_size()
        return {self.weight.data_ptr() + i * size: i for i in range(len(self.observers))}


class _Place(NamedTuple):
    watched: Watched
    expert: int


class Capture(TorchFunctionMode):
    """While it is entered, every product with a watched weight shows its input to the weight's observer."""

    def __init__(self, watched: Iterable[Watched]) -> None:
        super().__init__()
        self._places = {at: _Place(w, i) for w in watched for at, i in w.places().items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            self._show(_PRODUCTS[func], [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)])
        return func(*args, **kwargs)

    def _show(self, summed: int, operands: list[Tensor]) -> None:
        for left, right in pairwise(operands):
            self._show_one(left, right, summed)
            if summed == -2 and right.dim() > 1:
                self._show_one(right.mT, left, -1)

    def _show_one(self, x: Tensor, weight: Tensor, summed: int) -> None:
        found = self._places.get(weight.data_ptr()) if weight.dim() > 1 else None
        if found is not None and weight.stride(summed) == found.watched.step:
            _update(found, x, weight)


def _update(found: _Place, x: Tensor, weight: Tensor) -> None:
    """Inputs x [..., K] of one matrix, or [experts, ..., K] of a whole stack."""
    observers = found.watched.observers
    if weight.dim() == 2 or len(observers) == 1:
        observers[found.expert].update(x)
        return
    for observer, part in zip(observers, x, strict=True):
        observer.update(part)
