"""Observers of second moments: the mean square of each column's inputs, and the Hessian of the squared error."""

from __future__ import annotations

from torch import Tensor


class MeanSquareObserver:
    """E[x_k^2] of each input column k: llama.cpp's importance matrix."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sum: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Takes note of inputs [..., K] of any float dtype."""
        squares = x.detach().flatten(0, -2).float().square().sum(0).double()
        self._sum = squares if self._sum is None else self._sum + squares
        self.tokens += x.shape[:-1].numel()

    def mean(self) -> Tensor | None:
        """float32 [K]; None before the first token."""
        return None if self._sum is None or not self.tokens else (self._sum / self.tokens).float()


class HessianObserver:
    """E[x x^T]: half of the Hessian of a row's squared output error in the weights (GPTQ's H)."""

    def __init__(self, gram: Gram) -> None:
        self.tokens = 0
        self._gram = gram
        self._sum: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Takes note of inputs [..., K] of any float dtype."""
        found = self._gram(x.detach())
        self._sum = found.clone() if self._sum is None else self._sum.add_(found)
        self.tokens += x.shape[:-1].numel()

    def mean(self) -> Tensor | None:
        """float32 [K, K]; None before the first token."""
        return None if self._sum is None or not self.tokens else self._sum / self.tokens


class Gram:
    """x^T x of inputs [..., K], float32 [K, K], computed once for weights that meet the same input in turn."""

    def __init__(self) -> None:
        self._last: Tensor | None = None  # kept, so that no other tensor takes its place in memory
        self._version = -1
        self._product: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._product is None or not self._is_last(x):
            rows = x.flatten(0, -2).float()
            self._last, self._product = x, rows.T @ rows
            self._version = -1 if x.is_inference() else x._version
        return self._product

    def _is_last(self, x: Tensor) -> bool:
        """Whether a tensor is the last one's values in the same place; of inference tensors that cannot be told."""
        if self._last is None or x.is_inference() or x._version != self._version:
            return False
        place, last = ((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in (x, self._last))
        return place == last
