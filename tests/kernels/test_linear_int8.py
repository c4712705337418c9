"""Products with int8 activations against loops over integers; their exactness, gradients, fakes and checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from cases import ALL_CASES, DTYPES, ONE_PER_FORMAT, VALUES, Case, make_weight, read_codes, read_elements
from torch import Tensor

from llmquant.errors import ConfigError
from llmquant.formats import FORMATS
from llmquant.kernels import ops, reference, registry
from llmquant.kernels.packed import Packed
from llmquant.packing.bits import pack
from llmquant.primitives.dynamic import Activation, dequantize_activation, quantize_activation

# What float32 scaling and sums of at most 70 blocks, rounded once to the dtype, may add, relative to the magnitudes.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
LEADING = ((0,), (1,), (3,), (), (2, 3), (1, 0, 2))
ROWS, COLUMNS = 5, 70

# Weights lie in groups of 32, of 24, in rows and in matrices: equal, multiples either way, neither, tails.
ACTIVATIONS = [Activation(group, asymmetric) for group, asymmetric in product((0, 8, 32, 48, 64), (False, True))]
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.scheme)
every_case = pytest.mark.parametrize("case", ALL_CASES, ids=str)
every_format = pytest.mark.parametrize("case", ONE_PER_FORMAT, ids=str)


@pytest.fixture(autouse=True)
def on_the_reference() -> Iterator[None]:
    """The reference is what these tests check; native kernels are compared with it in `test_cpu`."""
    with registry.force("reference"):
        yield


@cache
def packed(case: Case, shape: tuple[int, int] = (ROWS, COLUMNS)) -> Packed:
    return case.quantize(make_weight(shape) * 50).packed()


@cache
def at_scale_one(weight: Packed) -> np.ndarray:
    """Codes less zeros (float8: the numbers that codes stand for) as float64, read without the library."""
    fmt, (down, along) = FORMATS[weight.format], weight.block
    codes = read_elements(weight.qdata, fmt, weight.columns)
    zeros = None
    if weight.zero_point is not None:
        points = read_codes(weight.zero_point, fmt.bits, weight.scale.shape[1])
        zeros = points[np.arange(weight.rows)[:, None] // down, np.arange(weight.columns) // along].astype(np.float64)
    return VALUES[fmt.storage](codes, zeros, fmt)


def by_loops(x: Tensor, weight: Packed, activation: Activation) -> tuple[Tensor, Tensor]:
    """The product [T, N] in float64, integers first, and the sum of the magnitudes of what is added up."""
    taken, width = quantize_activation(x, activation), activation.width(weight.columns)
    codes, x_scale, w_scale = taken.codes.tolist(), taken.scale.tolist(), weight.scales().tolist()
    points = None if taken.zero_point is None else taken.zero_point.tolist()
    values = at_scale_one(weight).tolist()
    out, size = torch.zeros(2, len(codes), weight.rows, dtype=torch.float64)
    for t, n in product(range(len(codes)), range(weight.rows)):
        sums: dict[tuple[int, int], float] = {}
        for k in range(weight.columns):
            at = k // width, k // weight.block[1]
            zero = 0 if points is None else points[t][at[0]]
            sums[at] = sums.get(at, 0) + (codes[t][k] - zero) * values[n][k]
        for (g, h), found in sums.items():
            part = found * x_scale[t][g] * w_scale[n // weight.block[0]][h]
            out[t, n] += part
            size[t, n] += abs(part)
    return out, size


def assert_close(found: Tensor, exact: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and found.shape == exact.shape
    assert torch.all((found.double() - exact).abs() <= TOLERANCE[dtype] * size + 1e-7 * (dtype == torch.float16))


@every_case
@every_activation
def test_products_are_those_of_loops_over_integers(case: Case, activation: Activation) -> None:
    weight, x, bias = packed(case), torch.randn(3, COLUMNS) + 0.2, torch.randn(ROWS)
    for dtype in DTYPES:
        exact, size = by_loops(x.to(dtype), weight, activation)
        assert_close(ops.linear_int8(x.to(dtype), weight, activation), exact, size, dtype)
        found = ops.linear_int8(x.to(dtype), weight, activation, bias.to(dtype))
        bias_ = bias.to(dtype).double()
        assert_close(found, exact + bias_, size + bias_.abs(), dtype)


@every_format
@every_activation
def test_they_are_products_of_what_the_codes_mean(case: Case, activation: Activation) -> None:
    """And not of the input as it was: rounding it costs some, but not much."""
    weight, x = packed(case), torch.randn(40, COLUMNS)
    found = ops.linear_int8(x, weight, activation).double()
    exact = weight.dequantize().double()
    taken = dequantize_activation(quantize_activation(x, activation), activation).double()
    assert torch.all((found - taken @ exact.T).abs() <= 1e-5 * (taken.abs() @ exact.abs().T))
    moved = (found - x.double() @ exact.T).norm() / (x.double() @ exact.T).norm()
    assert (1e-3 if activation.group != 8 else 2e-4) < moved < 2e-2


@pytest.mark.parametrize("columns", [258, 5000])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("case", [Case(f"{n}-row{m}") for n in ("int8", "int1") for m in ("", "-asym")], ids=str)
def test_sums_of_integers_are_exact(case: Case, asymmetric: bool, columns: int) -> None:
    """All of one sign, so that they pass 2^24, where float32 stops counting."""
    fmt = FORMATS[case.config.format]
    codes = torch.randint(2**fmt.bits * 3 // 4, 2**fmt.bits, (3, columns), dtype=torch.uint8)
    zeros = pack(torch.zeros(3, 1, dtype=torch.uint8), fmt.bits) if case.asymmetric else None
    weight = Packed(pack(codes, fmt.bits), torch.rand(3, 1) + 0.5, zeros, fmt.name, (1, columns), columns)
    x, activation = torch.rand(2, columns) + 1, Activation(0, asymmetric)
    taken = quantize_activation(x, activation)
    left = taken.codes.numpy().astype(np.int64)
    if taken.zero_point is not None:
        left = left - taken.zero_point.numpy().astype(np.int64)
    doubled = (2 * at_scale_one(weight)).astype(np.int64)
    sums = torch.from_numpy((left @ doubled.T) / 2).float()
    assert fmt.bits == 1 or columns < 5000 or sums.min() > 2**24
    assert torch.equal(ops.linear_int8(x, weight, activation), sums * taken.scale * weight.scale.T)


@every_activation
def test_any_number_of_inputs_in_any_shape(activation: Activation) -> None:
    for case in (Case("int4-g32"), Case("int3-g24-asym"), Case("float8")):
        weight, bias = packed(case), torch.randn(ROWS)
        for leading, b in product(LEADING, (None, bias)):
            x = torch.randn(*leading, COLUMNS)
            found = ops.linear_int8(x, weight, activation, b)
            flat = ops.linear_int8(x.reshape(-1, COLUMNS), weight, activation, b)
            assert found.shape == (*leading, ROWS) and found.is_contiguous()
            assert torch.equal(found, flat.reshape(found.shape))
        x = torch.randn(COLUMNS, 3).t()
        assert torch.equal(ops.linear_int8(x, weight, activation), ops.linear_int8(x.contiguous(), weight, activation))


@every_activation
@every_format
def test_tokens_do_not_know_each_other(activation: Activation, case: Case) -> None:
    weight, x = packed(case), torch.randn(6, COLUMNS) * torch.logspace(-3, 3, 6)[:, None]
    whole = ops.linear_int8(x, weight, activation)
    assert all(
        torch.equal(ops.linear_int8(token, weight, activation), row) for token, row in zip(x, whole, strict=True)
    )


@every_activation
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_comes_out_as_nan(activation: Activation, bad: float) -> None:
    for case in (Case("int4-g32-asym"), Case("float8")):
        weight, x = packed(case), torch.randn(3, COLUMNS)
        clean = ops.linear_int8(x, weight, activation)
        x[1, 40] = bad
        found = ops.linear_int8(x, weight, activation, torch.zeros(ROWS))
        assert found[1].isnan().all() and torch.equal(found[::2], clean[::2])


@every_activation
def test_zeros_give_the_bias(activation: Activation) -> None:
    bias = torch.randn(ROWS)
    for case in (Case("int4-g32-asym"), Case("float8"), Case("int1-row")):
        assert torch.equal(ops.linear_int8(torch.zeros(2, COLUMNS), packed(case), activation, bias), bias.expand(2, -1))


@every_activation
@pytest.mark.parametrize("case", [Case("int4-g32-asym"), Case("int8-row"), Case("float8")], ids=str)
def test_results_do_not_depend_on_the_panels(
    case: Case, activation: Activation, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x, bias = packed(case), torch.randn(3, COLUMNS), torch.randn(ROWS)
    whole = ops.linear_int8(x, weight, activation, bias)
    monkeypatch.setattr(Packed, "panels", lambda self, elements=0: [(i, i + 1) for i in range(self.rows)])
    assert torch.equal(ops.linear_int8(x, weight, activation, bias), whole)


@pytest.mark.parametrize("block", [(2, 32), (3, 24), (100, 100), (2, 1)], ids=str)
@every_activation
def test_blocks_of_several_rows_that_end_short(block: tuple[int, int], activation: Activation) -> None:
    across, along = -(-ROWS // block[0]), -(-COLUMNS // block[1])
    codes = torch.randint(8, (ROWS, COLUMNS), dtype=torch.uint8)
    points = torch.randint(8, (across, along), dtype=torch.uint8)
    weight = Packed(pack(codes, 3), torch.rand(across, along) + 0.5, pack(points, 3), "int3", block, COLUMNS)
    x = torch.randn(3, COLUMNS)
    assert_close(ops.linear_int8(x, weight, activation), *by_loops(x, weight, activation), torch.float32)


# --- gradients --------------------------------------------------------------------------------------------


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return torch.autograd.grad(out, leaves, seed)


@every_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_go_straight_through(case: Case, dtype: torch.dtype) -> None:
    """They are those of `linear`, whose own tests compare them with dense ones."""
    weight, activation = packed(case), Activation(32)
    for leading in ((), (3,), (2, 3), (0,)):
        x, bias = torch.randn(*leading, COLUMNS).to(dtype), torch.randn(ROWS)
        found = gradients(lambda x, b: ops.linear_int8(x, weight, activation, b), x, bias)
        wanted = gradients(lambda x, b: ops.linear(x, weight, b), x, bias)
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
        assert not leading or 0 in leading or all(g.abs().max() > 0 for g in found)
        (alone,) = gradients(lambda x: ops.linear_int8(x, weight, activation), x)
        assert torch.equal(alone, found[0])


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    weight, activation = packed(Case("int4-g32")), Activation(32)
    bias = torch.zeros(ROWS, requires_grad=True)
    ops.linear_int8(torch.randn(3, COLUMNS), weight, activation, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((ROWS,), 3.0))
    x = torch.randn(3, COLUMNS, requires_grad=True)
    ops.linear_int8(x, weight, activation, bias.detach()).sum().backward()
    assert x.grad is not None


# --- registration and checks ------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [Activation(32), Activation(0, True)], ids=lambda a: a.scheme)
@pytest.mark.parametrize("case", [Case("int4-g32"), Case("int3-g24-asym"), Case("float8-tensor")], ids=str)
def test_opcheck(case: Case, activation: Activation, bias: bool) -> None:
    x, b = torch.randn(2, 3, COLUMNS, requires_grad=True), torch.randn(ROWS, requires_grad=True)
    args = (x, *packed(case), activation.group, activation.asymmetric, *([b] if bias else []))
    torch.library.opcheck(torch.ops.llmquant.linear_int8.default, args)


@every_format
def test_the_fake_knows_shape_and_dtype(case: Case) -> None:
    args = (torch.randn(2, 3, COLUMNS).bfloat16(), *packed(case), 32, False, torch.randn(ROWS))
    real = torch.ops.llmquant.linear_int8(*args)
    fake = torch.ops.llmquant.linear_int8(*[a.to("meta") if isinstance(a, Tensor) else a for a in args])
    assert fake.is_meta
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


X, GOOD = torch.randn(3, COLUMNS), packed(Case("int4-g32-asym"))
BAD: dict[str, tuple[Callable[[], Tensor], type[Exception], str]] = {
    "too wide": (lambda: ops.linear_int8(torch.randn(3, 71), GOOD, Activation(32)), RuntimeError, "71"),
    "no dimension": (lambda: ops.linear_int8(torch.tensor(1.0), GOOD, Activation(32)), RuntimeError, "linear_int8"),
    "integers": (lambda: ops.linear_int8(X.long(), GOOD, Activation(32)), RuntimeError, "int64"),
    "bias": (lambda: ops.linear_int8(X, GOOD, Activation(32), torch.randn(6)), RuntimeError, "linear_int8: bias"),
    "weight": (lambda: ops.linear_int8(X, GOOD._replace(block=(1, 64)), Activation(32)), RuntimeError, "scale"),
    "group": (lambda: torch.ops.llmquant.linear_int8(X, *GOOD, -1, False), ConfigError, "-1"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_before_anything_is_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def computed(*_: object) -> None:
        raise AssertionError("computed before the checks")

    monkeypatch.setattr(reference, "linear_int8", computed)
    call, error, text = BAD[name]
    with pytest.raises(error, match=text):
        call()
