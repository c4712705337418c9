"""Activations in MX and NVFP4: those of weights that are rounded plainly, and what weights do not meet."""

from __future__ import annotations

import json
import math
from itertools import product

import pytest
import torch
from cases import read
from torch import Tensor

from llmquant.config.base import WeightOnlyConfig
from llmquant.formats import FORMATS
from llmquant.primitives.dynamic import (
    ALL_TOKENS,
    Activation,
    dequantize_activation,
    fake_quantize,
    quantize_activation,
)
from llmquant.primitives.lowfloat import round_to_
from llmquant.primitives.metrics import compute_error
from llmquant.primitives.minifloat import MINIFLOATS, from_codes, to_codes
from llmquant.quantize import quantize_weight
from llmquant.tensor import QuantizedTensor

MX = [name for name, row in FORMATS.items() if row.scale_rules]
RULES = FORMATS["mxfp8"].scale_rules
MX_ACTIVATIONS = [Activation(32, False, name, rule) for name, rule in product(MX, RULES)]
NVFP4 = [Activation(group, dtype="nvfp4") for group in (0, ALL_TOKENS)]
ALL = MX_ACTIVATIONS + NVFP4
every_activation = pytest.mark.parametrize("activation", ALL, ids=lambda a: a.scheme)
TOP = torch.finfo(torch.float32).max


def as_weights(x: Tensor, activation: Activation) -> QuantizedTensor:
    """The same numbers as a weight without search; each token as an expert where it has a scale of its own."""
    config = WeightOnlyConfig(activation.dtype, algorithm="rtn", scale_rule=activation.scale_rule or None)
    matrices = x.unsqueeze(-2) if activation.group != ALL_TOKENS else x
    return quantize_weight(matrices, config)


