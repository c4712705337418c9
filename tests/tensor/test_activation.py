"""Weights that ask for quantized activations: every product obeys, nothing else does, no operation forgets it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case, make_weight
from layouts import COLUMNS, LAYOUTS, ROWS, Layout
from torch import Tensor, nn

from llmquant.errors import UnsupportedOpError
from llmquant.kernels import ops
from llmquant.tensor import QuantizedTensor

CASES = [Case(f"a8-g48-asym-{stem}") for stem in ("int4-g32", "int3-g24-asym", "float8")]
CASES += [
    Case(scheme) for scheme in ("f8-g48-float8", "mxfp8-rceil-mxfp6-e2m3", "nvfp4-token-nvfp4", "mxfp4-int3-g24-asym")
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
MODES = (torch.no_grad, torch.inference_mode, torch.enable_grad)

# (x [3, K], bias [N], weight [N, K] that stands straight) -> a product along the columns.
ALONG_COLUMNS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda x, b, w: F.linear(x, w, b),
    "@ w.t()": lambda x, b, w: x @ w.t() + b,
    "batch @ w.t()": lambda x, b, w: (torch.stack([x, x]) @ w.t() + b)[1],
    "vectors @ w.t()": lambda x, b, w: torch.stack([token @ w.t() for token in x]) + b,
    "addmm": lambda x, b, w: torch.addmm(b, x, w.t()),
    "w @ x": lambda x, b, w: (w @ x.t()).t() + b,
    "einsum": lambda x, b, w: torch.einsum("nk,bk->bn", w, x) + b,
    "rows": lambda x, b, w: torch.cat([F.linear(x, w[:2]), F.linear(x, w[2:])], -1) + b,
    "joined rows": lambda x, b, w: F.linear(x, torch.cat([w[:2], w[2:]]), b),
    "picked rows": lambda x, b, w: F.linear(x, w[torch.arange(ROWS)], b),
    "copied": lambda x, b, w: F.linear(x, copy.deepcopy(w), b),
}


@cache
def quantized(case: Case, at: Layout = LAYOUTS[0]) -> QuantizedTensor:
    return case.quantize(make_weight(at.shape) * 10, at.transposed)


def rounded_product(x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    return ops.linear_as(x, weight.packed(), weight.meta.activation, bias)


def unasked(case: Case) -> Case:
    """The weight of a case alone."""
    return Case(case.scheme.removeprefix(f"{case.config.activation.scheme}-"))


@every_case
@pytest.mark.parametrize("name", ALONG_COLUMNS)
def test_products_quantize_their_input(name: str, case: Case) -> None:
    weight, x, bias = quantized(case), torch.randn(3, COLUMNS), torch.randn(ROWS)
    wanted = rounded_product(x, weight, bias)
    assert not torch.allclose(wanted, ops.linear(x, weight.packed(), bias), rtol=1e-4, atol=1e-4)
    for mode in MODES:
        with mode():
            torch.testing.assert_close(ALONG_COLUMNS[name](x, bias, weight), wanted)


@every_case
def test_conv1d_of_gpt2_quantizes_its_input(case: Case) -> None:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(ROWS, COLUMNS)
    weight = case.quantize(make_weight((COLUMNS, ROWS)) * 10, transposed=True)
    layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(torch.randn(ROWS))
    x = torch.randn(2, 3, COLUMNS)
    for mode in MODES:
        with mode():
            torch.testing.assert_close(layer(x), rounded_product(x, weight.t(), layer.bias))


@every_case
def test_experts_quantize_their_input(case: Case) -> None:
    weight, x = quantized(case, LAYOUTS[2]), torch.randn(3, 4, COLUMNS)
    wanted = torch.stack([rounded_product(x[i], weight[i]) for i in range(3)])
    torch.testing.assert_close(torch.bmm(x, weight.mT), wanted)
    sorted_tokens, ends = x.flatten(0, 1), torch.tensor([4, 8, 12], dtype=torch.int32)
    torch.testing.assert_close(torch._grouped_mm(sorted_tokens, weight.mT, ends), wanted.flatten(0, 1))
    torch.testing.assert_close(torch.einsum("etk,enk->etn", x, weight), wanted)
    torch.testing.assert_close(F.linear(x[1], weight[1]), wanted[1])


@every_case
def test_a_product_along_the_rows_takes_its_input_as_it_is(case: Case) -> None:
    weight, y = quantized(case), torch.randn(3, ROWS)
    for found in (y @ weight, F.linear(y, weight.t())):
        assert torch.equal(found, ops.matmul(y, weight.packed()))


@every_case
def test_a_table_is_read_exactly(case: Case) -> None:
    weight, indices = quantized(case), torch.tensor([[5, 0], [0, 3]])
    for mode in MODES:
        with mode():
            assert torch.equal(F.embedding(indices, weight), weight.dequantize()[indices])


@every_case
def test_gradients_are_those_of_the_weight_alone(case: Case) -> None:
    weight, plain = quantized(case), quantized(unasked(case))
    found = []
    for w in (weight, plain):
        x, bias = torch.ones(3, COLUMNS, requires_grad=True), torch.ones(ROWS, requires_grad=True)
        (F.linear(x, w, bias) * torch.arange(1.0, ROWS + 1)).sum().backward()
        found.append((x.grad, bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][0].abs().min() > 0


KEEPING: dict[str, Callable[[Any, Layout], Any]] = {
    "detach": lambda w, at: w.detach(),
    "clone": lambda w, at: w.clone(),
    "deepcopy": lambda w, at: copy.deepcopy(w),
    "pickle": lambda w, at: pickle.loads(pickle.dumps(w)),
    "parameter": lambda w, at: nn.Parameter(w, requires_grad=False),
    "mT": lambda w, at: w.mT,
    "to a dtype": lambda w, at: w.to(torch.bfloat16),
    "empty_like": lambda w, at: torch.empty_like(w),
    "rows": lambda w, at: w.narrow(at.r, 1, 3),
    "columns": lambda w, at: (
        w.narrow(at.c, w.meta.block[1], COLUMNS - w.meta.block[1])
        if w.meta.block[1] < COLUMNS
        else w.narrow(at.c, 8, 8)
    ),
    "picked rows": lambda w, at: w.index_select(at.r, torch.tensor([2, 0])),
    "split": lambda w, at: w.split(3, at.r)[1],
    "joined rows": lambda w, at: torch.cat([w, w], at.r),
    "rebuild": lambda w, at: w.rebuild(lambda _, t: t),
}


@every_case
@pytest.mark.parametrize("at", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", KEEPING)
def test_no_operation_forgets_it(name: str, at: Layout, case: Case) -> None:
    found = KEEPING[name](quantized(case, at), at)
    assert isinstance(found, QuantizedTensor) and found.meta.activation == case.config.activation


@every_case
def test_torch_save_keeps_it(case: Case, tmp_path: Any) -> None:
    torch.save(quantized(case), tmp_path / "w")
    found = torch.load(tmp_path / "w", weights_only=True)
    assert found.meta == quantized(case).meta and torch.equal(found, quantized(case))


@every_case
def test_repr_shows_it(case: Case) -> None:
    said = f"activation={case.config.activation.scheme}"
    assert said in repr(quantized(case)) and "activation" not in repr(quantized(unasked(case)))


@every_case
def test_weights_that_differ_in_it_are_not_alike(case: Case) -> None:
    stem = unasked(case).scheme
    weight = quantized(case)
    assert torch.equal(weight, quantized(Case(case.scheme)))
    for other in (quantized(Case(stem)), quantized(Case(f"a8-{stem}")), quantized(Case(f"mxfp8-{stem}"))):
        assert torch.equal(weight.dequantize(), other.dequantize()) and not torch.equal(weight, other)
        with pytest.raises(UnsupportedOpError):
            torch.cat([weight, other])
        with pytest.raises(UnsupportedOpError):
            weight.clone().copy_(other)


@every_case
def test_compiles_without_graph_breaks(case: Case) -> None:
    layer = nn.Linear(COLUMNS, ROWS)
    layer.weight = nn.Parameter(quantized(case), requires_grad=False)
    x = torch.randn(4, COLUMNS)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
