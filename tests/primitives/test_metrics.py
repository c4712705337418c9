"""Signal to noise in dB against its definition in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmquant.primitives.metrics import compute_error


@given(st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_definition(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 5, generator=generator).to(dtype)
    y = x + (0.1 * torch.randn(3, 5, generator=generator)).to(dtype)
    a, b = x.double().numpy(), y.double().numpy()
    expected = 10 * np.log10((a**2).sum() / ((a - b) ** 2).sum())
    assert compute_error(x, y).item() == pytest.approx(expected)


def test_known_values() -> None:
    x = torch.tensor([3.0, 4.0])
    assert compute_error(x, x).item() == math.inf
    assert compute_error(x, torch.zeros(2)).item() == 0
    assert compute_error(x, 0.9 * x).item() == pytest.approx(20)
    assert compute_error(x * 1e30, x * 0.9e30).item() == pytest.approx(20)  # no overflow in float32
