"""Gradients of scales and zero points against autograd through weights that are decoded in plain float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import CASES, DTYPES, ODD_GROUPS, Case, make_weight, read_codes
from torch import Tensor

from llmquant.errors import ConfigError
from llmquant.kernels import ops, reference, registry
from llmquant.kernels.packed import Packed
from llmquant.packing.bits import pack
from llmquant.primitives.dynamic import Activation, dequantize_activation, quantize_activation

ROWS, COLUMNS = 7, 70
ACTIVATIONS = {"symmetric": Activation(32), "asymmetric": Activation(0, asymmetric=True)}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}

every_case = pytest.mark.parametrize("case", CASES + ODD_GROUPS, ids=str)
either_backend = pytest.mark.parametrize("backend", [None, "reference"], ids=["chosen", "reference"])


def trainable(case: Case, zeros: bool = False) -> Packed:
    """A weight with a float32 scale that requires a gradient, and perhaps real zero points that do too."""
    weight = case.quantize(make_weight((ROWS, COLUMNS)) * 50).packed()
    weight = weight._replace(scale=weight.scale.float().requires_grad_())
    if zeros:
        points = weight.zeros()
        assert points is not None
        weight = weight._replace(zero_point=(points + torch.rand(points.shape)).requires_grad_())
    return weight


def parameters(weight: Packed) -> list[Tensor]:
    return [t for t in (weight.scale, weight.zero_point) if t is not None and t.requires_grad]


def oracle(weight: Packed) -> tuple[Tensor, list[Tensor]]:
    """The weight [N, K] in float64, spread from leaves of its own: (code - zero) * scale, element by element."""
    rows = torch.arange(weight.rows)[:, None] // weight.block[0]
    columns = torch.arange(weight.columns)[None] // weight.block[1]
    steps = weight._replace(scale=torch.ones_like(weight.scale), zero_point=None).dequantize().detach().double()
    leaves = [weight.scale.detach().double().requires_grad_()]
    if weight.zero_point is not None:
        bits = int(weight.format.removeprefix("int"))
        zeros = weight.zero_point.detach().double()
        if not weight.has_real_zeros:
            zeros = torch.from_numpy(read_codes(weight.zero_point, bits, weight.scale.shape[1])).double()
        elif weight.zero_point.requires_grad:
            leaves.append(zeros.requires_grad_())
        steps = torch.from_numpy(read_codes(weight.qdata, bits, weight.columns)) - zeros[rows, columns]
    return steps * leaves[0][rows, columns], leaves


def compare(found: Tensor, expected: Tensor, weight: Packed, leaves: list[Tensor]) -> None:
    """Both outputs under one loss: the gradients of their parameters agree, and are not zero."""
    seed = torch.randn(found.shape).to(found.dtype)
    ours = torch.autograd.grad(found, parameters(weight), seed)
    theirs = torch.autograd.grad(expected, leaves, seed.double(), retain_graph=True)
    for own, exact, parameter in zip(ours, theirs, parameters(weight), strict=True):
        assert (own.dtype, own.shape) == (parameter.dtype, parameter.shape)
        assert exact.abs().max() > 0
        limit = TOLERANCE[found.dtype] * exact.abs().max().clamp(min=1)  # sums may cancel
        torch.testing.assert_close(own.double(), exact, rtol=0, atol=float(limit))


def forced(backend: str | None, call: Callable[[], Tensor]) -> Tensor:
    if backend is None:
        return call()
    with registry.force(backend):
        return call()


@either_backend
@every_case
def test_linear_trains_scales(case: Case, backend: str | None) -> None:
    weight = trainable(case)
    dense, leaves = oracle(weight)
    for leading in ((3,), (), (2, 3)):
        x = torch.randn(*leading, COLUMNS)
        compare(forced(backend, lambda x=x: ops.linear(x, weight)), x.double() @ dense.T, weight, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_has_the_dtype_of_the_scale_not_of_the_input(dtype: torch.dtype) -> None:
    weight = trainable(Case("int4-g32"))
    dense, leaves = oracle(weight)
    x = torch.randn(3, COLUMNS).to(dtype)
    compare(ops.linear(x, weight), x.double() @ dense.T, weight, leaves)
    small = weight._replace(scale=weight.scale.detach().to(dtype).requires_grad_())
    (grad,) = torch.autograd.grad(ops.linear(x, small).sum(), small.scale)
    assert grad.dtype == dtype


@either_backend
@pytest.mark.parametrize("name", ACTIVATIONS)
@every_case
def test_linear_int8_trains_scales_against_the_input_as_its_codes_stand_for_it(
    case: Case, name: str, backend: str | None
) -> None:
    weight, activation = trainable(case), ACTIVATIONS[name]
    dense, leaves = oracle(weight)
    x = torch.randn(3, COLUMNS)
    seen = dequantize_activation(quantize_activation(x, activation), activation).double()
    assert (seen - x).abs().max() > 1e-4
    found = forced(backend, lambda: ops.linear_int8(x, weight, activation))
    compare(found, seen @ dense.T, weight, leaves)


@either_backend
@every_case
def test_matmul_and_embedding_train_scales(case: Case, backend: str | None) -> None:
    weight = trainable(case)
    dense, leaves = oracle(weight)
    y = torch.randn(3, ROWS)
    compare(forced(backend, lambda: ops.matmul(y, weight)), y.double() @ dense, weight, leaves)
    indices = torch.tensor([[6, 0], [6, 3]])  # one row twice
    dense, leaves = oracle(weight)
    found = forced(backend, lambda: ops.embedding(indices, weight, torch.float32))
    compare(found, dense[indices], weight, leaves)


@pytest.mark.parametrize("case", [Case("int4-g32-asym"), Case("int3-g24-asym"), Case("int8-row-asym")], ids=str)
def test_real_zero_points_are_trained_on_the_reference(case: Case) -> None:
    weight = trainable(case, zeros=True)
    x, y, indices = torch.randn(3, COLUMNS), torch.randn(3, ROWS), torch.tensor([6, 0, 6])
    activation = Activation(32)
    seen = dequantize_activation(quantize_activation(x, activation), activation).double()
    for found, expected in (
        (ops.linear(x, weight), lambda dense: x.double() @ dense.T),
        (ops.linear_int8(x, weight, activation), lambda dense: seen @ dense.T),
        (ops.matmul(y, weight), lambda dense: y.double() @ dense),
        (ops.embedding(indices, weight, torch.float32), lambda dense: dense[indices]),
        (weight.dequantize(), lambda dense: dense),
    ):
        dense, leaves = oracle(weight)
        exact = expected(dense)
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
        compare(found, exact, weight, leaves)


def test_zero_points_alone_can_be_trained() -> None:
    weight = trainable(Case("int4-g32-asym"), zeros=True)
    frozen = weight._replace(scale=weight.scale.detach())
    x = torch.randn(3, COLUMNS)
    both = torch.autograd.grad(ops.linear(x, weight).sum(), weight.zero_point)
    assert torch.equal(torch.autograd.grad(ops.linear(x, frozen).sum(), weight.zero_point)[0], both[0])


def test_real_zero_points_at_the_codes_mean_the_same_weight() -> None:
    weight = trainable(Case("int4-g32-asym"))
    points = weight.zeros()
    assert points is not None
    x, real = torch.randn(3, COLUMNS), weight._replace(zero_point=points.float())
    assert torch.equal(real.dequantize(), weight.dequantize())
    with registry.force("reference"):
        assert torch.equal(ops.linear(x, real), ops.linear(x, weight))
    assert registry.backend(real) is reference
    with registry.force("portable"), pytest.raises(ConfigError, match="real numbers"):
        ops.linear(x, real)


def test_real_zero_points_of_another_shape_are_refused() -> None:
    weight = trainable(Case("int4-g32-asym"), zeros=True)
    with pytest.raises(RuntimeError, match="zero_point"):
        ops.linear(torch.randn(3, COLUMNS), weight._replace(zero_point=weight.zero_point[:, :-1]))


@pytest.mark.parametrize("block", [(2, 32), (4, 24), (100, 100), (3, 1)], ids=str)
def test_blocks_of_several_rows_that_end_short(block: tuple[int, int]) -> None:
    across, along = -(-ROWS // block[0]), -(-COLUMNS // block[1])
    codes = torch.randint(8, (ROWS, COLUMNS), dtype=torch.uint8)
    scale, zeros = (torch.rand(across, along) + 0.5 for _ in range(2))
    weight = Packed(pack(codes, 3), scale.requires_grad_(), zeros.requires_grad_(), "int3", block, COLUMNS)
    x, indices = torch.randn(3, COLUMNS), torch.tensor([6, 0, 5])
    for found, expected in (
        (ops.linear(x, weight), lambda dense: x.double() @ dense.T),
        (ops.embedding(indices, weight, torch.float32), lambda dense: dense[indices]),
    ):
        dense, leaves = oracle(weight)
        compare(found, expected(dense), weight, leaves)


def test_gradients_do_not_depend_on_the_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = trainable(Case("int4-g32-asym"), zeros=True)
    left, right = torch.randn(3, ROWS), torch.randn(3, COLUMNS)
    whole = reference.qparams_gradients(left, right, weight)
    monkeypatch.setattr(Packed, "panels", lambda self, elements=0: [(i, i + 1) for i in range(self.rows)])
    torch.testing.assert_close(reference.qparams_gradients(left, right, weight), whole)


def test_input_bias_and_scale_all_get_theirs() -> None:
    weight = trainable(Case("int4-g32-asym"))
    dense, leaves = oracle(weight)
    x, bias = torch.randn(3, COLUMNS, requires_grad=True), torch.randn(ROWS, requires_grad=True)
    found = torch.autograd.grad(ops.linear(x, weight, bias).square().sum(), [x, bias, weight.scale])
    exact = torch.autograd.grad((x.double() @ dense.T + bias.double()).square().sum(), [x, bias, *leaves])
    for own, other in zip(found, exact, strict=True):
        torch.testing.assert_close(own.double(), other.double(), rtol=1e-4, atol=1e-2)


def test_nothing_is_kept_for_scales_that_are_not_trained() -> None:
    weight = trainable(Case("int4-g32"))
    frozen = weight._replace(scale=weight.scale.detach())
    x = torch.randn(3, COLUMNS, requires_grad=True)
    assert not ops.linear(x, frozen).grad_fn.saved_tensors
    assert ops.linear(x, weight).grad_fn.saved_tensors
    with torch.no_grad():
        assert not ops.linear(x, weight).requires_grad


def test_a_scale_that_changes_before_backward_is_noticed() -> None:
    weight = trainable(Case("int4-g32"))
    loss = ops.linear(torch.randn(3, COLUMNS), weight).sum()
    with torch.no_grad():
        weight.scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("op", ["linear", "linear_int8", "linear_float8", "matmul", "embedding"])
@pytest.mark.parametrize("zeros", [False, True], ids=["scales", "zeros"])
def test_opcheck(op: str, zeros: bool) -> None:
    weight = trainable(Case("int4-g32-asym"), zeros)
    x, bias = torch.randn(2, 3, COLUMNS, requires_grad=True), torch.randn(ROWS, requires_grad=True)
    arguments = {
        "linear": (x, *weight, bias),
        "linear_int8": (x, *weight, 32, False, bias),
        "linear_float8": (x, *weight, 32, bias),
        "matmul": (torch.randn(2, 3, ROWS, requires_grad=True), *weight),
        "embedding": (torch.randint(ROWS, (2, 3)), *weight, torch.float32),
    }
    torch.library.opcheck(getattr(torch.ops.llmquant, op).default, arguments[op])
