"""Observers against what all inputs together say."""

from __future__ import annotations

import pytest
import torch

from llmquant.calibrate.observers import MinMaxObserver


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_range_is_that_of_everything_seen_however_it_came(dtype: torch.dtype) -> None:
    x = torch.randn(30, 8).to(dtype)
    whole, parts = MinMaxObserver(), MinMaxObserver()
    whole.update(x)
    for part in (x[:1], x[1:20].reshape(1, 19, 8), x[20:20], x[20, :], x[21:]):
        parts.update(part)
    for observer in (whole, parts):
        low, high = observer.bounds()
        assert low.dtype == high.dtype == torch.float32 and low.shape == high.shape == ()
        assert (low, high) == (x.float().min(), x.float().max())
    assert whole.tokens == parts.tokens == 30


def test_an_observer_keeps_no_input() -> None:
    observer, x = MinMaxObserver(), torch.randn(3, 8)
    observer.update(x)
    before = [float(end) for end in observer.bounds()]
    x.mul_(100)
    assert [float(end) for end in observer.bounds()] == before


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_and_stays(bad: float) -> None:
    observer, x = MinMaxObserver(), torch.randn(3, 8)
    x[1, 2] = bad
    observer.update(x)
    observer.update(torch.zeros(3, 8))
    assert not torch.stack(observer.bounds()).isfinite().all()
