"""The Triton kernel against the reference, in Triton's interpreter, which must be asked for before anything imports
Triton: `test_triton.py` runs this file in a process of its own. By hand: TRITON_INTERPRET=1 pytest on this file."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import ALL_CASES, DTYPES, ONE_PER_FORMAT, Case, make_weight
from torch import Tensor

from llmquant.formats import get_format
from llmquant.kernels import ops, reference, registry
from llmquant.kernels.packed import Packed
from llmquant.kernels.triton import TRITON
from llmquant.primitives.dynamic import FLOAT8, Activation
from llmquant.primitives.metrics import compute_error

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_triton.py runs it in a process of its own", allow_module_level=True)
pytest.importorskip("triton")

# SQNR against float64: rounding the output, and for 16-bit inputs the weights too (see `rounded`); no more, no less.
BOUNDS = {torch.float32: (122, 170), torch.float16: (66, 85), torch.bfloat16: (44, 60)}
SHAPES = ((33, 100), (70, 136), (2, 65), (1, 1))


def served(cases: list[Case]) -> list[Case]:
    """Those that the kernel does not refuse."""
    return [c for c in cases if TRITON.refusal(c.format.name, c.config.spec(8, 64).block, 64, "cpu") is None]


every_case = pytest.mark.parametrize("case", served(ALL_CASES), ids=str)
every_format = pytest.mark.parametrize("case", served(ONE_PER_FORMAT), ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def packed(case: Case, rows: int, columns: int) -> Packed:
    return case.quantize(make_weight((rows, columns)) * 0.02).packed()


def random_codes(case: Case, rows: int, columns: int) -> Packed:
    """A weight of that kind in which every code occurs, also those that no algorithm chooses."""
    weight = packed(case, rows, columns)
    qdata = torch.randint(256, weight.qdata.shape, dtype=torch.uint8)
    fmt = get_format(weight.format)
    if fmt.element and fmt.bits == 8:  # which has codes of NaN and infinity
        qdata[weight._replace(qdata=qdata).dequantize().isfinite().logical_not()] = 0
    zero_point = None if weight.zero_point is None else torch.randint(256, weight.zero_point.shape, dtype=torch.uint8)
    return weight._replace(qdata=qdata, zero_point=zero_point)


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """As the interpreter rounds: to bfloat16 towards zero, which cards do to the nearest."""
    if dtype == torch.bfloat16:
        values = (values.view(torch.int32) & ~0xFFFF).view(torch.float32)
    return values.to(dtype)


@every_case
def test_what_the_kernel_decodes_is_bit_for_bit_what_the_reference_decodes(case: Case) -> None:
    """Each row of the identity picks a column of the weight, rounded to the input's dtype."""
    for shape, dtype in zip(SHAPES, (*DTYPES, torch.float32), strict=True):
        weight = random_codes(case, *shape)
        found = TRITON.linear(torch.eye(weight.columns, dtype=dtype), weight, None)
        assert torch.equal(found.T, rounded(weight.dequantize(), dtype)), (shape, dtype)


@every_case
@every_dtype
def test_linear_is_as_exact_as_its_dtype(case: Case, dtype: torch.dtype) -> None:
    for shape, counts in (((33, 100), (1, 17)), ((7, 576), (3, 33)), ((70, 136), (16, 70))):
        weight = packed(case, *shape)
        for count in counts:
            x, bias = torch.randn(count, weight.columns).to(dtype), torch.randn(weight.rows)
            found = TRITON.linear(x, weight, bias)
            exact = F.linear(x.double(), weight.dequantize().double(), bias.double())
            low, high = BOUNDS[dtype]
            error = float(compute_error(exact, found))
            assert found.dtype == dtype and found.shape == exact.shape
            assert low < error, (shape, count, error)
            assert error < high or found.numel() < 100, ("too good: is the output really rounded?", shape, count, error)


@every_format
@pytest.mark.parametrize("shape", [(0, 200), (200,), (2, 3, 200), (2, 0, 200)], ids=str)
def test_leading_dimensions(case: Case, shape: tuple[int, ...]) -> None:
    weight, x = packed(case, 9, 200), torch.randn(shape)
    with registry.force("triton"):
        found = ops.linear(x, weight)
    torch.testing.assert_close(found, reference.linear(x, weight, None))


