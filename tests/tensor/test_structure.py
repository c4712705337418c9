"""Operations that only move or copy weights: each equals the same operation on the dequantized tensor, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import ALL_CASES, DTYPES, ONE_PER_FORMAT, Case, make_weight, read
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, Layout
from torch import Tensor

from llmquant.errors import UnsupportedOpError
from llmquant.primitives.granularity import PerBlock
from llmquant.tensor import QuantizedTensor

Operation = Callable[[Any, Layout], Any]

# Of any layout. Groups have 32 columns, so that 32 and 64 lie on their edges and 70 is the end.
ANYWHERE: dict[str, Operation] = {
    "detach": lambda t, _: t.detach(),
    "clone": lambda t, _: t.clone(),
    "alias": lambda t, _: torch.ops.aten.alias(t),
    "contiguous": lambda t, _: t.contiguous(),
    "mT": lambda t, _: t.mT,
    "mT twice": lambda t, _: t.mT.mT,
    "transpose": lambda t, _: t.transpose(-1, -2),
    "transpose in place of itself": lambda t, _: t.transpose(-1, -1),
    "swapaxes": lambda t, _: t.swapaxes(-2, -1),
    "permute": lambda t, _: t.permute(*range(t.dim() - 2), -1, -2),
    "permute nothing": lambda t, _: t.permute(*range(t.dim())),
    "view as it is": lambda t, _: t.view(t.shape),
    "reshape as it is": lambda t, _: t.reshape(*t.shape[:-1], -1),
    "expand nothing": lambda t, _: t.expand(t.shape),
    "expand a dimension": lambda t, _: t.expand(2, *[-1] * t.dim()),
    "narrow rows": lambda t, at: t.narrow(at.r, 1, 3),
    "narrow from the end": lambda t, at: t.narrow(at.r, -2, 2),
    "narrow by a negative dimension": lambda t, at: t.narrow(at.r - t.dim(), 2, 2),
    "narrow to nothing": lambda t, at: t.narrow(at.r, 2, 0),
    "narrow columns": lambda t, at: t.narrow(at.c, 32, 32),
    "narrow the tail": lambda t, at: t.narrow(at.c, 64, 6),
    "narrow columns to nothing": lambda t, at: t.narrow(at.c, 32, 0),
    "cut a tail": lambda t, at: t.narrow(at.c, 32, 35),
    "slice everything": lambda t, _: t[:],
    "slice with an ellipsis": lambda t, _: t[..., :],
    "slice beyond the end": lambda t, at: torch.ops.aten.slice(t, at.r, 4, 10**9),
    "slice from below": lambda t, at: torch.ops.aten.slice(t, at.r, -3, -1),
    "slice backwards": lambda t, at: torch.ops.aten.slice(t, at.r, 4, 2),
    "split rows": lambda t, at: t.split(4, at.r),
    "split rows by sizes": lambda t, at: t.split([1, 3, 2], at.r),
    "split columns": lambda t, at: t.split(32, at.c),
    "split columns by sizes": lambda t, at: t.split([64, 6], at.c),
    "chunk rows": lambda t, at: t.chunk(4, at.r),
    "chunk columns": lambda t, at: t.chunk(1, at.c),
    "tensor_split rows": lambda t, at: t.tensor_split(4, at.r),
    "index_select rows": lambda t, at: t.index_select(at.r, torch.tensor([5, 0, 0, 3])),
    "index_select no rows": lambda t, at: t.index_select(at.r, torch.tensor([], dtype=torch.int64)),
    "slice of a slice": lambda t, at: t.narrow(at.r, 1, 4).narrow(at.r, 2, 2).narrow(at.c, 32, 38).narrow(at.c, 0, 32),
    "rows of columns": lambda t, at: t.narrow(at.c, 32, 38).index_select(at.r, torch.tensor([2, 1])),
}
STRAIGHT: dict[str, Operation] = {
    "t": lambda t, _: t.t(),
    "T": lambda t, _: t.T,
    "t of a slice": lambda t, _: t[2:5].t(),
    "slice rows": lambda t, _: t[1:4],
    "slice rows and columns": lambda t, _: t[-4:, 32:64],
    "index rows": lambda t, _: t[torch.tensor([3, 3, -1])],
    "index by a list": lambda t, _: t[[4, 0]],
    "index by a mask": lambda t, _: t[torch.tensor([True, False, True, True, False, False])],
    "index by int32": lambda t, _: t[torch.tensor([2, 5], dtype=torch.int32)],
}
BY_ROWS: dict[str, Operation] = {  # not where one scale spans rows
    "cat rows": lambda t, _: torch.cat([t, t[1:3]]),
    "view as experts": lambda t, _: t.view(3, 2, -1),
    "unflatten": lambda t, _: t.unflatten(0, (2, 3)),
}
OF_EXPERTS: dict[str, Operation] = {
    "select an expert": lambda t, _: t[1],
    "select the last expert": lambda t, _: t[-1],
    "select by select": lambda t, _: t.select(0, 2),
    "iterate": lambda t, _: list(t),
    "unbind": lambda t, _: t.unbind(),
    "slice experts": lambda t, _: t[1:],
    "index experts": lambda t, _: t[torch.tensor([2, 0, 2, -1])],
    "expert and rows": lambda t, at: t[2].narrow(at.r - 1, 2, 3),
    "cat experts": lambda t, _: torch.cat([t[:1], t]),
    "cat columns of experts": lambda t, at: torch.cat([t.narrow(at.c, 0, 32), t.narrow(at.c, 0, 32)], at.c),
}


def compare(found: Any, expected: Any, what: str) -> None:
    if isinstance(expected, Tensor):
        assert isinstance(found, QuantizedTensor), what
        assert found.shape == expected.shape and found.dtype == expected.dtype, what
        assert torch.equal(found.dequantize(), expected), what
        assert found.nbytes == sum(t.nbytes for _, t in found.parts()), what
    else:
        assert len(found) == len(expected), what
        for a, b in zip(found, expected, strict=True):
            compare(a, b, what)


def check(operation: Operation, weight: QuantizedTensor, at: Layout, what: str) -> None:
    before, plain = weight.clone(), weight.dequantize()
    compare(operation(weight, at), operation(plain, at), what)
    assert torch.equal(weight, before), f"{what}: the source changed"
    with torch.inference_mode():
        compare(operation(weight, at), operation(plain, at), f"{what} in inference mode")


def layouts_for(name: str) -> list[Layout]:
    if name in OF_EXPERTS:
        return [at for at in LAYOUTS if at.experts]
    if name in STRAIGHT or name in BY_ROWS:
        return [at for at in LAYOUTS if not at.experts and not at.transposed]
    return LAYOUTS


@pytest.mark.parametrize("case", ONE_PER_FORMAT, ids=str)
@pytest.mark.parametrize("name", {**ANYWHERE, **STRAIGHT, **BY_ROWS, **OF_EXPERTS})
def test_same_as_on_the_dequantized_tensor(name: str, case: Case) -> None:
    operation = {**ANYWHERE, **STRAIGHT, **BY_ROWS, **OF_EXPERTS}[name]
    for i, at in enumerate(layouts_for(name)):
        dtype = DTYPES[(i + len(name)) % len(DTYPES)]
        if case.config.granularity != Case("int4-g32").config.granularity and "cat columns" in name:
            continue
        check(operation, at.quantize(case, dtype), at, f"{name}, {at}, {dtype}")


OTHERS = [c for c in ALL_CASES if c not in ONE_PER_FORMAT and "-g24" not in c.scheme]
BLOCKS = [c for c in OTHERS if isinstance(c.config.granularity, PerBlock)]


@pytest.mark.parametrize("case", [c for c in OTHERS if c not in BLOCKS], ids=str)
def test_structure_in_every_other_granularity_and_mapping(case: Case) -> None:
    for name in (
        "narrow rows",
        "cut a tail",
        "split columns",
        "index_select rows",
        "slice of a slice",
        "rows of columns",
    ):
        for at in LAYOUTS:
            check(ANYWHERE[name], at.quantize(case), at, f"{name}, {at}")


@pytest.mark.parametrize("at", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_slices_of_blocks_of_several_rows_begin_at_their_edges(case: Case, at: Layout) -> None:
    operations: dict[str, Operation] = {
        "a block": lambda t, at: t.narrow(at.r, 3, 3),
        "cut a block": lambda t, at: t.narrow(at.r, 0, 5),
        "slice of a slice": lambda t, at: t.narrow(at.r, 3, 2).narrow(at.c, 32, 38).narrow(at.c, 0, 32),
        **{name: ANYWHERE[name] for name in ("cut a tail", "split columns", "index_select rows", "rows of columns")},
    }
    for name, operation in operations.items():
        check(operation, at.quantize(case), at, name)
    with pytest.raises(UnsupportedOpError, match="cuts a block"):
        at.quantize(case).narrow(at.r, 1, 3)


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
@pytest.mark.parametrize("at", LAYOUTS[1:], ids=str)  # one straight matrix is read in tests/kernels
def test_dequantize_is_what_an_independent_reader_reads(case: Case, at: Layout) -> None:
    weight = at.quantize(case, torch.bfloat16)
    exact = torch.from_numpy(read(weight)).float()
    assert weight.shape == at.shape and weight.dtype == torch.bfloat16
    assert torch.equal(weight.dequantize(), exact.bfloat16())
    for dtype in (*DTYPES, torch.float64):
        assert torch.equal(weight.dequantize(dtype), exact.to(dtype))


# --- laws -------------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(st.sampled_from(ALL_CASES), st.integers(1, 8), st.integers(1, 140), st.data())
def test_any_column_slice_is_right_or_refused(case: Case, rows: int, columns: int, data: st.DataObject) -> None:
    """Where it starts inside a block or a four it must be refused, elsewhere, or empty, it must be exact."""
    weight = case.quantize(make_weight((rows, columns)))
    start = data.draw(st.integers(0, columns))
    stop = data.draw(st.integers(start, columns))
    step = weight.meta.block[1]
    cuts_block, cuts_four = step < columns and start % step, start % weight.format.packing.STEP
    if start < stop and (cuts_block or cuts_four):
        with pytest.raises(UnsupportedOpError, match="cuts a block" if cuts_block else "cuts 4 neighbours"):
            weight[:, start:stop]
    else:
        assert torch.equal(weight[:, start:stop].dequantize(), weight.dequantize()[:, start:stop])


@settings(max_examples=80)
@given(
    st.sampled_from([c for c in ALL_CASES if "tensor" not in c.scheme and "-b" not in c.scheme]),
    st.integers(2, 9),
    st.data(),
)
def test_what_was_split_can_be_joined(case: Case, rows: int, data: st.DataObject) -> None:
    weight = case.quantize(make_weight((rows, 70)))
    assert torch.equal(torch.cat(weight.split(data.draw(st.integers(1, rows)))), weight)
    if "-g" in case.scheme:
        size = weight.meta.block[1] * data.draw(st.integers(1, 3))
        assert torch.equal(torch.cat(weight.split(size, 1), 1), weight)
        turned = weight.t()
        assert torch.equal(torch.cat(turned.split(size, 0), 0), turned)


@pytest.mark.parametrize("case", ONE_PER_FORMAT, ids=str)
def test_row_slices_and_experts_are_views_and_copies_are_not(case: Case) -> None:
    weight = LAYOUTS[2].quantize(case)
    assert weight[:, 2:4].scale.untyped_storage().data_ptr() == weight.scale.untyped_storage().data_ptr()
    assert weight[1].qdata.data_ptr() == weight.qdata[1].data_ptr()
    flat = LAYOUTS[0].quantize(case)
    assert flat[2:4].qdata.data_ptr() == flat.qdata[2:].data_ptr()
    assert flat.t().qdata.data_ptr() == flat.qdata.data_ptr() == flat.detach().data_ptr() == flat.data_ptr()
    assert flat.expand(2, 6, 70).qdata.untyped_storage().data_ptr() == flat.qdata.untyped_storage().data_ptr()
    for copy in (flat.clone(), flat[[0, 1]], torch.cat([flat[:1], flat[1:]]), torch.empty_like(flat)):
        assert copy.qdata.data_ptr() != flat.qdata.data_ptr()


@pytest.mark.parametrize("case", ONE_PER_FORMAT, ids=str)
def test_writing_to_a_row_slice_writes_to_its_source_and_to_nothing_else(case: Case) -> None:
    weight, other = case.quantize(make_weight((6, 70))), case.quantize(make_weight((6, 70), seed=1))
    expected = weight.dequantize()
    if case.format.tensor_scale:
        with pytest.raises(UnsupportedOpError, match="tensor_scale"):
            weight[2:4].copy_(other[2:4])
        assert torch.equal(weight.dequantize(), expected)  # nothing was written
        other = torch.cat([weight[4:], weight[:4]])
    expected[2:4] = other.dequantize()[2:4]
    weight[2:4].copy_(other[2:4])
    assert torch.equal(weight.dequantize(), expected)
    for part in weight.chunk(3):
        part.copy_(part.clone())
    assert torch.equal(weight.dequantize(), expected)


def test_bad_dimensions_and_sizes_are_refused_as_torch_does() -> None:
    weight = Case("int4-g32").quantize(make_weight((6, 70)))
    for call in (lambda: weight.narrow(2, 0, 1), lambda: weight.split(3, -3), lambda: weight.select(5, 0)):
        with pytest.raises(IndexError):
            call()
    for call in (
        lambda: weight.narrow(0, 5, 2),
        lambda: weight.split([3, 100]),
        lambda: weight.view(5, 70),
        lambda: weight.index_select(0, torch.tensor([6])),
        lambda: torch.cat([weight, weight], 2),
    ):
        with pytest.raises((RuntimeError, IndexError)):
            call()
