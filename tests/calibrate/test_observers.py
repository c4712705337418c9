"""Observers against what all inputs together say."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from llmquant.calibrate.observers import (
    OBSERVERS,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageObserver,
    Observer,
    PercentileObserver,
    PerChannelObserver,
    observer_factory,
)
from llmquant.errors import ConfigError
from llmquant.primitives.dynamic import ALL_TOKENS, FLOAT8, Activation, fake_quantize, static_scale

INT8, ASYM = Activation(ALL_TOKENS, static=True), Activation(ALL_TOKENS, asymmetric=True, static=True)
FLOAT = Activation(ALL_TOKENS, dtype=FLOAT8, static=True)
RULES = {"int8": INT8, "int8-asym": ASYM, "float8": FLOAT}
EXACT: dict[str, Callable[[], Observer]] = {
    "minmax": MinMaxObserver,
    "channel": PerChannelObserver,
    "percentile 100": lambda: PercentileObserver(100),
    "average of one batch": MovingAverageObserver,
}
every_observer = pytest.mark.parametrize("name", OBSERVERS)
every_rule = pytest.mark.parametrize("rule", RULES)


def bounds(observer: Observer, *batches: Tensor) -> tuple[float, float]:
    for batch in batches:
        observer.update(batch)
    low, high = observer.bounds()
    assert low.dtype == high.dtype == torch.float32 and low.shape == high.shape == ()
    return float(low), float(high)


def squared_error(x: Tensor, ends: tuple[float, float], activation: Activation) -> float:
    low, high = torch.tensor(ends)
    rounded = fake_quantize(x, activation, static_scale(low, high, activation))
    return float((rounded - x).double().square().sum())


def with_outliers(count: int = 20, size: float = 200.0) -> Tensor:
    """Normal values and a few that are very far from them."""
    x = torch.randn(400, 64)
    x.view(-1)[torch.randperm(x.numel())[:count]] = size
    return x


# --- ranges that are exact ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_the_range_is_that_of_everything_seen(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(30, 8).to(dtype)
    observer = EXACT[name]()
    assert bounds(observer, x) == (x.float().min(), x.float().max())
    assert observer.tokens == 30


@every_observer
def test_how_inputs_were_cut_and_ordered_matters_only_to_the_average(name: str) -> None:
    x = torch.randn(400, 8) * torch.linspace(0.1, 3, 400)[:, None]
    whole, parts, turned = (OBSERVERS[name](ASYM) for _ in range(3))
    first = bounds(whole, x)
    second = bounds(parts, x[:1], x[1:20].reshape(1, 19, 8), x[20:20], x[20, :], x[21:])
    third = bounds(turned, *reversed(x.split(7)))
    assert whole.tokens == parts.tokens == turned.tokens == 400
    assert (first == second == third) == (name != "average")
    again = OBSERVERS[name](ASYM)
    assert bounds(again, *reversed(x.split(7))) == third


@every_observer
def test_an_observer_keeps_no_input(name: str) -> None:
    observer, x = OBSERVERS[name](INT8), torch.randn(30, 8)
    before = bounds(observer, x)
    x.mul_(100)
    assert bounds(observer) == before


@every_observer
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_and_stays(name: str, bad: float) -> None:
    observer, x = OBSERVERS[name](ASYM), torch.randn(3, 8)
    x[1, 2] = bad
    assert not torch.tensor(bounds(observer, x, torch.zeros(3, 8))).isfinite().all()


@every_observer
def test_nothing_seen_is_no_range(name: str) -> None:
    observer = OBSERVERS[name](INT8)
    low, high = bounds(observer, torch.zeros(0, 8))
    assert observer.tokens == 0 and not low <= high


@every_observer
def test_values_that_are_all_the_same_are_their_own_range(name: str) -> None:
    for value in (0.0, 1.5, -3.0):
        low, high = bounds(OBSERVERS[name](INT8), torch.full((5, 8), value))
        assert max(abs(low), abs(high)) == abs(value)


# --- each of its own kind -------------------------------------------------------------------------------


def test_channels_keep_their_own_ranges() -> None:
    x = torch.randn(50, 6) * torch.arange(1, 7)
    observer = PerChannelObserver()
    for part in x.split(8):
        observer.update(part.reshape(1, -1, 6))
    low, high = observer.channels()
    assert torch.equal(low, x.amin(0)) and torch.equal(high, x.amax(0))


def test_the_average_follows_its_formula() -> None:
    highs = [1.0, 2.0, 4.0, 8.0, 16.0]
    observer = MovingAverageObserver(rate=0.25)
    low, high = bounds(observer, *(torch.tensor([[0.0, h]]) for h in highs))
    assert low == 0 and high == pytest.approx(((1 + 2 + 4 + 8) / 4) * 0.75 + 16 * 0.25)
    rare = [torch.ones(1, 4)] * 50 + [torch.full((1, 4), 100.0)] + [torch.ones(1, 4)] * 50
    assert 1 < bounds(MovingAverageObserver(), *rare)[1] < 5


@pytest.mark.parametrize("percent", [90, 99, 99.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_percentiles_are_those_of_a_sort(percent: float, dtype: torch.dtype) -> None:
    x = (torch.randn(500, 40) * 3 + 1).to(dtype)
    low, high = bounds(PercentileObserver(percent), *x.split(33))
    values = x.float().flatten().sort().values
    spared = round(len(values) * (1 - percent / 100))
    wanted = values[spared], values[len(values) - spared - 1]
    resolution = 2**-8 if dtype == torch.float32 else 0.0
    for found, exact in zip((low, high), wanted, strict=True):
        assert abs(found - exact) <= resolution * abs(exact)
    assert int((x.float() > high * (1 + resolution)).sum()) <= spared < int((x.float() >= high * 0.98).sum())


def test_percentiles_of_a_few_values() -> None:
    x = torch.arange(10.0).reshape(5, 2)
    assert bounds(PercentileObserver(90), x) == (1, 8)
    assert bounds(PercentileObserver(89), x) == (1, 8)
    assert bounds(PercentileObserver(91), x) == (0, 9)
    assert bounds(PercentileObserver(60), x) == (4, 5)


def test_a_percentile_never_reaches_beyond_the_extremes() -> None:
    x = torch.tensor([[1.005, 1.0, 1.0]])  # rounds to 1.0078 in bfloat16
    assert bounds(PercentileObserver(99.999), x) == (1.0, x.max())


@every_rule
@pytest.mark.parametrize("data", ["normal", "heavy", "outliers", "one-sided", "constant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_histogram_is_not_worse_than_the_full_range(rule: str, data: str, dtype: torch.dtype) -> None:
    """On bfloat16 inputs exactly; on others by no more than the rounding of what was counted."""
    x = {
        "normal": torch.randn(400, 64),
        "heavy": torch.randn(400, 64) / torch.rand(400, 64).clamp(min=0.01),
        "outliers": with_outliers(),
        "one-sided": torch.randn(400, 64).abs() + 0.5,
        "constant": torch.full((4, 64), -2.0),
    }[data].to(dtype)
    found = bounds(HistogramObserver(RULES[rule]), *x.split(50))
    full = bounds(MinMaxObserver(), x)
    own, others = (squared_error(x.float(), ends, RULES[rule]) for ends in (found, full))
    slack = 0.0 if dtype == torch.bfloat16 else float(x.abs().square().sum()) * 2**-18
    assert own <= others + slack
    assert max(map(abs, found)) <= max(map(abs, full))


@pytest.mark.parametrize("rule", ["int8", "int8-asym"])
def test_the_histogram_clips_a_few_outliers_for_the_sake_of_all_others(rule: str) -> None:
    x = with_outliers(count=1, size=60.0).abs()
    found = bounds(HistogramObserver(RULES[rule]), x)
    full = bounds(MinMaxObserver(), x)
    best = min(squared_error(x, (0.0, full[1] * i / 400), RULES[rule]) for i in range(20, 401))
    own, whole = squared_error(x, found, RULES[rule]), squared_error(x, full, RULES[rule])
    assert best * 0.98 <= own <= best * 1.02 and own < whole and found[1] < full[1]


def test_the_histogram_draws_each_end_in_by_itself() -> None:
    """As near to the best of all pairs of ends as rounding lets tell."""
    x = torch.randn(500, 640).abs() - 1
    x[0, 0] = 20.0
    found = bounds(HistogramObserver(ASYM), x)
    assert -1.05 < found[0] < -0.9 and 10 < found[1] < 16
    best = min(squared_error(x, (-i / 40, j / 4), ASYM) for i in (36, 38, 40) for j in range(44, 68, 2))
    assert best * 0.95 <= squared_error(x, found, ASYM) <= best * 1.05


# --- by name --------------------------------------------------------------------------------------------


def test_observers_go_by_names() -> None:
    assert isinstance(observer_factory("minmax", None)(), MinMaxObserver)
    histogram = observer_factory("histogram", FLOAT)()
    assert isinstance(histogram, HistogramObserver) and histogram.activation == FLOAT
    percentile = observer_factory("percentile-99.5", INT8)()
    assert isinstance(percentile, PercentileObserver) and percentile.percent == 99.5
    own = partial(MovingAverageObserver, 0.5)
    assert observer_factory(own, INT8) is own


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: observer_factory("histgram", None), "histogram"),
        (lambda: observer_factory("percentile-many", None), "99.9"),
        (lambda: observer_factory("percentile-50", None)(), "99.9"),
        (lambda: PercentileObserver(100.5), "99.9"),
        (lambda: MovingAverageObserver(0), "0.05"),
    ],
    ids=["name", "number", "half", "above", "rate"],
)
def test_what_cannot_be_is_refused_with_a_hint(wrong: Callable[[], object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        wrong()
