"""2:4 sparse weights in native kernels, which multiply only the codes that were kept: the rest must not show."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from llmquant.kernels import cpu, ops, registry
from llmquant.kernels.packed import Packed
from llmquant.packing import sparse24

COUNTS = (1, 2, 3, 4, 5, 9, 33)  # of inputs: those that vectors take together, and tiles

every_backend = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.skipif(native.missing is not None, reason=str(native.missing)))
        for name, native in cpu.BACKENDS.items()
    ],
)


def packed(codes: Tensor) -> Packed:
    """uint8 codes [N, K], two of each four not zero at most, with a scale of 1."""
    rows, columns = codes.shape
    return Packed(sparse24.pack(codes, 8), torch.ones(rows, 1), None, "float8-2x4", (1, columns), columns)


def every_pair_of_places(rows: int) -> Tensor:
    """uint8 codes [rows, 288]: each pair of places of a four before each other one; numbers are 0.5 to 7.5."""
    codes = torch.zeros(36, 2, 4, dtype=torch.uint8)
    for unit, fours in zip(codes, product(combinations(range(4), 2), repeat=2), strict=True):
        for four, places in zip(unit, fours, strict=True):
            four[list(places)] = torch.randint(0x30, 0x50, (2,), dtype=torch.uint8) + 0x80 * torch.randint(2, ()).item()
    return torch.stack([codes.roll(i, 0).flatten() for i in range(rows)])


@every_backend
def test_every_pair_of_places_picks_its_inputs(backend: str) -> None:
    """Inputs that are columns of the identity give the weights back, bit for bit."""
    weight = packed(every_pair_of_places(7))
    exact = weight.dequantize()
    x = torch.eye(weight.columns)
    for count in COUNTS:
        with registry.force(backend):
            found = torch.cat([ops.linear(part, weight) for part in x.split(count)])
        assert torch.equal(found, exact.T), count


@every_backend
@pytest.mark.parametrize("columns", [1, 3, 4, 5, 8, 12, 63, 64, 65, 68, 132, 288])
def test_rows_of_any_length(backend: str, columns: int) -> None:
    """Integers as inputs: sums are exact in float32, whatever their order."""
    weight = packed(every_pair_of_places(5)[:, :columns])
    exact = weight.dequantize()
    for count in COUNTS:
        x = torch.randint(-8, 9, (count, columns)).float()
        with registry.force(backend):
            found = ops.linear(x, weight)
        assert torch.equal(found, (x.double() @ exact.double().T).float()), count


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_not_finite_shows_where_codes_were_dropped_too(backend: str, dtype: torch.dtype) -> None:
    """As 0 times infinity is NaN; and it stays with its token."""
    weight = packed(every_pair_of_places(9))
    for count, value in product(COUNTS[:-1], (float("inf"), float("nan"))):
        x = torch.randn(count, weight.columns).to(dtype)
        with registry.force(backend):
            plain = ops.linear(x, weight)
            x[count // 2, 0] = value
            found = ops.linear(x, weight)
        assert not found[count // 2].isfinite().any()
        assert torch.equal(found[count // 2].isnan(), (weight.dequantize()[:, 0] * value).isnan())
        others = torch.arange(count) != count // 2
        assert torch.equal(found[others], plain[others]) and plain.isfinite().all()
