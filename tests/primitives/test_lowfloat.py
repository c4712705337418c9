"""float8: every code, rounding against ml_dtypes and against the specification, saturation."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import read_float8
from hypothesis import given
from hypothesis import strategies as st

from llmquant.formats import FORMATS, Format
from llmquant.primitives import lowfloat
from llmquant.primitives.granularity import MappingType
from llmquant.primitives.metrics import compute_error
from llmquant.primitives.spec import QParams, QuantSpec

FLOATS = [FORMATS["float8"], FORMATS["float8-e5m2"]]
EXPONENT_BITS = {"float8": 4, "float8-e5m2": 5}
LARGEST = {"float8": 448.0, "float8-e5m2": 57344.0}
ONE = QParams(torch.ones(1, 1))

every_float = pytest.mark.parametrize("fmt", FLOATS, ids=lambda f: f.name)


def table(fmt: Format) -> list[float]:
    return [read_float8(code, EXPONENT_BITS[fmt.name]) for code in range(256)]


def encode(values: list[float], fmt: Format) -> torch.Tensor:
    return lowfloat.encode(torch.tensor([[values]], dtype=torch.float32), ONE, fmt)[0, 0]


@every_float
def test_every_code_means_what_the_specification_says(fmt: Format) -> None:
    found = lowfloat.decode(torch.arange(256, dtype=torch.uint8).reshape(1, 1, -1), ONE, fmt)[0, 0]
    np.testing.assert_array_equal(found.numpy(), np.array(table(fmt), dtype=np.float32))


@every_float
def test_every_finite_code_round_trips(fmt: Format) -> None:
    codes = [code for code, value in enumerate(table(fmt)) if np.isfinite(value)]
    assert len(codes) == {"float8": 254, "float8-e5m2": 248}[fmt.name]
    assert encode([table(fmt)[code] for code in codes], fmt).tolist() == codes


@every_float
def test_rounding_is_to_the_nearest_and_to_even(fmt: Format) -> None:
    """At each midpoint of two neighbours, and one float32 step to either side of it."""
    positive = sorted(v for v in table(fmt)[:128] if np.isfinite(v))
    for low, high in pairwise(positive):
        middle = np.float32((low + high) / 2)
        below, at, above = encode([float(np.nextafter(middle, m)) for m in (0, middle, 1e9)], fmt).tolist()
        codes = table(fmt).index(low), table(fmt).index(high)
        assert (below, above) == codes
        assert at == next(code for code in codes if code % 2 == 0)


@every_float
def test_rounding_agrees_with_ml_dtypes(fmt: Format) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    other = {"float8": ml_dtypes.float8_e4m3fn, "float8-e5m2": ml_dtypes.float8_e5m2}[fmt.name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, generator=generator) * torch.exp2(torch.randint(-18, 16, (4000,), generator=generator))
    x = x.clamp(-LARGEST[fmt.name], LARGEST[fmt.name])
    assert encode(x.tolist(), fmt).tolist() == x.numpy().astype(other).view(np.uint8).tolist()


@every_float
def test_what_is_too_large_saturates(fmt: Format) -> None:
    largest = LARGEST[fmt.name]
    assert lowfloat.largest_scaled(fmt) == largest
    codes = encode([largest, 1.01 * largest, 2 * largest, 3e38, -3e38], fmt)
    top = table(fmt).index(largest)
    assert codes.tolist() == [top, top, top, top, top | 0x80]


@given(
    st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=8),
    st.sampled_from(FLOATS),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_finite_input_never_gives_nan(values: list[float], fmt: Format, scale_dtype: torch.dtype) -> None:
    x = torch.tensor([[values]])
    spec = QuantSpec(fmt, (1, len(values)), MappingType.SYMMETRIC, scale_dtype)
    qparams = lowfloat.choose_qparams(x, torch.ones_like(x), spec)
    assert qparams.scale.dtype == scale_dtype and qparams.zero_point is None
    codes = lowfloat.encode(x, qparams, fmt)
    assert all(np.isfinite(table(fmt)[code]) for code in codes.flatten().tolist())
    assert lowfloat.decode(codes, qparams, fmt).isfinite().all()


@every_float
@pytest.mark.parametrize("magnitude", [1e-38, 1e-40, 1e-44])
def test_tiny_values_have_codes(fmt: Format, magnitude: float) -> None:
    x = torch.tensor([[[0.0, 1.0, -1.0]]]) * magnitude
    spec = QuantSpec(fmt, (1, 3), MappingType.SYMMETRIC, torch.float32)
    qparams = lowfloat.choose_qparams(x, torch.ones_like(x), spec)
    found = lowfloat.decode(lowfloat.encode(x, qparams, fmt), qparams, fmt)
    assert float(found[0, 0, 0]) == 0 and float(found.abs().max()) <= 4 * magnitude


@every_float
def test_the_largest_magnitude_is_exact_and_zeros_stay_zero(fmt: Format) -> None:
    x = torch.tensor([[[0.5, -0.25, 0.0, 0.1]], [[0.0, 0.0, 0.0, 0.0]]])
    spec = QuantSpec(fmt, (1, 4), MappingType.SYMMETRIC, torch.float32)
    qparams = lowfloat.choose_qparams(x, torch.ones_like(x), spec)
    assert torch.equal(qparams.scale, torch.tensor([[0.5 / LARGEST[fmt.name]], [0.0]]))
    found = lowfloat.decode(lowfloat.encode(x, qparams, fmt), qparams, fmt)
    assert found[0, 0, 0] == pytest.approx(0.5, rel=1e-6)
    assert torch.equal(found[1], x[1]) and found[0, 0, 2] == 0


# SQNR in dB of N(0, 0.02), one scale a row: three and two bits of mantissa.
@pytest.mark.parametrize(("fmt", "expected"), [(FLOATS[0], 31.6), (FLOATS[1], 25.6)], ids=str)
def test_accuracy_in_both_directions(fmt: Format, expected: float) -> None:
    x = torch.randn(64, 1, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    spec = QuantSpec(fmt, (1, 1024), MappingType.SYMMETRIC, torch.float32)
    qparams = lowfloat.choose_qparams(x, torch.ones_like(x), spec)
    found = lowfloat.decode(lowfloat.encode(x, qparams, fmt), qparams, fmt)
    assert float(compute_error(x, found)) == pytest.approx(expected, abs=0.25)
