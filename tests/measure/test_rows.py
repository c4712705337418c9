import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmquant.measure.rows import map_rows


@given(length=st.integers(1, 40), rows=st.integers(1, 50))
def test_is_the_function_of_all_rows(length: int, rows: int) -> None:
    left, right = torch.arange(3 * length).view(length, 3), torch.arange(length)
    result = map_rows(lambda a, b: a.sum(-1) * b, left, right, rows=rows)
    assert torch.equal(result, left.sum(-1) * right)


@given(length=st.integers(1, 40), rows=st.integers(1, 50))
def test_never_sees_more_rows_than_asked(length: int, rows: int) -> None:
    seen: list[int] = []
    map_rows(lambda chunk: seen.append(len(chunk)) or chunk, torch.zeros(length), rows=rows)
    assert max(seen) <= rows and sum(seen) == length


def test_unequal_lengths_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        map_rows(torch.add, torch.zeros(3), torch.zeros(4))
