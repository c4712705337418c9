"""What an observer keeps of the inputs of one weight (or one expert) while a calibration run shows them to it.

Each can be used alone: `update(x)` for every input, then `bounds()`. All are deterministic; all but the moving average
give the same bounds however the inputs are cut into batches and in whatever order they come.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from llmquant.calibrate.counts import ValueCounts
from llmquant.errors import ConfigError
from llmquant.primitives.dynamic import ALL_TOKENS, Activation, fake_quantize, static_scale


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
            low, high = _extremes(x)
            self._ends = torch.stack([torch.minimum(self._ends[0], low), torch.maximum(self._ends[1], high)])
            self.tokens += x.shape[:-1].numel()

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest input, float32 [] each; NaN if any was."""
        return self._ends[0], self._ends[1]


class MovingAverageObserver:
    """Moving averages of the extremes of each batch: rare outliers count as rarely as they come.

    What a batch is decides about the result: each `update` is one, so it depends on batch size and order.

    Args:
        rate: the share of the newest batch, above 0 and at most 1.
        even_start: whether all batches count alike until 1 / rate of them were seen; else the first one counts whole.
    """

    def __init__(self, rate: float = 0.05, even_start: bool = True) -> None:
        if not 0 < rate <= 1:
            raise ConfigError(f"a moving average cannot have the rate {rate}", hint="for instance 0.05")
        self.tokens, self.rate, self.even_start = 0, rate, even_start
        self._batches, self._ends = 0, torch.zeros(2)

    def update(self, x: Tensor) -> None:
        """Takes note of a batch of inputs [..., K] of any float dtype."""
        if x.numel():
            self._batches += 1
            ends = torch.stack(_extremes(x))
            share = max(self.rate, 1 / self._batches) if self.even_start or self._batches == 1 else self.rate
            self._ends = self._ends + (ends - self._ends) * share
            self.tokens += x.shape[:-1].numel()

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The averages of lowest and highest inputs, float32 [] each; not finite if any input was not."""
        return _none_yet() if not self._batches else (self._ends[0], self._ends[1])


class PerChannelObserver:
    """The exact extremes of each of the K channels, for who migrates scales between channels and weights.

    A static scale is one for all channels: `bounds` are those of the widest, which are those of `MinMaxObserver`.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._ends: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Takes note of inputs [..., K] of any float dtype. K must stay the same."""
        if x.numel():
            rows = x.detach().reshape(-1, x.shape[-1])
            ends = torch.stack([rows.amin(0), rows.amax(0)]).float().cpu()
            before = ends if self._ends is None else self._ends
            self._ends = torch.stack([torch.minimum(before[0], ends[0]), torch.maximum(before[1], ends[1])])
            self.tokens += len(rows)

    def channels(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest input of each channel, float32 [K] each; NaN where any was."""
        ends = torch.empty(2, 0) if self._ends is None else self._ends
        return ends[0], ends[1]

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest input of all channels, float32 [] each; NaN if any was."""
        return _none_yet() if self._ends is None else (self._ends[0].min(), self._ends[1].max())


class PercentileObserver:
    """Leaves out the same share of inputs at either end, to the resolution of bfloat16 (see `ValueCounts`).

    Args:
        percent: how many in 100 inputs lie at or below the upper bound, and as many at or above the lower; above 50.
            100 is what `MinMaxObserver` says.
    """

    def __init__(self, percent: float = 99.99) -> None:
        if not 50 < percent <= 100:
            raise ConfigError(f"there is no range between the {percent}th percentiles", hint="for instance 99.9")
        self.tokens, self.percent = 0, percent
        self._counts = ValueCounts()

    def update(self, x: Tensor) -> None:
        """Takes note of inputs [..., K] of any float dtype."""
        self._counts.add(x)
        self.tokens += x.shape[:-1].numel() if x.numel() else 0

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The two percentiles, float32 [] each; not finite if any input was not."""
        ends = self._counts.ends
        values, counts = self._counts.table()
        if not ends.isfinite().all() or self.percent == 100:
            return ends[0], ends[1]
        total, upto = int(counts.sum()), counts.cumsum(0)
        spared = int(total * (100 - self.percent) / 100 + 1e-6)  # inputs that may lie beyond either bound
        first = torch.searchsorted(upto, torch.tensor(spared), right=True)
        last = torch.searchsorted(upto, torch.tensor(total - spared))
        return values[first], values[last]


