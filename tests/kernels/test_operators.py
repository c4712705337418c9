"""The operators against float64 products of independently read weights; their checks, gradients and fakes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from cases import ALL_CASES, DTYPES, ONE_PER_FORMAT, SHAPES, Case, make_weight, read
from torch import Tensor

from llmquant.formats import FORMATS
from llmquant.kernels import ops, reference, registry
from llmquant.kernels.packed import Packed
from llmquant.packing.bits import pack

# How far a float32 sum of at most 257 products, rounded once to the dtype, may lie from the exact one, relative to the
# sum of magnitudes.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
LEADING = ((0,), (1,), (3,), (), (2, 3), (1, 0, 2))

every_case = pytest.mark.parametrize("case", ALL_CASES, ids=str)
every_format = pytest.mark.parametrize("case", ONE_PER_FORMAT, ids=str)


@cache
def packed(case: Case, shape: tuple[int, int], seed: int = 0) -> tuple[Packed, Tensor]:
    """A packed weight, and what it means in float64."""
    weight = case.quantize(make_weight(shape, seed=seed) * 50)
    return weight.packed(), torch.from_numpy(read(weight))


def assert_sums_close(found: Tensor, exact: Tensor, magnitude: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and found.shape == exact.shape
    assert torch.all((found.double() - exact).abs() <= TOLERANCE[dtype] * magnitude + 1e-12)


@every_case
def test_dequantize_is_exactly_what_an_independent_reader_reads(case: Case) -> None:
    for shape in SHAPES:
        weight, exact = packed(case, shape)
        assert torch.equal(weight.dequantize().double(), exact), shape


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(case: Case, dtype: torch.dtype) -> None:
    for shape in SHAPES[:3]:
        weight, exact = packed(case, shape)
        bias = torch.randn(shape[0]).to(dtype)
        for leading in LEADING:
            x = torch.randn(*leading, shape[1]).to(dtype)
            product, magnitude = x.double() @ exact.T, x.double().abs() @ exact.abs().T
            assert_sums_close(ops.linear(x, weight), product, magnitude, dtype)
            found = ops.linear(x, weight, bias)
            assert_sums_close(found, product + bias.double(), magnitude + bias.double().abs(), dtype)


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matmul(case: Case, dtype: torch.dtype) -> None:
    for shape in SHAPES[:3]:
        weight, exact = packed(case, shape)
        for leading in LEADING:
            x = torch.randn(*leading, shape[0]).to(dtype)
            assert_sums_close(ops.matmul(x, weight), x.double() @ exact, x.double().abs() @ exact.abs(), dtype)


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_is_exact(case: Case, dtype: torch.dtype) -> None:
    for shape in SHAPES[:3]:
        weight, exact = packed(case, shape)
        for i, leading in enumerate(LEADING):
            indices = torch.randint(shape[0], leading, dtype=(torch.int32, torch.int64)[i % 2])
            found = ops.embedding(indices, weight, dtype)
            assert found.shape == (*leading, shape[1]) and found.dtype == dtype
            assert torch.equal(found, exact.float().to(dtype)[indices.long()])


@every_format
def test_inputs_need_not_be_contiguous(case: Case) -> None:
    weight, _ = packed(case, (7, 70))
    x = torch.randn(70, 3).t()
    assert torch.equal(ops.linear(x, weight), ops.linear(x.contiguous(), weight))
    y = torch.randn(7, 3).t()
    assert torch.equal(ops.matmul(y, weight), ops.matmul(y.contiguous(), weight))


@every_format
def test_a_float32_bias_goes_with_16_bit_input(case: Case) -> None:
    weight, exact = packed(case, (7, 70))
    x, bias = torch.randn(3, 70).bfloat16(), torch.randn(7)
    exact_sum = x.double() @ exact.T + bias.double()
    magnitude = x.double().abs() @ exact.abs().T + bias.double().abs()
    assert_sums_close(ops.linear(x, weight, bias), exact_sum, magnitude, torch.bfloat16)


# --- panels -----------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("elements", [1, 100, 300, 10**6])
def test_panels_cover_every_row_once(case: Case, elements: int) -> None:
    weight, exact = packed(case, (7, 70))
    panels = weight.panels(elements)
    assert [row for start, stop in panels for row in range(start, stop)] == list(range(7))
    for start, stop in panels:
        assert start % weight.block[0] == 0
        assert torch.equal(weight.panel(start, stop).dequantize().double(), exact[start:stop])
        assert weight.panel(start, stop).qdata.data_ptr() == weight.qdata[start:].data_ptr()  # views


@every_format
def test_results_do_not_depend_on_the_panels(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = packed(case, (7, 70))
    x, y, bias = torch.randn(3, 70), torch.randn(3, 7), torch.randn(7)
    whole = ops.linear(x, weight, bias), ops.matmul(y, weight)
    monkeypatch.setattr(Packed, "panels", lambda self, elements=0: [(i, i + 1) for i in range(self.rows)])
    torch.testing.assert_close(ops.linear(x, weight, bias), whole[0])
    torch.testing.assert_close(ops.matmul(y, weight), whole[1])


@every_format
def test_the_same_bits_again_and_with_any_number_of_threads(case: Case) -> None:
    weight, _ = packed(case, (64, 257))
    x, y, indices = torch.randn(5, 257), torch.randn(5, 64), torch.randint(64, (9,))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            results.append(
                (ops.linear(x, weight), ops.matmul(y, weight), ops.embedding(indices, weight, torch.float32))
            )
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("block", [(2, 32), (4, 24), (7, 70), (100, 100), (3, 1)], ids=str)
@pytest.mark.parametrize("name", ["int3", "int8"])
def test_blocks_of_several_rows_that_end_short(name: str, block: tuple[int, int]) -> None:
    """No config makes most of these yet; joined weights of one scale do."""
    fmt = FORMATS[name]
    across, along = -(-7 // block[0]), -(-70 // block[1])
    codes = torch.randint(2**fmt.bits, (7, 70), dtype=torch.uint8)
    points = torch.randint(2**fmt.bits, (across, along), dtype=torch.uint8)
    scale = torch.rand(across, along) + 0.5
    weight = Packed(pack(codes, fmt.bits), scale, pack(points, fmt.bits), name, block, 70)
    rows, columns = torch.arange(7)[:, None] // block[0], torch.arange(70)[None] // block[1]
    exact = ((codes.float() - points[rows, columns].float()) * scale[rows, columns]).double()
    assert torch.equal(weight.dequantize().double(), exact)
    for start, stop in weight.panels(100):
        assert torch.equal(weight.panel(start, stop).dequantize().double(), exact[start:stop])
    x, y = torch.randn(3, 70), torch.randn(3, 7)
    assert_sums_close(ops.linear(x, weight), x.double() @ exact.T, x.double().abs() @ exact.abs().T, torch.float32)
    assert_sums_close(ops.matmul(y, weight), y.double() @ exact, y.double().abs() @ exact.abs(), torch.float32)
    indices = torch.tensor([6, 0, 3])
    assert torch.equal(ops.embedding(indices, weight, torch.float32).double(), exact[indices])


# --- gradients --------------------------------------------------------------------------------------------


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return torch.autograd.grad(out, leaves, seed)


@every_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,)], ids=str)
def test_gradients_are_those_of_dense_autograd(case: Case, dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    weight, exact = packed(case, (7, 70))
    x, y = torch.randn(*leading, 70).to(dtype), torch.randn(*leading, 7).to(dtype)
    bias = torch.randn(7).to(dtype)
    tolerance = dict(rtol=4 * TOLERANCE[dtype], atol=100 * TOLERANCE[dtype])
    found = gradients(lambda x, b: ops.linear(x, weight, b), x, bias)
    dense = gradients(lambda x, b: x @ exact.T + b, x.double(), bias.double())
    for a, b in zip(found, dense, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, **tolerance)
    (found_x,) = gradients(lambda x: ops.linear(x, weight), x)
    assert torch.equal(found_x, found[0])
    (found_y,), (dense_y,) = gradients(lambda y: ops.matmul(y, weight), y), gradients(lambda y: y @ exact, y.double())
    assert found_y.dtype == dtype
    torch.testing.assert_close(found_y.double(), dense_y, **tolerance)


def test_a_bias_keeps_its_own_dtype_in_its_gradient() -> None:
    weight, _ = packed(Case("int4-g32"), (7, 70))
    x, bias = torch.randn(3, 70).bfloat16(), torch.randn(7)
    assert [g.dtype for g in gradients(lambda x, b: ops.linear(x, weight, b), x, bias)] == [
        torch.bfloat16,
        torch.float32,
    ]


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    weight, _ = packed(Case("int4-g32"), (7, 70))
    bias = torch.zeros(7, requires_grad=True)
    ops.linear(torch.randn(3, 70), weight, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((7,), 3.0))
    x = torch.randn(3, 70, requires_grad=True)
    ops.linear(x, weight, bias.detach()).sum().backward()
    assert x.grad is not None


# --- registration -----------------------------------------------------------------------------------------


def arguments(case: Case) -> dict[str, tuple]:
    weight, _ = packed(case, (7, 70))
    bias = torch.randn(7, requires_grad=True)
    return {
        "linear": (torch.randn(2, 3, 70, requires_grad=True), *weight, bias),
        "matmul": (torch.randn(2, 3, 7, requires_grad=True), *weight),
        "embedding": (torch.randint(7, (2, 3)), *weight, torch.bfloat16),
    }


@pytest.mark.parametrize("op", ["linear", "matmul", "embedding"])
@pytest.mark.parametrize("case", [Case("int4-g32"), Case("int3-g24-asym"), Case("float8-tensor")], ids=str)
def test_opcheck(op: str, case: Case) -> None:
    torch.library.opcheck(getattr(torch.ops.llmquant, op).default, arguments(case)[op])


@pytest.mark.parametrize("op", ["linear", "matmul", "embedding"])
@every_format
def test_fakes_know_shape_and_dtype(op: str, case: Case) -> None:
    function, args = getattr(torch.ops.llmquant, op), arguments(case)[op]
    real = function(*args)
    fake = function(*[a.detach().to("meta") if isinstance(a, Tensor) else a for a in args])
    assert fake.is_meta
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


# --- checks -----------------------------------------------------------------------------------------------

GOOD = Case("int4-g32-asym")


def damaged(**changes: Callable[[Packed], object]) -> Packed:
    weight, _ = packed(GOOD, (7, 70))
    return weight._replace(**{name: change(weight) for name, change in changes.items()})


BAD_WEIGHTS = {
    "too few bytes a row": (damaged(qdata=lambda w: w.qdata[:, :-1]), "qdata"),
    "too many bytes a row": (damaged(columns=lambda w: 68), "qdata"),
    "a fitting count of bytes for another width": (damaged(format=lambda w: "int3"), "qdata"),
    "signed bytes": (damaged(qdata=lambda w: w.qdata.view(torch.int8)), "uint8"),
    "one scale too few": (damaged(scale=lambda w: w.scale[:, :-1]), "scale"),
    "a row of scales missing": (damaged(scale=lambda w: w.scale[:-1]), "scale"),
    "scales without groups": (damaged(scale=lambda w: w.scale.flatten()), "scale"),
    "another group": (damaged(block=lambda w: (1, 64)), "scale"),
    "zero points of another width": (damaged(zero_point=lambda w: w.zero_point[:, :-1]), "zero_point"),
    "a row of zero points missing": (damaged(zero_point=lambda w: w.zero_point[:-1]), "zero_point"),
}


@pytest.fixture
def no_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    def computed(*_: object) -> None:
        raise AssertionError("computed before the checks")

    for name in ("linear", "matmul", "embedding"):
        monkeypatch.setattr(reference, name, computed)


@pytest.mark.parametrize("name", BAD_WEIGHTS)
@pytest.mark.usefixtures("no_compute")
def test_a_weight_that_does_not_fit_itself_is_refused_before_anything_is_computed(name: str) -> None:
    weight, text = BAD_WEIGHTS[name]
    for call in (
        lambda: ops.linear(torch.randn(3, weight.columns), weight),
        lambda: ops.matmul(torch.randn(3, 7), weight),
        lambda: ops.embedding(torch.tensor([0]), weight, torch.float32),
    ):
        with pytest.raises(RuntimeError, match=text):
            call()


BAD_INPUTS = {
    "too wide": (lambda w: ops.linear(torch.randn(3, 71), w), "71"),
    "no dimension": (lambda w: ops.linear(torch.tensor(1.0), w), "linear"),
    "integers": (lambda w: ops.linear(torch.ones(3, 70, dtype=torch.int64), w), "int64"),
    "bias too long": (lambda w: ops.linear(torch.randn(3, 70), w, torch.randn(8)), "bias"),
    "bias of two dimensions": (lambda w: ops.linear(torch.randn(3, 70), w, torch.randn(1, 7)), "bias"),
    "matmul of K columns": (lambda w: ops.matmul(torch.randn(3, 70), w), "70"),
    "matmul of integers": (lambda w: ops.matmul(torch.ones(3, 7, dtype=torch.int32), w), "int32"),
    "float indices": (lambda w: ops.embedding(torch.ones(3), w, torch.float32), "float32"),
    "bool indices": (lambda w: ops.embedding(torch.ones(3, dtype=torch.bool), w, torch.float32), "bool"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
@pytest.mark.usefixtures("no_compute")
def test_an_input_that_does_not_fit_is_refused_before_anything_is_computed(name: str) -> None:
    call, text = BAD_INPUTS[name]
    with pytest.raises(RuntimeError, match=text):
        call(packed(GOOD, (7, 70))[0])


@pytest.mark.parametrize("index", [7, -1, 10**6])
@pytest.mark.parametrize("case", [Case("int4-g32-asym"), Case("int8-tensor")], ids=str)
def test_an_index_out_of_range_is_refused(index: int, case: Case) -> None:
    with pytest.raises(IndexError):
        ops.embedding(torch.tensor([0, index]), packed(case, (7, 70))[0], torch.float32)


def test_the_choice_of_kernel_is_explained() -> None:
    choice = registry.choose("int4", (1, 32), 64, "cpu")
    assert choice.kernel in registry.BACKENDS and choice.reason
