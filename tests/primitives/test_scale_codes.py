"""Scales of scales: those of groups as signed bytes under a float32 scale of their row."""

from __future__ import annotations

import pytest
import torch
from cases import Case, make_weight
from torch import Tensor

from llmquant.algorithms import ALGORITHMS
from llmquant.config.base import WeightOnlyConfig, from_dict
from llmquant.config.named import Int4WeightOnlyConfig, IntxWeightOnlyConfig
from llmquant.config.schemes import parse_scheme
from llmquant.errors import ConfigError
from llmquant.primitives.granularity import PerGroup
from llmquant.primitives.metrics import compute_error
from llmquant.primitives.stats import InputStats
from llmquant.quantize import quantize_weight
from llmquant.tensor import QuantizedTensor

SCHEMES = [f"int{bits}-g32-s8{mapping}" for bits in range(2, 7) for mapping in ("", "-asym")]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def quantized(weight: Tensor, scheme: str, algorithm: str = "search") -> QuantizedTensor:
    return quantize_weight(weight, Case(scheme).config.with_algorithm(algorithm))


@every_scheme
@pytest.mark.parametrize("algorithm", ["rtn", "search"])
def test_bytes_cost_little_against_16_bits(scheme: str, algorithm: str) -> None:
    weight = make_weight((64, 768))
    small, wide = quantized(weight, scheme, algorithm), quantized(weight, scheme.replace("-s8", ""), algorithm)
    loss = float(compute_error(weight, wide.dequantize()) - compute_error(weight, small.dequantize()))
    assert -0.02 < loss < 0.15
    assert loss != 0  # they do differ
    assert (wide.nbytes - small.nbytes) * 8 / weight.numel() == pytest.approx(8 / 32 - 32 / 768)


@every_scheme
def test_search_is_never_worse_than_rounding(scheme: str) -> None:
    weight = make_weight((32, 320)) * torch.logspace(-2, 2, 10).repeat_interleave(32)  # groups of all sizes
    spec = Case(scheme).config.spec(*weight.shape)
    importance = torch.ones_like(weight)
    rows = weight / quantized(weight, scheme).row_scale

    def errors(name: str) -> Tensor:
        codes, qparams = ALGORITHMS[name](rows, importance, spec)
        values = spec.format.numerics.decode(codes.view(32, 10, 32), qparams, spec.format)
        return (values - rows.view(32, 10, 32)).square().sum(-1)

    assert (errors("search") <= errors("rtn")).all()


@every_scheme
def test_no_group_is_lost_beside_a_large_one(scheme: str) -> None:
    """A group whose scale is far below the step of its row's scales gets the smallest code, not zero."""
    weight = make_weight((8, 96))
    weight[:, 32:64] *= 1e-3
    weight[:, 64:] = 0
    for algorithm in ("rtn", "search"):
        found = quantized(weight, scheme, algorithm)
        assert found.scale.dtype == torch.int8 and found.scale.abs().max() <= 127
        assert (found.scale[:, :2] != 0).all()
        assert (found.scale[:, 2] == 0).all() and not found.dequantize()[:, 64:].any()


@every_scheme
def test_the_largest_plain_scale_has_room(scheme: str) -> None:
    """A group that spans both signs of the largest magnitude: the asymmetric rule reaches 127, the other less."""
    weight = make_weight((4, 64))
    weight[:, 0], weight[:, 1] = 1.0, -1.0
    bits = Case(scheme).format.bits
    top = 127 if Case(scheme).asymmetric else round(127 * (2**bits - 1) / 2**bits)
    assert (quantized(weight, scheme, "rtn").scale[:, 0].abs() == top).all()


@pytest.mark.parametrize("scheme", ["int4-g32-s8", "int3-g32-s8-asym"])
def test_gptq_rounds_against_what_is_stored(scheme: str) -> None:
    """Less error in its outputs than search, and more in the weight."""
    weight, x = make_weight((32, 128)), torch.randn(512, 128) @ torch.randn(128, 128)
    stats = InputStats(mean_square=x.square().mean(0), hessian=x.T @ x / 512)
    config = Case(scheme).config
    plain, better = (quantize_weight(weight, config.with_algorithm(name), stats) for name in ("search", "gptq"))
    seen = [float(((w.dequantize() - weight) @ x.T).norm()) for w in (plain, better)]
    moved = [float((w.dequantize() - weight).norm()) for w in (plain, better)]
    assert seen[1] < 0.9 * seen[0] and moved[1] > moved[0]
    assert better.scale.dtype == torch.int8 and torch.equal(better.scale, plain.scale)


def test_the_option_in_every_notation() -> None:
    config = WeightOnlyConfig("int4", PerGroup(32), scale_bits=8)
    assert config == parse_scheme("int4-g32-s8") == Int4WeightOnlyConfig(32, scale_bits=8)
    assert config == from_dict({"format": "int4", "group_size": 32, "scale_bits": 8}) == from_dict(config.to_dict())
    assert config == IntxWeightOnlyConfig(torch.int4, PerGroup(32), scale_bits=8)
    assert config.scheme == "int4-g32-s8" and config.scale_dtype == torch.int8
    assert config != parse_scheme("int4-g32") and "scale_bits" not in parse_scheme("int4-g32").to_dict()
    for scheme in SCHEMES:
        assert parse_scheme(scheme).scheme == scheme and from_dict(parse_scheme(scheme).to_dict()).scale_bits == 8


@pytest.mark.parametrize(
    ("scheme", "match"),
    [
        *((f"{name}-g32-s8", f"{name} has no scales of 8 bits") for name in ("int1", "int7", "int8", "nf4")),
        ("int4-row-s8", "not one per row"),
        ("int4-tensor-s8", "not one per tensor"),
        ("int3-s8", "not one per row"),
        ("int4-g32-s6", "no scales of 6 bits"),
    ],
)
def test_what_has_no_such_scales_says_so(scheme: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse_scheme(scheme)


def test_a_dtype_that_contradicts_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be stored as"):
        WeightOnlyConfig("int4", PerGroup(32), scale_dtype=torch.float16, scale_bits=8)
    with pytest.raises(ConfigError, match="cannot be stored as"):
        WeightOnlyConfig("int4", PerGroup(32), scale_dtype=torch.int8)
