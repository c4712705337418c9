"""Activations in int8 codes: every code against a loop over numbers, how far values move, and what is not finite."""

from __future__ import annotations

import json
import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from cases import read_float8
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmquant.errors import ConfigError
from llmquant.primitives.dynamic import (
    ALL_TOKENS,
    FLOAT8,
    INT8,
    Activation,
    DynamicCodes,
    StaticScale,
    dequantize_activation,
    fake_quantize,
    quantize_activation,
    static_scale,
)
from llmquant.primitives.granularity import MappingType, PerGroup, PerRow, PerTensor, PerToken, PerTokenGroup

ACTIVATIONS = [Activation(group, asymmetric) for group, asymmetric in product((0, 1, 7, 32, 100), (False, True))]
FLOAT8_ACTIVATIONS = [Activation(group, dtype=FLOAT8) for group in (0, ALL_TOKENS, 1, 7, 32, 100)]
every_float8 = pytest.mark.parametrize("activation", FLOAT8_ACTIVATIONS, ids=lambda a: a.scheme)
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.scheme)
F32 = np.float32
TOP = float(np.finfo(F32).max)


def naive_group(values: list[float], asymmetric: bool) -> tuple[list[int], float, int]:
    """Codes, scale and zero point of one group, number by number in float32. `np.rint` rounds half to even."""
    x = [F32(v) for v in values]
    low, high = (F32(min(0, *x)), F32(max(0, *x))) if asymmetric else (F32(0), max(abs(v) for v in x))
    with np.errstate(over="ignore", invalid="ignore"):
        span = high - low
    if not all(map(math.isfinite, x)) or not math.isfinite(span):
        return [0] * len(x), math.nan, 0
    scale = F32(span / F32(255 if asymmetric else 127))
    divisor = scale if scale else F32(1)
    if not asymmetric:
        return [int(np.clip(np.rint(v / divisor), -127, 127)) for v in x], float(scale), 0
    zero = int(np.clip(np.rint(F32(-128) - low / divisor), -128, 127))
    return [int(np.clip(np.rint(v / divisor) + zero, -128, 127)) for v in x], float(scale), zero


def naive(x: Tensor, activation: Activation) -> DynamicCodes:
    """The rule as a loop over tokens and groups."""
    width = activation.group or x.shape[-1]
    codes, scales, zeros = [], [], []
    for token in x.float().reshape(-1, x.shape[-1]).tolist():
        groups = [naive_group(token[i : i + width], activation.asymmetric) for i in range(0, len(token), width)]
        codes.append([code for group in groups for code in group[0]])
        scales.append([group[1] for group in groups])
        zeros.append([group[2] for group in groups])
    leading = x.shape[:-1]
    return DynamicCodes(
        torch.tensor(codes, dtype=torch.int8).reshape(x.shape),
        torch.tensor(scales).reshape(*leading, -1),
        torch.tensor(zeros, dtype=torch.int8).reshape(*leading, -1) if activation.asymmetric else None,
    )


def assert_equal(found: DynamicCodes, wanted: DynamicCodes) -> None:
    for a, b in zip(found, wanted, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)  # dtype and shape too


