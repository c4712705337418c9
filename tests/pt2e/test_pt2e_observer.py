"""Scales and zero points are those of torch's own observers, while torch has them."""

from __future__ import annotations

import pytest
import torch

from llmquant.errors import CalibrationError, ConfigError
from llmquant.pt2e import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    QuantizationSpec,
)
from llmquant.pt2e.observer import LatestPerChannelMinMaxObserver, affine_qparams

torch_observers = pytest.importorskip("torch.ao.quantization.observer")

PAIRS = [
    (MinMaxObserver, "MinMaxObserver", "tensor"),
    (MovingAverageMinMaxObserver, "MovingAverageMinMaxObserver", "tensor"),
    (PerChannelMinMaxObserver, "PerChannelMinMaxObserver", "channel"),
    (MovingAveragePerChannelMinMaxObserver, "MovingAveragePerChannelMinMaxObserver", "channel"),
]

LIMITS = [(torch.uint8, (0, 255)), (torch.uint8, (0, 127)), (torch.int8, (-128, 127))]


@pytest.mark.parametrize(("ours", "theirs", "granularity"), PAIRS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("dtype", "limits"), [(torch.uint8, (0, 255)), (torch.uint8, (0, 127)), (torch.int8, (-128, 127))]
)
def test_qparams_are_those_of_torch(ours, theirs, granularity, symmetric, dtype, limits):
    if symmetric and limits == (0, 127):
        pytest.skip("torch puts the zero point of seven symmetric bits elsewhere")
    spec = QuantizationSpec(
        *(dtype, ours), quant_min=limits[0], quant_max=limits[1], granularity=granularity, symmetric=symmetric
    )
    scheme = getattr(torch, f"per_{granularity}_{'symmetric' if symmetric else 'affine'}")
    options = {"dtype": getattr(torch, f"q{str(dtype).removeprefix('torch.')}"), "qscheme": scheme}
    if limits == (0, 127):
        options |= {"quant_min": limits[0], "quant_max": limits[1]}
    oracle, observer = getattr(torch_observers, theirs)(**options), ours(spec)
    torch.manual_seed(0)
    for shift in range(4):
        x = torch.randn(6, 7) * (1 + shift) + shift
        assert torch.equal(observer(x), x)
        oracle(x)
    scale, zero_point = observer.calculate_qparams()
    wanted_scale, wanted_zero = oracle.calculate_qparams()
    torch.testing.assert_close(scale.reshape(-1), wanted_scale.reshape(-1), rtol=1e-6, atol=0)
    assert torch.equal(zero_point.reshape(-1), wanted_zero.reshape(-1).to(torch.int64))


def test_channels_lie_along_the_axis():
    x = torch.arange(12.0).reshape(3, 4)
    for observer in (PerChannelMinMaxObserver, LatestPerChannelMinMaxObserver):
        for axis in (0, 1):
            spec = QuantizationSpec(torch.int8, observer, granularity="channel", axis=axis, symmetric=True)
            found = observer(spec)
            found(x)
            assert torch.equal(found.bounds()[1], x.amax(1 - axis))


def test_the_latest_extremes_forget_the_ones_before():
    spec = QuantizationSpec(torch.int8, LatestPerChannelMinMaxObserver, granularity="channel", symmetric=True)
    observer = LatestPerChannelMinMaxObserver(spec)
    observer(torch.full((2, 3), 9.0))
    observer(torch.full((2, 3), 1.0))
    assert torch.equal(observer.bounds()[1], torch.ones(2))


def test_a_histogram_clips_an_outlier_that_costs_more_than_it_is_worth():
    torch.manual_seed(0)
    x = torch.randn(4096)
    x[0] = 60.0
    spec = QuantizationSpec(torch.uint8, HistogramObserver, quant_max=15)
    widest, best = MinMaxObserver(spec), HistogramObserver(spec)
    widest(x), best(x)

    def error(observer):
        scale, zero = observer.calculate_qparams()
        return float((torch.fake_quantize_per_tensor_affine(x, scale, zero.int(), 0, 15) - x).square().mean())

    assert 0 < error(best) < error(widest)


def test_qparams_hold_zero_and_cover_the_range():
    torch.manual_seed(0)
    low = torch.randn(64)
    high = low + torch.rand(64) * 5
    spec = QuantizationSpec(torch.uint8, MinMaxObserver)
    scale, zero = affine_qparams(low, high, spec)
    assert ((zero >= 0) & (zero <= 255)).all()
    for end in (low.clamp(max=0), high.clamp(min=0)):
        values = torch.round(end / scale) + zero
        assert ((values >= -1) & (values <= 256)).all()  # at most the rounding of the zero point outside


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_is_an_error(bad):
    observer = MinMaxObserver(QuantizationSpec(torch.uint8, MinMaxObserver))
    with pytest.raises(CalibrationError, match="nothing was observed"):
        observer.calculate_qparams()
    observer(torch.tensor([1.0, bad]))
    with pytest.raises(CalibrationError):
        observer.calculate_qparams()


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.int16},
        {"dtype": torch.uint8, "quant_min": -1},
        {"dtype": torch.uint8, "quant_min": 5, "quant_max": 5},
        {"dtype": torch.int8, "granularity": "row"},
        {"dtype": torch.int8, "granularity": "token"},
        {"dtype": torch.int8, "granularity": "channel", "is_dynamic": True},
    ],
)
def test_specs_that_mean_nothing_are_refused(options):
    with pytest.raises(ConfigError):
        QuantizationSpec(observer=MinMaxObserver, **options)
