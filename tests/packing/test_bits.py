"""Packing changes only bits: exact bytes against big integers, and exact round trips."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmquant.formats import FORMATS
from llmquant.packing import bits
from llmquant.packing.bits import pack, unpack


@st.composite
def codes_and_bits(draw: st.DrawFn) -> tuple[Tensor, int]:
    bits = draw(st.integers(1, 8))
    shape = (*draw(st.lists(st.integers(1, 3), max_size=2)), draw(st.integers(0, 200)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(2**bits, shape, dtype=torch.uint8, generator=generator), bits


def oracle(row: list[int], bits: int) -> list[int]:
    """The row as one big integer, code i at bit i * bits; its bytes, little end first."""
    number = sum(code << (i * bits) for i, code in enumerate(row))
    return list(number.to_bytes(-(-len(row) * bits // 8), "little"))


def as_rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


@given(codes_and_bits())
def test_round_trip(case: tuple[Tensor, int]) -> None:
    codes, bits = case
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*codes.shape[:-1], -(-codes.shape[-1] * bits // 8))
    found = unpack(packed, bits, codes.shape[-1])
    assert found.dtype == torch.uint8
    assert torch.equal(found, codes)


@given(codes_and_bits())
def test_bytes_are_those_of_the_bit_stream(case: tuple[Tensor, int]) -> None:
    codes, bits = case
    packed = pack(codes, bits)
    for row, found in zip(as_rows(codes), as_rows(packed), strict=True):
        assert found.tolist() == oracle(row.tolist(), bits)


@given(codes_and_bits())
def test_tail_bits_are_zero(case: tuple[Tensor, int]) -> None:
    codes, bits = case
    used = codes.shape[-1] * bits
    if used % 8:
        full = torch.full_like(codes, 2**bits - 1)
        assert int((pack(full, bits)[..., -1] >> (used % 8)).max()) == 0


@given(codes_and_bits())
def test_rows_are_independent(case: tuple[Tensor, int]) -> None:
    codes, bits = case
    rows = as_rows(codes)
    together = pack(rows, bits)
    for i, row in enumerate(rows):
        assert torch.equal(pack(row, bits), together[i])
    assert torch.equal(pack(rows.flip(0), bits), together.flip(0))


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_that_are_no_contiguous_tensor(bits: int) -> None:
    codes = torch.randint(2**bits, (13, 6), dtype=torch.uint8)
    packed = pack(codes.t(), bits)
    assert torch.equal(unpack(packed, bits, 13), codes.t())
    assert torch.equal(unpack(pack(codes.t().contiguous(), bits)[:, :], bits, 13), codes.t())
    strided = torch.stack([packed, packed], -1)[..., 0]
    assert torch.equal(unpack(strided, bits, 13), codes.t())


def test_even_codes_lie_in_the_low_nibble() -> None:
    assert pack(torch.tensor([0x1, 0x2, 0x3], dtype=torch.uint8), 4).tolist() == [0x21, 0x03]


def test_known_bytes() -> None:
    assert pack(torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 1], dtype=torch.uint8), 1).tolist() == [0x81, 0x01]
    # 3-bit codes 1, 2, 7 are the bits 100 010 111, low bit first.
    assert pack(torch.tensor([1, 2, 7], dtype=torch.uint8), 3).tolist() == [0b11010001, 0b1]


@given(st.sampled_from([name for name, row in FORMATS.items() if row.packing is bits]), st.integers(0, 300))
def test_the_table_of_formats_counts_the_same_bytes(name: str, columns: int) -> None:
    row = FORMATS[name]
    assert pack(torch.zeros(2, columns, dtype=torch.uint8), row.bits).shape[-1] == row.row_bytes(columns)
