"""The order in which training sees its sequences."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def drawn(count: int, batch: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Which of `count` sequences each step sees: all of them in a drawn order, then again in another."""
    generator = torch.Generator().manual_seed(seed)
    left: list[int] = []
    for _ in range(steps):
        while len(left) < min(batch, count):
            left += torch.randperm(count, generator=generator).tolist()
        yield left[:batch]
        left = left[batch:]
