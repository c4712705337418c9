"""Observers as modules of a prepared graph: they let values pass, and find scale and zero point of their codes.

What they keep is kept by the observers of `llmquant.calibrate`, which static activations of the other path use too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmquant.calibrate.observers import HistogramObserver as _Histogram
from llmquant.calibrate.observers import MinMaxObserver as _MinMax
from llmquant.calibrate.observers import MovingAverageObserver as _MovingAverage
from llmquant.calibrate.observers import Observer
from llmquant.calibrate.observers import PerChannelObserver as _PerChannel
from llmquant.errors import CalibrationError
from llmquant.primitives.dynamic import ALL_TOKENS, Activation
from llmquant.pt2e.spec import QuantizationSpec


class ObserverBase(nn.Module):
    """Lets a value pass and takes note of it while it is enabled.

    Attributes:
        spec: how the value will be coded.
        enabled: whether what passes is taken note of.
    """

    def __init__(self, spec: QuantizationSpec) -> None:
        super().__init__()
        self.spec, self.enabled = spec, True

    def forward(self, x: Tensor) -> Tensor:
        """x, as it is."""
        if self.enabled:
            self.observe(x.detach())
        return x

    def observe(self, x: Tensor) -> None:
        """Takes note of a value."""
        raise NotImplementedError

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest value that codes should reach, float32 [] or [channels] each."""
        raise NotImplementedError

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int64), [] or [channels]. Raises `CalibrationError` if nothing was seen."""
        low, high = self.bounds()
        if not low.numel() or (low > high).any():
            raise CalibrationError("nothing was observed here", hint="run the prepared model on some inputs")
        if not (low.isfinite().all() and high.isfinite().all()):
            raise CalibrationError("an infinity or NaN was observed here", hint="look at the inputs of the calibration")
        return affine_qparams(low, high, self.spec)


def affine_qparams(low: Tensor, high: Tensor, spec: QuantizationSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point of codes for a range, which is made to hold 0 (Jacob et al., 2018, arXiv:1712.05877, 2.1).

    Args:
        low, high: the range, float32 of any shape.
        spec: says the codes, and whether the range is made symmetric.

    Returns:
        scale float32 and zero point int64, both of that shape.
    """
    least, most = spec.limits
    low, high = low.clamp(max=0), high.clamp(min=0)
    if spec.symmetric:
        middle = 0 if spec.dtype == torch.int8 else 128
        scale = (torch.maximum(-low, high) / ((most - least) / 2)).clamp(min=spec.eps)
        return scale, torch.full_like(scale, middle, dtype=torch.int64)
    scale = ((high - low) / float(most - least)).clamp(min=spec.eps)
    zero_point = (least - torch.round(low / scale).to(torch.int64)).clamp(least, most)
    return scale, zero_point


class _PerTensor(ObserverBase):
    """An observer of all values alike; the subclass says which."""

    def __init__(self, spec: QuantizationSpec) -> None:
        super().__init__(spec)
        self.seen = self.make()

    def make(self) -> Observer:
        raise NotImplementedError

    def observe(self, x: Tensor) -> None:
        """Takes note of x of any shape."""
        self.seen.update(x if x.dim() else x.reshape(1, 1))

    def bounds(self) -> tuple[Tensor, Tensor]:
        """float32 [] each."""
        return self.seen.bounds()


class MinMaxObserver(_PerTensor):
    """The exact extremes."""

    def make(self) -> Observer:
        """Of one value."""
        return _MinMax()


class MovingAverageMinMaxObserver(_PerTensor):
    """Moving averages of the extremes of each call.

    Args:
        spec: how the value will be coded.
        averaging_constant: the share of the newest call; the first one counts whole.
    """

    def __init__(self, spec: QuantizationSpec, averaging_constant: float = 0.01) -> None:
        self.averaging_constant = averaging_constant
        super().__init__(spec)

    def make(self) -> Observer:
        """Of one value."""
        return _MovingAverage(self.averaging_constant, even_start=False)


class HistogramObserver(_PerTensor):
    """The range whose codes round everything that was seen with the least squared error."""

    def make(self) -> Observer:
        """Of one value."""
        return _Histogram(Activation(ALL_TOKENS, asymmetric=not self.spec.symmetric, static=True))


class PerChannelMinMaxObserver(ObserverBase):
    """The extremes of each channel, in all calls."""

    def __init__(self, spec: QuantizationSpec) -> None:
        super().__init__(spec)
        self.seen = _PerChannel()

    def observe(self, x: Tensor) -> None:
        """Takes note of x, whose channels lie along the spec's axis."""
        self.seen.update(_channels_last(x, self.spec.axis))

    def bounds(self) -> tuple[Tensor, Tensor]:
        """float32 [channels] each."""
        return self.seen.channels()


class MovingAveragePerChannelMinMaxObserver(ObserverBase):
    """Moving averages of the extremes of each channel.

    Args:
        spec: how the value will be coded.
        averaging_constant: the share of the newest call; the first one counts whole.
    """

    def __init__(self, spec: QuantizationSpec, averaging_constant: float = 0.01) -> None:
        super().__init__(spec)
        self.averaging_constant = averaging_constant
        self._ends: Tensor | None = None  # [2, channels]

    def observe(self, x: Tensor) -> None:
        """Takes note of x, whose channels lie along the spec's axis."""
        ends = _channel_ends(x, self.spec.axis)
        before = ends if self._ends is None else self._ends
        self._ends = before + (ends - before) * self.averaging_constant

    def bounds(self) -> tuple[Tensor, Tensor]:
        """float32 [channels] each."""
        ends = torch.empty(2, 0) if self._ends is None else self._ends
        return ends[0], ends[1]


class LatestPerChannelMinMaxObserver(ObserverBase):
    """The extremes of each channel in the latest call alone: what weights are, of which every call sees all.

    So the codes of a weight that was trained are those that its last forward computed with.
    """

    def __init__(self, spec: QuantizationSpec) -> None:
        super().__init__(spec)
        self._ends = torch.empty(2, 0)

    def observe(self, x: Tensor) -> None:
        """Takes note of x, whose channels lie along the spec's axis."""
        self._ends = _channel_ends(x, self.spec.axis)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """float32 [channels] each."""
        return self._ends[0], self._ends[1]


class PlaceholderObserver(ObserverBase):
    """Marks a value whose scales are made at run time; it has nothing to see."""

    def observe(self, x: Tensor) -> None:
        """Nothing."""

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Never asked of values that are coded at run time."""
        return torch.empty(0), torch.empty(0)


ObserverFactory = Callable[[QuantizationSpec], ObserverBase]


def _channels_last(x: Tensor, axis: int) -> Tensor:
    """[values of a channel, channels]"""
    return x.movedim(axis, -1).reshape(-1, x.shape[axis])


def _channel_ends(x: Tensor, axis: int) -> Tensor:
    """float32 [2, channels]: the lowest and the highest value of each."""
    rows = _channels_last(x, axis)
    return torch.stack([rows.amin(0), rows.amax(0)]).float().cpu()
