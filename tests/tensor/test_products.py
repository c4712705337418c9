"""Products with quantized weights against float64 products of the dequantized ones, however they are written."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, ONE_PER_FORMAT, Case, make_weight
from layouts import LAYOUTS
from torch import Tensor, nn

from llmquant.tensor import QuantizedTensor

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
N, K = 6, 70

Product = Callable[[Tensor, Tensor, Tensor], Tensor]

# (x [3, K], bias [N], weight [N, K]) -> a product with the weight.
STRAIGHT: dict[str, Product] = {
    "linear": lambda x, b, w: F.linear(x, w),
    "linear with bias": lambda x, b, w: F.linear(x, w, b),
    "linear by keywords": lambda x, b, w: F.linear(input=x, weight=w, bias=b),
    "linear of one token": lambda x, b, w: F.linear(x[0], w, b),
    "linear of a batch": lambda x, b, w: F.linear(x.expand(2, 2, 3, K), w, b),
    "linear of nothing": lambda x, b, w: F.linear(x[:0], w, b),
    "@ w.t()": lambda x, b, w: x @ w.t(),
    "@ w.T": lambda x, b, w: x @ w.T,
    "@ w.mT": lambda x, b, w: x @ w.mT,
    "vector @ w.t()": lambda x, b, w: x[0] @ w.t(),
    "batch @ w.t()": lambda x, b, w: torch.stack([x, x]) @ w.t(),
    "expanded batch @ w.t()": lambda x, b, w: x.expand(2, 3, K) @ w.t(),
    "mm": lambda x, b, w: torch.mm(x, w.t()),
    "matmul": lambda x, b, w: torch.matmul(x, w.t()),
    "addmm": lambda x, b, w: torch.addmm(b, x, w.t()),
    "addmm with factors": lambda x, b, w: torch.addmm(b, x, w.t(), beta=0.5, alpha=2.0),
    "addmm of a matrix": lambda x, b, w: torch.addmm(b.expand(3, N), x, w.t()),
    "w @ x": lambda x, b, w: w @ x.t(),
    "w @ vector": lambda x, b, w: w @ x[0],
    "mv": lambda x, b, w: torch.mv(w, x[0]),
    "mm from the left": lambda x, b, w: torch.mm(w, x.t()),
    "linear of the transposed": lambda x, b, w: F.linear(x[:, :N], w.t()),
    "linear of the transposed with bias": lambda x, b, w: F.linear(x[:, :N], w.t(), x[0]),
    "y @ w": lambda x, b, w: x[:, :N] @ w,
    "w.t() @ y": lambda x, b, w: w.t() @ x[:, :N].t(),
    "linear of rows": lambda x, b, w: F.linear(x, w[2:5]),
    "linear of columns": lambda x, b, w: F.linear(x[:, 32:], w[:, 32:]),
    "linear of picked rows": lambda x, b, w: F.linear(x, w[[5, 1]]),
}
# (x [3, 3, K], -, weight [3, N, K])
OF_EXPERTS: dict[str, Product] = {
    "bmm": lambda x, b, w: torch.bmm(x, w.mT),
    "bmm from the left": lambda x, b, w: torch.bmm(w, x.mT),
    "bmm of the straight": lambda x, b, w: torch.bmm(x[..., :N], w),
    "x @ w": lambda x, b, w: x @ w.mT,
    "x @ w.transpose": lambda x, b, w: x @ w.transpose(1, 2),
    "matrix @ w": lambda x, b, w: x[0] @ w.mT,
    "w @ x": lambda x, b, w: w @ x.mT,
    "one expert": lambda x, b, w: F.linear(x[0], w[1]),
    "picked experts": lambda x, b, w: torch.bmm(x, w[torch.tensor([2, 2, 0])].mT),
}


@cache
def quantized(case: Case, shape: tuple[int, ...], dtype: torch.dtype, transposed: bool = False) -> QuantizedTensor:
    """Logical weights of that shape, perhaps quantized lying the other way round; not to be written to."""
    plain = make_weight(shape, dtype) * 10
    return case.quantize(plain.mT if transposed else plain, transposed)


def check(product: Product, x: Tensor, bias: Tensor, weight: QuantizedTensor) -> None:
    exact = product(x.double(), bias.double(), weight.dequantize(torch.float64))
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            found = product(x, bias, weight)
        assert not isinstance(found, QuantizedTensor)
        assert found.dtype == x.dtype and found.shape == exact.shape
        tolerance = TOLERANCE[x.dtype]
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance * 3)


@pytest.mark.parametrize("case", ONE_PER_FORMAT, ids=str)
@pytest.mark.parametrize("name", STRAIGHT)
def test_matrix(name: str, case: Case) -> None:
    for dtype in DTYPES:
        x, bias = torch.randn(3, K).to(dtype), torch.randn(N).to(dtype)
        check(STRAIGHT[name], x, bias, quantized(case, (N, K), dtype))
        check(lambda x, b, w: STRAIGHT[name](x, b, w.t()), x, bias, quantized(case, (N, K), dtype, transposed=True))


@pytest.mark.parametrize("case", ONE_PER_FORMAT, ids=str)
@pytest.mark.parametrize("name", OF_EXPERTS)
def test_experts(name: str, case: Case) -> None:
    for dtype in DTYPES:
        x = torch.randn(3, 3, K).to(dtype)
        check(OF_EXPERTS[name], x, torch.zeros(N).to(dtype), quantized(case, (3, N, K), dtype))


@pytest.mark.parametrize("case", ONE_PER_FORMAT, ids=str)
def test_conv1d_of_gpt2(case: Case) -> None:
    """Its weight stands as [in, out], and its product is an addmm."""
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(N, K)
    plain = make_weight((K, N)) * 10
    weight = case.quantize(plain, transposed=True)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    x = torch.randn(2, 3, K)
    expected = x @ weight.dequantize() + layer.bias
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(layer(x), expected.detach())


@pytest.mark.parametrize("case", ONE_PER_FORMAT, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_is_exact_and_in_the_dtype_of_the_weight(case: Case, dtype: torch.dtype) -> None:
    weight = case.quantize(make_weight((N, K), dtype))
    indices = torch.tensor([[5, 0], [0, 3]])
    expected = weight.dequantize()[indices]
    table = nn.Embedding(N, K, padding_idx=0)
    table.weight = nn.Parameter(weight, requires_grad=False)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            for found in (
                table(indices),
                F.embedding(indices, weight),
                F.embedding(indices.int(), weight, padding_idx=1, scale_grad_by_freq=True),
                torch.embedding(weight, indices),
            ):
                assert torch.equal(found, expected) and found.dtype == dtype


@pytest.mark.parametrize("case", ONE_PER_FORMAT, ids=str)
@pytest.mark.parametrize("name", ["linear", "linear with bias", "@ w.t()", "addmm", "w @ x", "y @ w", "batch @ w.t()"])
def test_gradients_reach_inputs_and_biases(name: str, case: Case) -> None:
    weight = case.quantize(make_weight((N, K)) * 10)
    x, bias = torch.randn(3, K), torch.randn(N)

    def gradients(w: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
        leaves = [t.to(dtype).requires_grad_() for t in (x.clone(), bias.clone())]
        out = STRAIGHT[name](*leaves, w)
        seed = torch.arange(out.numel(), dtype=dtype).reshape(out.shape) / out.numel()
        return list(torch.autograd.grad(out, leaves, seed, allow_unused=True))

    found, exact = gradients(weight, torch.float32), gradients(weight.dequantize(torch.float64), torch.float64)
    for a, b in zip(found, exact, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("scheme", ["int4-g32-asym", "float8"])
def test_compiles_without_graph_breaks(backend: str, scheme: str) -> None:
    module = nn.Sequential(nn.Embedding(9, K), nn.Linear(K, N), nn.ReLU())
    for layer in module[:2]:
        quantized = Case(scheme).quantize(layer.weight.detach())
        layer.weight = nn.Parameter(quantized, requires_grad=False)
    tokens = torch.tensor([[1, 2, 8]])
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    assert torch.equal(compiled(tokens), module(tokens))
    x = torch.randn(2, K, requires_grad=True)
    (found,) = torch.autograd.grad(torch.compile(module[1], fullgraph=True, backend=backend)(x).sum(), x)
    (expected,) = torch.autograd.grad(module[1](x).sum(), x)
    assert torch.equal(found, expected)


def test_dequantize_of_a_stack_in_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large weights are decoded some rows at a time; where the cuts fall makes no difference."""
    from llmquant.kernels.packed import Packed

    weights = [at.quantize(case) for at in LAYOUTS for case in ONE_PER_FORMAT]
    before = [w.dequantize() for w in weights]
    monkeypatch.setattr(Packed, "panels", lambda self: [(i, i + 1) for i in range(self.rows)])
    assert all(torch.equal(w.dequantize(), plain) for w, plain in zip(weights, before, strict=True))