@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [1, 16, 33, 70, 128])
def test_tokens_are_rounded_as_weights_are(activation: Activation, dtype: torch.dtype, columns: int) -> None:
    for x in (torch.randn(5, columns), torch.randn(5, columns) * torch.logspace(-4, 3, 5)[:, None]):
        x = x.to(dtype)
        weight, found = as_weights(x, activation), quantize_activation(x, activation)
        assert found.codes.dtype == torch.uint8 and found.zero_point is None
        assert found.scale.shape == (5, -(-columns // FORMATS[activation.dtype].group_size))
        assert torch.equal(found.scale.view(torch.uint8), weight.scale.reshape(found.scale.shape))
        assert (found.tensor_scale is not None) == (activation in NVFP4)
        if found.tensor_scale is not None:
            assert found.tensor_scale.shape == ((5, 1) if activation.group == 0 else (1, 1))
            assert torch.equal(found.tensor_scale.flatten(), weight.tensor_scale.flatten())
        meant = dequantize_activation(found, activation)
        assert torch.equal(meant.double(), torch.from_numpy(read(weight)).reshape(5, columns))
        assert torch.equal(fake_quantize(x, activation), meant.to(dtype))


@every_activation
@pytest.mark.parametrize("shape", [(70,), (2, 3, 33), (700, 200), (0, 70), (0,), (3, 0), (2, 0, 5)], ids=str)
def test_shapes(activation: Activation, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    if len(shape) > 1:
        x = x.mT.contiguous().mT
    before, found = x.clone(), quantize_activation(x, activation)
    assert found.codes.shape == shape and found.scale.shape[:-1] == shape[:-1]
    if activation.group == ALL_TOKENS:
        assert found.tensor_scale.shape == (1,) * x.dim()
    fake = fake_quantize(x, activation)
    assert torch.equal(fake, dequantize_activation(found, activation)) and fake.is_contiguous()
    assert torch.equal(x, before)


@every_activation
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_all_under_its_scales_nan_and_no_more(activation: Activation, bad: float) -> None:
    x = torch.randn(3, 70)
    clean = fake_quantize(x, activation)
    x[1, 40] = bad
    found, fake = quantize_activation(x, activation), fake_quantize(x, activation)
    hit = torch.zeros(3, 70, dtype=torch.bool)
    if activation.group == 32:
        hit[1, 32:64] = True
    else:
        hit[1] = True
    hit |= activation.group == ALL_TOKENS
    assert torch.all(fake[hit].isnan()) and torch.equal(fake[~hit], clean[~hit])
    assert torch.equal(dequantize_activation(found, activation).isnan(), hit) and torch.all(found.codes[hit] == 0)


@every_activation
def test_zeros_and_extremes(activation: Activation) -> None:
    assert torch.equal(fake_quantize(torch.zeros(3, 70), activation), torch.zeros(3, 70))
    for dtype, size in product((torch.float32, torch.float16, torch.bfloat16), (TOP, 65504.0, 61440.0, 2.0**-149)):
        x = torch.full((2, 70), min(size, torch.finfo(dtype).max), dtype=dtype)
        found = fake_quantize(x, activation)
        assert found.dtype == dtype and found.isfinite().all()
        if size > 1:  # a scale by floor keeps 7/8 of 65504 in e4m3, and 3/4 in e2m1
            assert torch.all((found / x - 1).abs() < 0.26)


def test_blocks_far_below_the_largest_keep_subnormal_scales() -> None:
    """The largest block has the scale 448; what is 2^15 times smaller lies below 2^-6, the smallest normal one."""
    x = torch.tensor([[6.0] * 16 + [6.0 * 2**-15] * 16])
    found = quantize_activation(x, NVFP4[0])
    assert found.scale.float().tolist() == [[448.0, 448 * 2**-15]]
    assert torch.equal(fake_quantize(x, NVFP4[0]), x)


# dB on N(0, 0.02): the formats by the rules of the specifications, to a tenth.
ACCURACY = {
    **{"mxfp8": 30.7, "mxfp8-ceil": 31.5, "mxfp8-even": 31.1, "mxfp8-rceil": 31.5, "mxfp8-e5m2": 25.4},
    **{"mxfp6-e2m3": 31.0, "mxfp6-e3m2": 25.3, "mxfp4": 18.9, "mxfp4-ceil": 17.3, "mxfp4-even": 19.0},
    **{"mxfp4-rceil": 18.6, "nvfp4": 20.4, "nvfp4-token": 20.4},
}


@pytest.mark.parametrize("activation", [a for a in ALL if a.scheme in ACCURACY], ids=lambda a: a.scheme)
def test_accuracy_in_both_directions(activation: Activation) -> None:
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)) * 0.02
    found = float(compute_error(x, fake_quantize(x, activation)))
    assert found == pytest.approx(ACCURACY[activation.scheme], abs=0.12)


@pytest.mark.parametrize("name", MINIFLOATS)
def test_rounding_without_codes_is_that_with_codes(name: str) -> None:
    """At every number, every midpoint, and the float32 neighbours of these."""
    kind = MINIFLOATS[name]
    bits = 1 + kind.exponent_bits + kind.mantissa_bits
    numbers = from_codes(torch.arange(2**bits).to(torch.uint8), kind)
    numbers = numbers[numbers.isfinite()].unique()
    middles = (numbers[1:] + numbers[:-1]) / 2
    up, down = (torch.nextafter(middles, torch.tensor(to)) for to in (math.inf, -math.inf))
    x = torch.cat([numbers, middles, up, down])
    assert torch.equal(round_to_(x.clone(), kind), from_codes(to_codes(x, kind), kind))


@every_activation
def test_json_round_trip(activation: Activation) -> None:
    plain = json.loads(json.dumps(activation.to_dict()))
    assert Activation.from_dict(plain) == activation
    assert ("scale_rule" in plain) == (activation in MX_ACTIVATIONS)


def test_what_is_not_said_is_the_first_rule() -> None:
    assert Activation(32, dtype="mxfp4") == Activation.default("mxfp4") == Activation(32, False, "mxfp4", "floor")
    plain = {"dtype": "mxfp4", "group": 32, "asymmetric": False}
    assert Activation.from_dict(plain) == Activation(32, dtype="mxfp4")
    assert Activation.default("nvfp4") == NVFP4[1] and NVFP4[1].scheme == "nvfp4"
