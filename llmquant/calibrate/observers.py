"""What an observer keeps of the inputs of one weight (or one expert) while a calibration run shows them to it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Observer(Protocol):
    """Sees all inputs of a weight, some tokens at a time, and says in the end what their range is.

    Attributes:
        tokens: how many it has seen.
    """

    tokens: int

    def update(self, x: Tensor) -> None:
        """Takes note of inputs [..., K] of any float dtype; none of it is kept."""

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest input that codes should reach, float32 [] each, on the CPU."""


class MinMaxObserver:
    """The exact extremes of all inputs."""

    def __init__(self) -> None:
        self.tokens = 0
        self._ends = torch.tensor([torch.inf, -torch.inf])

    def update(self, x: Tensor) -> None:
        """Takes note of inputs [..., K] of any float dtype."""
        if x.numel():
            low, high = (end.float().cpu() for end in torch.aminmax(x.detach()))
            self._ends = torch.stack([torch.minimum(self._ends[0], low), torch.maximum(self._ends[1], high)])
            self.tokens += x.shape[:-1].numel()

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest input, float32 [] each; NaN if any was."""
        return self._ends[0], self._ends[1]