@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1,), (70,), (3, 70), (2, 3, 33), (1, 1, 128)], ids=str)
def test_codes_are_those_of_a_loop(activation: Activation, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for x in (torch.randn(shape), torch.randn(shape).abs() + 1, -torch.rand(shape)):
        assert_equal(quantize_activation(x.to(dtype), activation), naive(x.to(dtype), activation))


EXTREMES = [
    0.0,
    -0.0,
    1e-45,
    -3e-45,
    1e-42,
    1e-38,
    0.5,
    1.0,
    -127.0,
    127.0,
    254.5,
    TOP / 2,
    TOP,
    -TOP,
    math.inf,
    math.nan,
]


@given(
    st.lists(st.one_of(st.floats(width=32), st.sampled_from(EXTREMES)), min_size=1, max_size=40),
    st.sampled_from(ACTIVATIONS),
)
def test_codes_are_those_of_a_loop_whatever_the_numbers(values: list[float], activation: Activation) -> None:
    x = torch.tensor(values)
    assert_equal(quantize_activation(x, activation), naive(x, activation))


def test_halves_are_rounded_to_even() -> None:
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    assert quantize_activation(x, Activation(0)).codes.tolist() == [127, 0, 2, 2, 0, -2, -2]
    x = torch.tensor([-128.0, 127.0, 0.5, 1.5, -0.5, -1.5])
    found = quantize_activation(x, Activation(0, asymmetric=True))
    assert (found.scale.tolist(), found.zero_point.tolist()) == ([1.0], [0])
    assert found.codes.tolist() == [-128, 127, 0, 2, 0, -2]


@every_activation
def test_values_move_by_half_a_step_and_no_less(activation: Activation) -> None:
    x = torch.randn(50, 96) + 0.3
    found = quantize_activation(x, activation)
    step = found.scale.repeat_interleave(activation.width(96), -1)[:, :96]
    moved = (dequantize_activation(found, activation) - x).abs() / step
    if activation.group == 1:
        assert moved.max() < 1e-4  # its own extreme has a code
        return
    # A zero point is rounded too, so the end of a range may lie half a step outside of it.
    assert 0.45 < moved.max() <= (1.001 if activation.asymmetric else 0.5001)
    assert 0.2 < moved.mean() < 0.3


def test_a_scale_that_loses_digits_leaves_no_code_out_of_range() -> None:
    x = torch.tensor([-180.0, 180.0, 90.0]) * 2**-149  # 180 / 127 of the smallest number is that number
    assert quantize_activation(x, Activation(0)).codes.tolist() == [-127, 127, 90]


@every_activation
def test_the_whole_range_of_codes_is_used(activation: Activation) -> None:
    found = quantize_activation(torch.randn(20, 300), activation)
    for codes in found.codes.int().split(activation.width(300), -1):
        if activation.asymmetric and activation.width(300) > 7:  # fewer may all have one sign
            assert torch.all(codes.amax(-1) - codes.amin(-1) >= 254)
        elif not activation.asymmetric:
            assert torch.all(codes.abs().amax(-1) == 127)


@every_activation
def test_zero_stays_zero(activation: Activation) -> None:
    x = torch.randn(4, 70) + 2
    x[:, ::3] = 0
    x[1] = 0
    found = quantize_activation(x, activation)
    assert torch.all(dequantize_activation(found, activation)[x == 0] == 0)
    assert torch.all(found.scale[1] == 0)
    if not activation.asymmetric:
        assert torch.all(found.codes[1] == 0)


@every_activation
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_its_own_group_nan_and_no_other(activation: Activation, bad: float) -> None:
    x = torch.randn(3, 70)
    clean = dequantize_activation(quantize_activation(x, activation), activation)
    x[1, 40] = bad
    found = quantize_activation(x, activation)
    values = dequantize_activation(found, activation)
    width = activation.width(70)
    hit = torch.zeros(3, 70, dtype=torch.bool)
    hit[1, 40 // width * width : 40 // width * width + width] = True
    assert torch.all(values[hit].isnan()) and torch.equal(values[~hit], clean[~hit])
    assert torch.all(found.codes[hit] == 0)


def test_a_range_that_overflows_is_nan_too() -> None:
    x = torch.tensor([TOP, -TOP])
    assert quantize_activation(x, Activation(0, asymmetric=True)).scale.isnan().all()
    assert quantize_activation(x, Activation(0)).codes.tolist() == [127, -127]


@every_activation
@pytest.mark.parametrize("shape", [(0, 70), (0,), (3, 0), (2, 0, 5)], ids=str)
def test_nothing_gives_nothing(activation: Activation, shape: tuple[int, ...]) -> None:
    found = quantize_activation(torch.empty(shape), activation)
    groups = -(-shape[-1] // activation.width(shape[-1]))
    assert found.codes.shape == shape and found.scale.shape == (*shape[:-1], groups)
    assert dequantize_activation(found, activation).shape == shape


def test_a_group_wider_than_the_token_is_the_token() -> None:
    x = torch.randn(3, 70)
    assert_equal(quantize_activation(x, Activation(2**31 - 1)), quantize_activation(x, Activation(0)))


def test_the_input_stays_as_it_is() -> None:
    x = torch.randn(3, 64)
    before = x.clone()
    for activation in ACTIVATIONS:
        quantize_activation(x, activation)
    assert torch.equal(x, before)


# --- float8 -----------------------------------------------------------------------------------------------

MAGNITUDES = np.array([read_float8(code, 4) for code in range(127)])
"""All e4m3 numbers that are not negative, in order."""


def nearest_float8(value: float) -> float:
    """The e4m3 number nearest to a float32 number, by looking at all; between two, the one whose code is even."""
    distance = np.abs(MAGNITUDES - abs(value))
    nearest = np.flatnonzero(distance == distance.min())
    return math.copysign(MAGNITUDES[nearest[nearest % 2 == 0][0] if len(nearest) > 1 else nearest[0]], value)


def naive_float8(x: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Numbers that the codes mean, and scales, as a loop over groups."""
    numbers, scales = [], []
    for token in x.float().reshape(-1, x.numel() if activation.group == ALL_TOKENS else x.shape[-1]).tolist():
        width = activation.group if activation.group > 0 else len(token)
        for values in (token[i : i + width] for i in range(0, len(token), width)):
            high = max(abs(F32(v)) for v in values)
            finite = all(map(math.isfinite, values))
            scale = F32(high / F32(448)) if finite else F32(math.nan)
            divisor = scale if scale else F32(1)
            scales.append(float(scale))
            numbers += [nearest_float8(float(np.clip(F32(v) / divisor, -448, 448))) if finite else 0.0 for v in values]
    return torch.tensor(numbers).reshape(x.shape), torch.tensor(scales)


def assert_float8(x: Tensor, activation: Activation) -> None:
    found = quantize_activation(x, activation)
    numbers, scales = naive_float8(x, activation)
    assert found.codes.dtype == torch.float8_e4m3fn and found.zero_point is None
    assert torch.equal(found.codes.float(), numbers)
    torch.testing.assert_close(found.scale.flatten(), scales, rtol=0, atol=0, equal_nan=True)
    meant = dequantize_activation(found, activation)
    torch.testing.assert_close(fake_quantize(x, activation), meant.to(x.dtype), rtol=0, atol=0, equal_nan=True)


@every_float8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1,), (70,), (3, 70), (2, 3, 33), (1, 1, 128)], ids=str)
def test_float8_codes_are_the_nearest_of_all(
    activation: Activation, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    for x in (torch.randn(shape), torch.randn(shape) * torch.logspace(-5, 5, shape[-1])):
        assert_float8(x.to(dtype), activation)


@given(
    st.lists(st.one_of(st.floats(width=32), st.sampled_from(EXTREMES)), min_size=1, max_size=40),
    st.sampled_from(FLOAT8_ACTIVATIONS),
)
def test_float8_codes_are_the_nearest_of_all_whatever_the_numbers(values: list[float], activation: Activation) -> None:
    assert_float8(torch.tensor(values), activation)


def test_every_float8_boundary_is_rounded_to_even() -> None:
    """All numbers, all midpoints, and the float32 neighbours of these; 448 makes the scale 1."""
    middles = torch.tensor((MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2).float()
    up, down = (torch.nextafter(middles, torch.tensor(to)) for to in (math.inf, 0.0))
    x = torch.cat([torch.tensor(MAGNITUDES).float(), middles, up, down])
    assert_float8(torch.cat([x, -x]), Activation(0, dtype=FLOAT8))


@every_float8
def test_float8_values_move_by_half_a_digit_and_no_less(activation: Activation) -> None:
    x = torch.randn(50, 96)
    moved = ((fake_quantize(x, activation) - x) / x).abs()
    normal = x.abs() > quantize_activation(x, activation).scale.max() * 2**-6
    if activation.group == 1:
        assert moved.max() < 1e-6  # its own extreme has a code
        return
    assert 0.058 < moved[normal].max() <= 0.0626 and 0.015 < moved[normal].mean() < 0.03


@every_float8
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_its_own_float8_group_nan_and_no_other(activation: Activation, bad: float) -> None:
    x = torch.randn(3, 70)
    clean = fake_quantize(x, activation)
    x[1, 40] = bad
    found = fake_quantize(x, activation)
    width = activation.width(70)
    hit = torch.zeros(3, 70, dtype=torch.bool)
    hit[1, 40 // width * width : 40 // width * width + width] = True
    hit |= activation.group == ALL_TOKENS
    assert torch.all(found[hit].isnan()) and torch.equal(found[~hit], clean[~hit])
    assert torch.all(quantize_activation(x, activation).codes.float()[hit] == 0)


@every_float8
def test_float8_keeps_zeros_and_survives_extremes(activation: Activation) -> None:
    assert torch.equal(fake_quantize(torch.zeros(3, 70), activation), torch.zeros(3, 70))
    for size, dtype in ((TOP, torch.float32), (65504.0, torch.float16), (2.0**-149, torch.float32)):
        x = torch.full((2, 70), size, dtype=dtype)
        assert fake_quantize(x, activation).isfinite().all()


def test_all_tokens_share_the_scale_of_the_largest() -> None:
    x = torch.randn(2, 3, 70)
    found = quantize_activation(x, Activation(ALL_TOKENS, dtype=FLOAT8))
    assert found.scale.shape == (1, 1, 1) and found.scale.item() == x.abs().max() / 448


@pytest.mark.parametrize("activation", FLOAT8_ACTIVATIONS + ACTIVATIONS[::3], ids=lambda a: a.scheme)
@pytest.mark.parametrize("shape", [(0, 70), (0,), (3, 0), (2, 0, 5), (700, 200)], ids=str)
def test_fake_quantization_of_nothing_and_of_many(activation: Activation, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).mT.contiguous().mT if len(shape) > 1 else torch.randn(shape)
    before, found = x.clone(), fake_quantize(x, activation)
    assert torch.equal(found, dequantize_activation(quantize_activation(x, activation), activation))
    assert torch.equal(x, before) and found.is_contiguous()


# --- how it is written ------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS + FLOAT8_ACTIVATIONS, ids=lambda a: a.scheme)
def test_json_round_trip(activation: Activation) -> None:
    assert Activation.from_dict(json.loads(json.dumps(activation.to_dict()))) == activation


def test_json_of_earlier_versions_is_read() -> None:
    assert Activation.from_dict({"dtype": "int8", "group": 64, "asymmetric": True}) == Activation(64, True)


# --- static scales ----------------------------------------------------------------------------------------

STATIC = [Activation(ALL_TOKENS, False, INT8, static=True), Activation(ALL_TOKENS, True, INT8, static=True)]
STATIC.append(Activation(ALL_TOKENS, False, FLOAT8, static=True))
every_static = pytest.mark.parametrize("activation", STATIC, ids=lambda a: a.scheme)


def scale_of(x: Tensor, activation: Activation) -> StaticScale:
    return static_scale(x.min(), x.max(), activation)


def test_a_static_scale_is_the_largest_magnitude_by_the_largest_code() -> None:
    x = torch.randn(50, 20) * 3 + 1
    for activation, levels in ((STATIC[0], 127), (STATIC[2], 448)):
        found = scale_of(x, activation)
        assert torch.equal(found.scale, x.abs().max() / levels) and found.zero_point is None
    found = scale_of(x, STATIC[1])
    assert torch.equal(found.scale, (x.max() - x.min()) / 255)
    assert found.zero_point.dtype == torch.int8
    assert int(found.zero_point) == round(float(-128 - x.min() / found.scale))


@every_static
def test_a_static_range_always_holds_zero(activation: Activation) -> None:
    for low, high in ((2.0, 3.0), (-3.0, -2.0)):
        static = static_scale(torch.tensor(low), torch.tensor(high), activation)
        meant = fake_quantize(torch.tensor([0.0, low, high]), activation, static)
        assert meant[0] == 0 and torch.all((meant[1:] - torch.tensor([low, high])).abs() < 0.1)


@every_static
def test_on_the_tokens_it_was_made_from_it_is_the_dynamic_rule(activation: Activation) -> None:
    """Of one token: its own range is the range of all."""
    x = torch.randn(1, 300)
    static = quantize_activation(x, activation, scale_of(x, activation))
    dynamic = quantize_activation(x, Activation(0, activation.asymmetric, activation.dtype))
    assert torch.equal(static.codes.float(), dynamic.codes.float()) and torch.equal(static.scale, dynamic.scale)
    assert torch.equal(fake_quantize(x, activation, scale_of(x, activation)), dequantize_activation(dynamic, STATIC[0]))


@every_static
def test_what_lies_beyond_a_static_scale_saturates(activation: Activation) -> None:
    x = torch.tensor([[-1.0, 2.0], [1e30, -1e30], [TOP, -TOP]])
    static = scale_of(x[:1], activation)
    meant = fake_quantize(x, activation, static)
    ends = torch.tensor([2.0, -1.0 if activation.asymmetric else -2.0])
    assert torch.allclose(meant[1], ends, atol=0.01) and torch.equal(meant[1], meant[2])


@every_static
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_token_that_is_not_finite_is_nan_under_a_static_scale_and_no_other(
    activation: Activation, bad: float
) -> None:
    x = torch.randn(3, 70)
    static = scale_of(x, activation)
    clean = fake_quantize(x, activation, static)
    x[1, 40] = bad
    found = fake_quantize(x, activation, static)
    assert found[1].isnan().all() and torch.equal(found[[0, 2]], clean[[0, 2]])
    codes = quantize_activation(x, activation, static)
    assert torch.all(codes.codes[1].float() == 0) and codes.scale.shape == (3, 1)


@every_static
def test_a_static_scale_has_one_shape_for_every_input(activation: Activation) -> None:
    x = torch.randn(2, 3, 33)
    static = scale_of(x, activation)
    for part in (x, x[0], x[0, 0], x[:0]):
        found = fake_quantize(part.bfloat16(), activation, static)
        assert found.dtype == torch.bfloat16 and found.shape == part.shape
    assert torch.equal(fake_quantize(x, activation, static)[1, 2], fake_quantize(x[1, 2], activation, static))


def test_schemes_of_static_activations() -> None:
    assert [a.scheme for a in STATIC] == ["s8", "s8-asym", "sf8"]
    assert [Activation.from_dict(a.to_dict()) for a in STATIC] == STATIC
    assert "static" not in Activation(0).to_dict()
    assert Activation.of(PerTensor(), MappingType.ASYMMETRIC, static=True) == STATIC[1]


def test_schemes_of_float8() -> None:
    assert [a.scheme for a in FLOAT8_ACTIVATIONS[:4]] == ["f8", "f8-tensor", "f8-g1", "f8-g7"]


def test_schemes() -> None:
    named = {a.scheme: a for a in [*ACTIVATIONS, Activation(64), Activation(64, True)]}
    assert named["a8"] == Activation(32) and named["a8-asym"] == Activation(32, True)
    assert named["a8-token"] == Activation(0) and named["a8-token-asym"] == Activation(0, True)
    assert named["a8-g64"] == Activation(64) and named["a8-g64-asym"] == Activation(64, True)


def test_granularities() -> None:
    assert Activation.of(PerToken()) == Activation(0)
    assert Activation.of(PerTokenGroup(48), MappingType.ASYMMETRIC) == Activation(48, True)


BAD: dict[str, Any] = {
    "static groups": lambda: Activation(32, static=True),
    "static tokens": lambda: Activation.of(PerToken(), static=True),
    "negative": lambda: Activation(-2, dtype=FLOAT8),
    "int8 for all tokens": lambda: Activation(ALL_TOKENS),
    "unknown dtype": lambda: Activation(0, dtype="float8_e5m2"),
    "a format without fixed blocks": lambda: Activation(32, dtype="float8"),
    "mx in other groups": lambda: Activation(16, dtype="mxfp8"),
    "mx for all tokens": lambda: Activation(ALL_TOKENS, dtype="mxfp8"),
    "mx with zero points": lambda: Activation(32, True, "mxfp8"),
    "mx by an unknown rule": lambda: Activation(32, dtype="mxfp8", scale_rule="round"),
    "a rule for int8": lambda: Activation(32, scale_rule="floor"),
    "a rule for nvfp4": lambda: Activation(0, dtype="nvfp4", scale_rule="floor"),
    "nvfp4 in groups": lambda: Activation(16, dtype="nvfp4"),
    "a rule that is no text": lambda: Activation.from_dict(
        {**Activation(32, dtype="mxfp8").to_dict(), "scale_rule": 1}
    ),
    "float8 with zero points": lambda: Activation(0, True, FLOAT8),
    "too large": lambda: Activation(2**31),
    "no group": lambda: PerTokenGroup(0),
    "per row": lambda: Activation.of(PerRow()),
    "per group": lambda: Activation.of(PerGroup(32)),
    "per tensor": lambda: Activation.of(PerTensor()),
    "text": lambda: Activation.from_dict("a8"),
    "another dtype": lambda: Activation.from_dict({"dtype": "float8", "group": 32, "asymmetric": False}),
    "a field too few": lambda: Activation.from_dict({"dtype": "int8", "group": 32}),
    "a field too many": lambda: Activation.from_dict({**Activation(32).to_dict(), "static": True}),
    "a group in words": lambda: Activation.from_dict({"dtype": "int8", "group": "token", "asymmetric": False}),
    "a number as answer": lambda: Activation.from_dict({"dtype": "int8", "group": 32, "asymmetric": 0}),
}


@pytest.mark.parametrize("name", BAD)
def test_what_activations_cannot_have(name: str) -> None:
    with pytest.raises(ConfigError):
        BAD[name]()
