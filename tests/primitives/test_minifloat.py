"""Small floats agree bit for bit with `ml_dtypes`, over every code and at every place where rounding changes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from llmquant.primitives.minifloat import MINIFLOATS, exp2, exponent_of, from_codes, to_codes, to_e8m0

ORACLE = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
every_kind = pytest.mark.parametrize("name", ORACLE)


def codes_of(name: str) -> Tensor:
    kind = MINIFLOATS[name]
    return torch.arange(2 ** (1 + kind.exponent_bits + kind.mantissa_bits), dtype=torch.uint8)


def by_oracle(x: Tensor, name: str) -> Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(x.numpy().astype(ORACLE[name]).view(np.uint8))


def neighbourhood(x: Tensor) -> Tensor:
    """Each number, with the float32 numbers next to it, and all of them negated."""
    up, down = torch.full_like(x, torch.inf), torch.full_like(x, -torch.inf)
    near = torch.cat([x, torch.nextafter(x, up), torch.nextafter(x, down)])
    return torch.cat([near, -near])


@every_kind
def test_every_code_has_the_value_of_the_oracle(name: str) -> None:
    codes = codes_of(name)
    expected = torch.from_numpy(codes.numpy().view(ORACLE[name]).astype(np.float32))
    found = from_codes(codes, MINIFLOATS[name])
    assert torch.equal(found.view(torch.int32)[~expected.isnan()], expected.view(torch.int32)[~expected.isnan()])
    assert torch.equal(found.isnan(), expected.isnan())
    assert float(found[found.isfinite()].max()) == MINIFLOATS[name].largest
    assert from_codes(codes.reshape(2, -1), MINIFLOATS[name]).shape == (2, len(codes) // 2)


@every_kind
def test_every_finite_code_survives(name: str) -> None:
    codes = codes_of(name)
    values = from_codes(codes, MINIFLOATS[name])
    finite = values.isfinite()
    assert torch.equal(to_codes(values[finite], MINIFLOATS[name]), codes[finite])


@every_kind
def test_rounding_at_every_boundary_is_that_of_the_oracle(name: str) -> None:
    """Codes, midpoints between them, and the float32 numbers next to both; subnormals among them."""
    kind = MINIFLOATS[name]
    values = from_codes(codes_of(name), kind)
    values = values[values.isfinite() & (values >= 0)].unique()
    x = neighbourhood(torch.cat([values, (values[1:] + values[:-1]) / 2, torch.tensor([1e-45, 1e-38])]))
    x = x[x.abs() <= kind.largest]
    assert torch.equal(to_codes(x, kind), by_oracle(x, name))


@every_kind
def test_random_numbers_round_as_by_the_oracle(name: str) -> None:
    kind = MINIFLOATS[name]
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * kind.largest / 4
    x = torch.cat([x, x / 64, x * 1e-30]).clamp(-kind.largest, kind.largest)
    assert torch.equal(to_codes(x, kind), by_oracle(x, name))


@every_kind
def test_what_is_too_large_saturates(name: str) -> None:
    """`ml_dtypes` saturates fp4 and fp6, too; fp8 it would make NaN or infinite."""
    kind = MINIFLOATS[name]
    above = torch.nextafter(torch.tensor(kind.largest), torch.tensor(torch.inf))
    x = torch.stack([above, torch.tensor(kind.largest * 1.5), torch.tensor(3.4e38), torch.tensor(torch.inf)])
    for sign in (1, -1):
        assert from_codes(to_codes(sign * x, kind), kind).tolist() == [sign * kind.largest] * 4
        if kind.dtype is None:
            assert torch.equal(to_codes(sign * x, kind), by_oracle(sign * x, name))


@every_kind
def test_nan_is_minus_zero_where_there_is_no_nan(name: str) -> None:
    kind = MINIFLOATS[name]
    for nan in (torch.tensor([torch.nan]), -torch.tensor([torch.nan])):
        found = from_codes(to_codes(nan, kind), kind)
        assert found.isnan() if kind.dtype else (found == 0 and found.signbit())


def test_signs_of_zero_stay() -> None:
    for kind in MINIFLOATS.values():
        assert from_codes(to_codes(torch.tensor([0.0, -0.0]), kind), kind).signbit().tolist() == [False, True]


def test_largest_exponents_are_those_of_the_specification() -> None:
    assert {name: kind.largest_exponent for name, kind in MINIFLOATS.items()} == {
        "e2m1": 2,
        "e2m3": 2,
        "e3m2": 4,
        "e4m3fn": 8,
        "e5m2": 15,
    }


# --- powers of two ----------------------------------------------------------------------------------------


def test_every_e8m0_code() -> None:
    """2^(code - 127), and 255 is NaN: by the oracle, by torch's own conversion, and from the exponent."""
    codes = torch.arange(256, dtype=torch.uint8)
    found = codes.view(torch.float8_e8m0fnu)
    expected = codes.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(found.float().numpy(), expected)
    np.testing.assert_array_equal(found.to(torch.bfloat16).float().numpy(), expected)  # what kernels take
    assert expected[0] == 2.0**-127 and np.isnan(expected[255])
    assert torch.equal(to_e8m0(torch.arange(-127, 128)).view(torch.uint8), codes[:255])


def test_e8m0_saturates_and_is_never_nan() -> None:
    assert to_e8m0(torch.tensor([-1000, -128, 128, 1000])).view(torch.uint8).tolist() == [0, 0, 254, 254]


def test_exponents_are_exact() -> None:
    powers = torch.tensor([2.0**e for e in range(-149, 128)])
    assert exponent_of(powers).tolist() == list(range(-149, 128))
    below = torch.nextafter(powers[1:], torch.tensor(0.0))
    assert exponent_of(below).tolist() == list(range(-149, 127))
    assert exponent_of(torch.zeros(2)).tolist() == [-150, -150]
    assert torch.equal(exp2(torch.arange(-126, 128, dtype=torch.int32)), powers[23:])