@every_format
def test_inputs_and_weights_need_not_be_contiguous_and_neighbours_are_left_out(case: Case) -> None:
    whole = case.quantize(make_weight((48, 128)))
    x, bias = torch.randn(128, 6).t(), torch.randn(60)[::2][:30]
    part = whole[3:33]
    with registry.force("triton"):
        found = F.linear(x, part, bias)
    torch.testing.assert_close(found, reference.linear(x, part.packed(), bias))


def before_a_forbidden_page(tensor: Tensor) -> Tensor:
    """A copy behind whose last byte nothing may be read."""
    pages = -(-tensor.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * mmap.PAGESIZE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, 0) == 0
    offset = pages * mmap.PAGESIZE - tensor.nbytes
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return copy.view(tensor.shape).copy_(tensor)


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
@every_format
def test_the_kernel_stays_in_its_memory(case: Case) -> None:
    for rows, columns in ((33, 100), (5, 3)):
        weight = packed(case, rows, columns)
        parts = {"qdata": weight.qdata, "scale": weight.scale, "zero_point": weight.zero_point}
        moved = weight._replace(**{n: None if t is None else before_a_forbidden_page(t) for n, t in parts.items()})
        moved.outer = None if weight.outer is None else before_a_forbidden_page(weight.outer)
        x, bias = before_a_forbidden_page(torch.randn(17, columns)), before_a_forbidden_page(torch.randn(rows))
        found = TRITON.linear(x, moved, bias)
        torch.testing.assert_close(found, reference.linear(x, weight, bias))


def test_products_of_nothing() -> None:
    weight, bias = packed(Case("int4-g32"), 5, 64), torch.randn(5)
    none = weight._replace(qdata=weight.qdata[:, :0], scale=weight.scale[:, :0], columns=0)
    assert torch.equal(TRITON.linear(torch.randn(3, 0), none, bias), bias.expand(3, -1))
    empty = weight._replace(qdata=weight.qdata[:0], scale=weight.scale[:0])
    assert TRITON.linear(torch.randn(3, 64), empty, None).shape == (3, 0)


def test_float64_inputs_are_served_by_the_reference() -> None:
    weight, x = packed(Case("int4-g32"), 5, 64), torch.randn(3, 64, dtype=torch.float64)
    assert torch.equal(TRITON.linear(x, weight, None), reference.linear(x, weight, None))


@every_dtype
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_tokens_that_are_not_finite_stay_alone(dtype: torch.dtype, poison: float) -> None:
    weight, x = packed(Case("int4-g32"), 40, 100), torch.randn(20, 100).to(dtype)
    clean = TRITON.linear(x, weight, None)
    x[7, 99] = poison
    found = TRITON.linear(x, weight, None)
    others = torch.arange(20) != 7
    assert not found[7].isfinite().any() and torch.equal(found[others], clean[others])


@every_format
@every_dtype
def test_quantized_activations(case: Case, dtype: torch.dtype) -> None:
    weight, bias = packed(case, 33, 100), torch.randn(33)
    low = {torch.float32: 110, torch.float16: 60, torch.bfloat16: 42}[dtype]
    for group in (0, 32):
        x = torch.randn(5, 100).to(dtype)
        with registry.force("triton"):
            int8 = ops.linear_int8(x, weight, Activation(group, True), bias)
            float8 = ops.linear_float8(x, weight, Activation(group, dtype=FLOAT8), bias)
        assert int8.dtype == float8.dtype == dtype
        wide, wide_bias = x.float(), bias.float()
        exact = reference.linear_int8(wide, weight, Activation(group, True), wide_bias)
        assert float(compute_error(exact, int8)) > low
        exact = reference.linear_float8(x, weight, Activation(group, dtype=FLOAT8), bias).float()
        assert float(compute_error(exact, float8)) > low


@every_format
def test_it_serves_every_operator_of_a_weight_when_forced(case: Case) -> None:
    weight = case.quantize(make_weight((12, 64)))
    x, indices = torch.randn(3, 64, requires_grad=True), torch.tensor([[0, 11], [5, 5]])
    with registry.force("triton"):
        product = F.linear(x, weight)
        product.sum().backward()
        rows: Tensor = F.embedding(indices, weight)
    torch.testing.assert_close(product, x @ weight.dequantize().T)
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(3, -1))
    assert torch.equal(rows, weight.dequantize()[indices])
