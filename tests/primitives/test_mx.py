"""Microscaling: scales by each published rule, the search next to them, and how well normal weights survive."""

from __future__ import annotations

import math

import pytest
import torch
from cases import make_weight
from torch import Tensor

from llmquant.algorithms.rtn import Codes, rtn
from llmquant.algorithms.search import search
from llmquant.config.named import MXWeightOnlyConfig
from llmquant.formats import FORMATS
from llmquant.primitives.metrics import compute_error
from llmquant.primitives.minifloat import MINIFLOATS
from llmquant.primitives.mx import RULES
from llmquant.primitives.spec import QuantSpec
from llmquant.quantize import quantize_weight

MX = [name for name, row in FORMATS.items() if row.scale_rules]
every_format = pytest.mark.parametrize("name", MX)
every_rule = pytest.mark.parametrize("rule", RULES)


def spec_of(name: str, rule: str) -> QuantSpec:
    return MXWeightOnlyConfig(name, rule).spec(1, 1 << 20)


def published(rule: str, amax: float, name: str) -> int:
    """The exponent of the scale, in whole and rational numbers only: `math.frexp` is exact."""
    kind = MINIFLOATS[FORMATS[name].element]
    emax = math.frexp(kind.largest)[1] - 1
    fraction, exponent = math.frexp(amax)  # amax = fraction * 2^exponent, 1/2 <= fraction < 1
    if rule == "floor":
        return exponent - 1 - emax
    if rule == "ceil":
        return (exponent - 1 if fraction == 0.5 else exponent) - emax
    if rule == "even":
        steps = 2**kind.mantissa_bits
        return exponent - 1 - emax + (math.floor(fraction * 2 * steps + 0.5) >= 2 * steps)
    found = exponent - 1 - emax - 2
    while amax > math.ldexp(kind.largest, found):
        found += 1
    return found


def magnitudes() -> list[float]:
    """Powers of two, every place where some rule changes its mind, and the float32 numbers next to them."""
    edges = torch.tensor([1.0, 1.25, 1.5, 1.75, 1.875, 1.9375, 1.96875, 1.125])
    x = torch.cat([edges * 2.0**e for e in (-60, -7, 0, 1, 9, 60, 127)])
    near = [torch.nextafter(x, torch.full_like(x, end)) for end in (0.0, torch.inf)]
    return torch.cat([x, *near]).tolist()


@every_rule
@every_format
def test_scales_follow_the_published_rules(name: str, rule: str) -> None:
    amax = magnitudes()
    x = torch.zeros(len(amax), 1, 4)
    x[:, 0, 2] = -torch.tensor(amax)
    found = FORMATS[name].numerics.choose_qparams(x, torch.ones_like(x), spec_of(name, rule)).scale
    assert found.dtype == torch.float8_e8m0fnu
    exponents = (found.view(torch.uint8).int() - 127).flatten().tolist()
    assert exponents == [published(rule, a, name) for a in amax]


@every_format
def test_under_rceil_nothing_saturates_and_half_the_scale_would(name: str) -> None:
    x = make_weight((64, 1, 32))
    spec = spec_of(name, "rceil")
    scale = FORMATS[name].numerics.choose_qparams(x, torch.ones_like(x), spec).scale.float()
    ratio = x.abs().amax(-1) / scale / MINIFLOATS[spec.format.element].largest
    assert float(ratio.max()) <= 1 < 2 * float(ratio.min())


@every_rule
@every_format
def test_zeros_tiny_and_huge_blocks(name: str, rule: str) -> None:
    x = torch.tensor([0.0, 1e-45, 1e-38, 2e38]).reshape(4, 1, 1).expand(4, 1, 32).contiguous()
    spec = spec_of(name, rule)
    numerics = spec.format.numerics
    qparams = numerics.choose_qparams(x, torch.ones_like(x), spec)
    assert (qparams.scale.view(torch.uint8) < 255).all()
    values = numerics.decode(numerics.encode(x, qparams, spec.format), qparams, spec.format)
    assert values.isfinite().all() and (values[0] == 0).all()
    assert ((values[3] - x[3]).abs() <= x[3] / 3).all()


def errors(found: Codes, x: Tensor, weights: Tensor, spec: QuantSpec) -> Tensor:
    values = spec.format.numerics.decode(found.codes.reshape(x.shape), found.qparams, spec.format)
    return ((values - x).square() * weights).sum(-1)


@every_rule
@every_format
def test_search_is_never_worse_than_the_rule(name: str, rule: str) -> None:
    rows, weights = make_weight((40, 96), seed=1), make_weight((40, 96), seed=2).abs()
    rows[:4] *= torch.tensor([1e-4, 1e4]).repeat(48)  # heavy tails
    spec = QuantSpec(FORMATS[name], (1, 32), MXWeightOnlyConfig(name).mapping_type, torch.float8_e8m0fnu, rule)
    x, w = rows.reshape(40, 3, 32), weights.reshape(40, 3, 32)
    plain, searched = (errors(f(rows, weights, spec), x, w, spec) for f in (rtn, search))
    assert (searched <= plain).all()
    if rule == "ceil" and name in ("mxfp4", "mxfp6-e2m3"):  # a scale too large for most
        assert (searched < plain).sum() > 20


# Two-sided: a result that is too good is as wrong as one that is too bad. dB of N(0, 0.02), by rule and with search.
SQNR = {
    ("mxfp4", "floor", False): 18.90,
    ("mxfp4", "ceil", False): 17.25,
    ("mxfp4", "even", False): 19.04,
    ("mxfp4", "rceil", False): 18.52,
    ("mxfp4", "floor", True): 19.07,
    ("mxfp6-e2m3", "floor", False): 31.01,
    ("mxfp6-e2m3", "floor", True): 31.04,
    ("mxfp6-e3m2", "floor", True): 25.54,
    ("mxfp8", "floor", False): 30.68,
    ("mxfp8", "rceil", False): 31.52,
    ("mxfp8", "floor", True): 31.52,
    ("mxfp8-e5m2", "floor", True): 25.54,
}


@pytest.mark.parametrize(("name", "rule", "searched"), SQNR)
def test_normal_weights_keep_their_signal(name: str, rule: str, searched: bool) -> None:
    plain = make_weight((256, 2048))
    found = float(compute_error(plain, quantize_weight(plain, MXWeightOnlyConfig(name, rule, searched)).dequantize()))
    assert abs(found - SQNR[name, rule, searched]) < 0.06


def test_figures_that_are_promised() -> None:
    plain = make_weight((256, 2048))
    for name, least in (("mxfp4", 18.9), ("mxfp6-e2m3", 31.0), ("mxfp8", 31.4)):
        assert least <= float(compute_error(plain, quantize_weight(plain, MXWeightOnlyConfig(name)).dequantize())) < 32
