"""2:4 sparse codes: exact bytes, exact round trips, and nothing that depends on where a row is cut."""

from __future__ import annotations

import pytest
import torch
from cases import read_sparse_codes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmquant.packing.sparse24 import pack, row_bytes, unit, unpack


def sparse_codes(rows: int, columns: int, seed: int) -> Tensor:
    """Codes of which at least two of each four are zero, and often more."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (rows, -(-columns // 4), 4), dtype=torch.uint8, generator=generator)
    codes[torch.rand(codes.shape, generator=generator) < 0.2] = 0
    order = torch.rand(codes.shape, generator=generator).argsort(-1)
    return codes.scatter(-1, order[..., 2:], 0).flatten(1)[:, :columns].contiguous()


@given(st.integers(1, 4), st.integers(1, 90), st.integers(0, 2**31))
def test_round_trip_by_two_readers(rows: int, columns: int, seed: int) -> None:
    codes = sparse_codes(rows, columns, seed)
    packed = pack(codes, 8)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, row_bytes(columns, 8)) and packed.is_contiguous()
    assert torch.equal(unpack(packed, 8, columns), codes)
    assert read_sparse_codes(packed, columns).tolist() == codes.tolist()


def test_leading_dimensions() -> None:
    codes = sparse_codes(6, 70, 0).reshape(2, 3, 70)
    assert torch.equal(unpack(pack(codes, 8), 8, 70), codes)
    assert torch.equal(pack(codes, 8)[1, 2], pack(codes[1, 2], 8))


def test_known_bytes() -> None:
    codes = torch.tensor([0, 7, 0, 9, 128, 0, 0, 255, 0, 0, 5], dtype=torch.uint8)
    # Columns 1 and 3; 0 and 3; then 2 alone, with the first zero beside it, in a row that ends there.
    assert pack(codes, 8).tolist() == [0b1100_1101, 7, 9, 128, 255, 0b0100_1000, 0, 5]


@pytest.mark.parametrize(("mask", "columns"), [(m, [i for i in range(4) if m >> i & 1]) for m in range(16)])
def test_every_pattern_of_four(mask: int, columns: list[int]) -> None:
    codes = torch.tensor([i + 1 if i in columns else 0 for i in range(4)], dtype=torch.uint8)
    if len(columns) > 2:
        return  # no 2:4 pattern
    places, *kept = pack(codes, 8).tolist()
    low, high = places & 3, places >> 2 & 3
    assert low < high and set(columns) <= {low, high}
    assert kept == [codes[low], codes[high]]
    assert {low, high} == set((columns + [i for i in range(4) if i not in columns])[:2])


@pytest.mark.parametrize("columns", [4, 8, 12, 4096])
def test_bytes_are_half_the_codes_and_four_bits_a_four(columns: int) -> None:
    assert row_bytes(columns, 8) == columns // 2 + -(-columns // 8)


@given(st.integers(0, 10), st.integers(1, 40), st.integers(0, 2**31))
def test_eight_columns_are_a_range_of_bytes(units: int, more: int, seed: int) -> None:
    codes = sparse_codes(2, 8 * units + more, seed)
    columns, width = unit(8)
    assert torch.equal(pack(codes, 8)[:, units * width :], pack(codes[:, units * columns :], 8))
