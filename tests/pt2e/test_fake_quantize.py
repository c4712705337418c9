"""Fake quantization gives what codes stand for; gradients pass where values lie within the codes."""

from __future__ import annotations

import pytest
import torch

from llmquant.pt2e import (
    FakeQuantize,
    MinMaxObserver,
    PerChannelMinMaxObserver,
    QuantizationSpec,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
)
from llmquant.pt2e.observer import PlaceholderObserver

SPECS = {
    "tensor": QuantizationSpec(torch.uint8, MinMaxObserver),
    "channel": QuantizationSpec(torch.int8, PerChannelMinMaxObserver, granularity="channel", symmetric=True),
    "dynamic": QuantizationSpec(torch.uint8, PlaceholderObserver, is_dynamic=True),
    "token": QuantizationSpec(torch.int8, PlaceholderObserver, granularity="token", symmetric=True, is_dynamic=True),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_few_codes(name, dtype):
    torch.manual_seed(0)
    x = torch.randn(4, 64, dtype=dtype, requires_grad=True)
    y = FakeQuantize(SPECS[name])(x)
    assert y.dtype == dtype
    step = (x.detach().amax() - x.detach().amin()) / 255 * (1 if name in ("tensor", "dynamic") else 2.1)
    worst = (y - x).abs().max().item()
    slack = 0 if dtype == torch.float32 else 0.02
    assert 0 < worst <= 0.51 * float(step) + slack
    y.sum().backward()
    assert (x.grad == 1).float().mean() > 0.98  # all but values that rounding pushed beyond the last code


def test_frozen_ranges_clip_and_stop_gradients():
    fake = FakeQuantize(SPECS["tensor"])
    fake(torch.tensor([0.0, 1.0]))
    disable_observer(fake)
    x = torch.tensor([-1.0, 0.5, 3.0], requires_grad=True)
    y = fake(x)
    y.sum().backward()
    assert y[0] == 0 and y[2] == 1 and x.grad.tolist() == [0, 1, 0]
    enable_observer(fake)
    assert fake(x)[2].item() == pytest.approx(3.0, rel=2e-3)


def test_switched_off_it_lets_values_pass():
    fake, x = FakeQuantize(SPECS["tensor"]), torch.randn(9)
    disable_fake_quant(fake)
    assert torch.equal(fake(x), x)
    enable_fake_quant(fake)
    assert not torch.equal(fake(x), x)
