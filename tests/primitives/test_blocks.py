"""Cutting into blocks and back loses nothing, and puts every element in the block it belongs to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmquant.errors import ConfigError
from llmquant.primitives.blocks import block_counts, from_blocks, to_blocks
from llmquant.primitives.granularity import (
    PerAxis,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
    PerTokenGroup,
    block_shape,
    granularity_name,
)

sizes = st.integers(1, 20)


@given(sizes, sizes, sizes, sizes)
def test_round_trip_and_membership(rows: int, columns: int, block_rows: int, block_columns: int) -> None:
    matrix = torch.arange(1, rows * columns + 1, dtype=torch.float32).reshape(rows, columns)
    block = (block_rows, block_columns)
    blocks = to_blocks(matrix, block)
    across, along = block_counts(rows, columns, block)
    assert blocks.shape == (across, along, block_rows * block_columns)
    assert torch.equal(from_blocks(blocks, rows, columns, block), matrix)
    for b in range(across):
        for g in range(along):
            part = matrix[b * block_rows : (b + 1) * block_rows, g * block_columns : (g + 1) * block_columns]
            found = blocks[b, g]
            assert sorted(found[found != 0].tolist()) == sorted(part.flatten().tolist())  # the padding is zero


@given(sizes, sizes, sizes)
def test_rows_are_cut_in_order(rows: int, columns: int, group: int) -> None:
    matrix = torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)
    for g, start in enumerate(range(0, columns, group)):
        part = matrix[:, start : start + group]
        assert torch.equal(to_blocks(matrix, (1, group))[:, g, : part.shape[1]], part)


def test_nothing_is_copied_where_nothing_is_padded() -> None:
    matrix = torch.randn(4, 64)
    assert to_blocks(matrix, (1, 32)).data_ptr() == matrix.data_ptr()


@pytest.mark.parametrize(
    ("granularity", "name", "block"),
    [
        (PerGroup(32), "group", (1, 32)),
        (PerGroup(100), "group", (1, 70)),
        (PerRow(), "row", (1, 70)),
        (PerAxis(0), "row", (1, 70)),
        (PerTensor(), "tensor", (6, 70)),
    ],
)
def test_granularities(granularity: object, name: str, block: tuple[int, int]) -> None:
    assert granularity_name(granularity) == name
    assert block_shape(granularity, 6, 70) == block


@pytest.mark.parametrize("granularity", [PerAxis(1), PerToken(), PerTokenGroup(32), None, "row"])
def test_what_weights_cannot_have(granularity: object) -> None:
    with pytest.raises(ConfigError, match="PerGroup"):
        block_shape(granularity, 6, 70)


@pytest.mark.parametrize("size", [0, -1])
def test_groups_have_at_least_one_element(size: int) -> None:
    with pytest.raises(ConfigError, match=str(size)):
        PerGroup(size)
    with pytest.raises(ConfigError, match=str(size)):
        PerTokenGroup(size)