class HistogramObserver:
    """The range whose codes round all inputs with the least squared error, to the resolution of `ValueCounts`.

    Ever narrower parts of the full range are tried, at each end in turn where the two are independent; the error of
    each is that of rounding and clamping the values that were counted, by the rule of `primitives.dynamic`. The full
    range is tried, too, so the result is not worse than that of `MinMaxObserver` on these values.

    Args:
        activation: the static activation that the range is for.
    """

    def __init__(self, activation: Activation | None = None) -> None:
        self.tokens = 0
        self.activation = activation or Activation(ALL_TOKENS, static=True)
        self._counts = ValueCounts()

    def update(self, x: Tensor) -> None:
        """Takes note of inputs [..., K] of any float dtype."""
        self._counts.add(x)
        self.tokens += x.shape[:-1].numel() if x.numel() else 0

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The best range, float32 [] each; not finite if any input was not."""
        ends = self._counts.ends
        if not ends.isfinite().all():
            return ends[0], ends[1]
        table = self._counts.table()
        whole = ends if self.activation.asymmetric else torch.stack([-ends.abs().max(), ends.abs().max()])
        # Each end alone while the other stays, twice; a symmetric range has only one.
        moves = (((1, 0), (0, 1)) * 2) if self.activation.asymmetric else ((1, 1),)
        best, least = whole, self._error(whole, *table)
        for move in moves:
            best, least = self._shrunk(best, torch.tensor(move), least, table)
        return best[0], best[1]

    def _shrunk(self, start: Tensor, move: Tensor, least: float, table: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
        """The best of the ranges that are `start` with the ends in `move` drawn towards 0, and its error."""
        best, at = start, 1.0
        for ratios in (_COARSE, _FINE):
            middle = at
            for ratio in (middle * r for r in ratios if middle * r <= 1):
                ends = torch.where(move.bool(), start * ratio, start)
                error = self._error(ends, *table)
                if error < least:
                    best, least, at = ends, error, ratio
        return best, least

    def _error(self, ends: Tensor, values: Tensor, counts: Tensor) -> float:
        """The sum of squared errors of the counted values in codes of this range."""
        static = static_scale(ends[0], ends[1], self.activation)
        if not static.scale > 0:
            return torch.inf
        rounded = fake_quantize(values.unsqueeze(0), self.activation, static).squeeze(0)
        return float(((rounded - values).double().square() * counts).sum())


# Parts of a range that are tried: some far apart, down to a hundredth, then some about the best of these.
_COARSE = tuple(0.01 ** (i / 48) for i in range(1, 49))
_FINE = tuple(0.01 ** (i / 480) for i in range(-9, 10) if i)

OBSERVERS: dict[str, Callable[[Activation], Observer]] = {
    "minmax": lambda _: MinMaxObserver(),
    "average": lambda _: MovingAverageObserver(),
    "channel": lambda _: PerChannelObserver(),
    "percentile": lambda _: PercentileObserver(),
    "histogram": HistogramObserver,
}
"""Name -> what makes an observer for inputs that are to be quantized so."""


def observer_factory(observer: str | Callable[[], Observer], activation: Activation | None) -> Callable[[], Observer]:
    """What makes the observers of one weight: a function of the user's own, or by name.

    Args:
        observer: a key of `OBSERVERS`, `percentile-99.9` for another percentile than 99.99, or a function.
        activation: how the inputs are to be quantized; None where they are not.

    Raises:
        ConfigError: for an unknown name.
    """
    if not isinstance(observer, str):
        return observer
    name, _, number = observer.partition("-")
    if name == "percentile" and number:
        return partial(PercentileObserver, _percent(observer, number))
    if observer not in OBSERVERS:
        near = difflib.get_close_matches(observer, OBSERVERS, n=2) or list(OBSERVERS)
        raise ConfigError(f"unknown observer {observer!r}", hint="one of " + ", ".join(near))
    return partial(OBSERVERS[observer], activation or Activation(ALL_TOKENS, static=True))


def _percent(observer: str, number: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise ConfigError(f"cannot read the observer {observer!r}", hint="for instance percentile-99.9") from None


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(x.detach())
    return low.float().cpu(), high.float().cpu()


def _none_yet() -> tuple[Tensor, Tensor]:
    return torch.tensor(torch.inf), torch.tensor(-torch.inf)
