"""Products with float8 and block float activations against float64, on every backend; gradients, graphs and checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, Case, make_weight, read
from models import Folders
from torch import Tensor, nn

from llmquant import load, quantize_, save
from llmquant.config.schemes import parse_scheme
from llmquant.errors import ConfigError
from llmquant.kernels import cpu, ops, registry
from llmquant.kernels.cpu import chain
from llmquant.primitives.dynamic import ALL_TOKENS, FLOAT8, Activation, dequantize_activation, quantize_activation
from llmquant.tensor import QuantizedTensor

ROWS, COLUMNS = 37, 200  # blocks of 128 end short both ways
# Scheme -> bits of the mantissa of an activation, of which the error is a known part, no more and no less.
SCHEMES = {
    "f8-float8": 3,
    "f8-float8-e5m2": 3,
    "f8-tensor-float8-tensor": 3,
    "f8-g128-float8-b128": 3,
    "f8-g48-float8-b16x64": 3,
    "f8-int4": 3,
    "f8-g32-int4-g32-asym": 3,
    "f8-tensor-int3-g24-asym": 3,
    "mxfp8-mxfp8": 3,
    "mxfp8-rceil-float8-b16x64": 3,
    "mxfp8-e5m2-even-int4-g32": 2,
    "mxfp6-e2m3-mxfp6-e2m3": 3,
    "mxfp6-e3m2-ceil-mxfp6-e3m2": 2,
    "mxfp4-mxfp4": 1,
    "nvfp4-nvfp4": 1,
    "nvfp4-token-int3-g24-asym": 1,
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
BACKENDS = [name for name in registry.BACKENDS if name not in cpu.BACKENDS or not cpu.BACKENDS[name].missing]
# Of the sum of magnitudes: rounding what codes mean and the output, and weights as the nearest bfloat16 in tiles.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3 * 2**-8, torch.float16: 3 * 2**-11}


def quantized(scheme: str) -> QuantizedTensor:
    return Case(scheme).quantize(make_weight((ROWS, COLUMNS)) * 50)


@every_scheme
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_products_are_those_of_what_the_codes_mean(backend: str, scheme: str, dtype: torch.dtype) -> None:
    weight = quantized(scheme)
    activation, exact = weight.meta.activation, torch.from_numpy(read(weight))
    if registry.BACKENDS[backend].refusal(weight.meta.format, weight.meta.block, COLUMNS, "cpu"):
        pytest.skip("the backend refuses the weight")
    for shape in ((COLUMNS,), (1, COLUMNS), (2, 3, COLUMNS), (40, COLUMNS), (0, COLUMNS)):
        x, bias = torch.randn(shape).to(dtype), torch.randn(ROWS).to(dtype)
        with registry.force(backend):
            found = F.linear(x, weight, bias)
        assert found.dtype == dtype and found.shape == (*shape[:-1], ROWS)
        seen = dequantize_activation(quantize_activation(x, activation), activation).double()
        size = seen.abs() @ exact.abs().T + bias.double().abs()
        assert torch.all((found.double() - seen @ exact.T - bias.double()).abs() <= TOLERANCE[dtype] * size)
        if x.numel() < 40 * COLUMNS:
            continue
        plain = x.double() @ exact.T
        moved = (found.double() - bias.double() - plain).norm() / plain.norm()
        assert 0.12 < moved * 2 ** SCHEMES[scheme] < 0.32


@every_scheme
def test_gradients_go_straight_through(scheme: str) -> None:
    weight = quantized(scheme)
    activation, packed = weight.meta.activation, weight.packed()
    found, wanted = [], []
    for into, function in (
        (found, lambda x, b: ops.linear_as(x, packed, activation, b)),
        (wanted, lambda x, b: ops.linear(x, packed, b)),
    ):
        x, bias = torch.ones(3, COLUMNS, requires_grad=True), torch.ones(ROWS, requires_grad=True)
        (function(x, bias) * torch.arange(1.0, ROWS + 1)).sum().backward()
        into.extend([x.grad, bias.grad])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)) and found[0].abs().min() > 0


def test_scales_of_the_weight_meet_the_input_as_its_codes_mean_it() -> None:
    weight = quantized("f8-g48-float8-b16x64")
    activation, x = weight.meta.activation, torch.randn(5, COLUMNS)
    weight.scale.requires_grad_()
    F.linear(x, weight).square().sum().backward()
    found, weight.scale.grad = weight.scale.grad.clone(), None
    seen = dequantize_activation(quantize_activation(x, activation), activation)
    (seen @ weight.dequantize().T).square().sum().backward()
    torch.testing.assert_close(found, weight.scale.grad, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    "how",
    [
        *((group, False, FLOAT8) for group in (0, ALL_TOKENS, 48)),
        *((32, False, "mxfp8", "rceil"), (32, False, "mxfp4"), (ALL_TOKENS, False, "nvfp4")),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(how: tuple[Any, ...], dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, COLUMNS, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.llmquant.fake_quantize.default, (x, *how))
    torch.library.opcheck(torch.ops.llmquant.fake_quantize.default, (x.mT, *how))


def module(scheme: str) -> nn.Sequential:
    made = nn.Sequential(nn.Linear(COLUMNS, ROWS), nn.ReLU(), nn.Linear(ROWS, 3))
    made[0].weight = nn.Parameter(quantized(scheme), requires_grad=False)
    return made.eval()


@every_scheme
@torch.no_grad()
def test_compiles_without_graph_breaks_for_any_number_of_tokens(scheme: str) -> None:
    model = module(scheme)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 2, 17):
        x = torch.randn(rows, COLUMNS)
        assert torch.equal(compiled(x), model(x))


@every_scheme
@torch.no_grad()
def test_an_exported_program_rounds_and_multiplies(scheme: str) -> None:
    model, x = module(scheme), torch.randn(5, COLUMNS)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=1, max=64)},))
    called = [node.target for node in program.graph.nodes if "llmquant" in str(node.target)]
    rounds_first = [torch.ops.llmquant.fake_quantize.default, torch.ops.llmquant.linear.default]
    assert called == ([torch.ops.llmquant.linear_float8.default] if scheme.startswith("f8") else rounds_first)
    for rows in (5, 1, 17):
        x = torch.randn(rows, COLUMNS)
        assert torch.equal(program.module()(x), model(x))


def test_operators_of_int8_take_no_float8() -> None:
    weight, activation = quantized("f8-int4"), Activation(0, dtype=FLOAT8)
    with pytest.raises(RuntimeError, match="float8_e4m3fn"):
        ops.linear_int8(torch.randn(2, COLUMNS), weight.packed(), activation)
    assert chain.refusal(Case("int4-g32").quantize(make_weight((4, 64))).packed(), activation) is not None


def test_fake_quantize_refuses_what_it_cannot_round() -> None:
    for x in (torch.ones(3, dtype=torch.int32), torch.tensor(1.0)):
        with pytest.raises(RuntimeError, match="fake_quantize"):
            ops.fake_quantize(x, Activation(0, dtype=FLOAT8))
    with pytest.raises(ConfigError, match="float8_e5m2"):
        torch.ops.llmquant.fake_quantize(torch.ones(3), 0, False, "float8_e5m2")


def test_a_scale_for_all_tokens_makes_them_neighbours_and_others_do_not() -> None:
    x = torch.randn(6, COLUMNS) * torch.logspace(-3, 3, 6)[:, None]
    float8 = [Activation(group, dtype=FLOAT8) for group in (0, 48, ALL_TOKENS)]
    blocks = [Activation(group, dtype="nvfp4") for group in (0, ALL_TOKENS)]
    for activation in (*float8, *blocks, Activation(32, dtype="mxfp4")):
        alone: Tensor = torch.stack([ops.fake_quantize(token, activation) for token in x])
        assert torch.equal(ops.fake_quantize(x, activation), alone) == (activation.group != ALL_TOKENS)


def test_blocks_of_a_large_weight_are_scaled_by_their_own_largest_value() -> None:
    """Large enough to be quantized in several pieces, none of which may cut a block."""
    weight = make_weight((1000, 200)) * torch.logspace(-2, 2, 1000)[:, None]
    found = Case("float8-b128").quantize(weight)
    for r, c in ((r, c) for r in range(8) for c in range(2)):
        assert found.scale[r, c] == weight[128 * r : 128 * r + 128, 128 * c : 128 * c + 128].abs().max() / 448
    scale = found.scale.repeat_interleave(128, 0)[:1000].repeat_interleave(128, 1)[:, :200]
    moved = (found.dequantize() - weight).abs()
    assert torch.all(moved <= weight.abs() * 0.0626 + scale * 2**-10) and moved.max() > 0


@pytest.mark.parametrize(
    "scheme", ["f8-float8", "f8-tensor-float8-tensor", "f8-g16-float8-b16x8", "mxfp8-rceil-mxfp4", "nvfp4-nvfp4"]
)
def test_saved_models_come_back_bit_for_bit(scheme: str, folders: Folders, tmp_path: Path) -> None:
    model = load(folders("llama"))
    quantize_(model, {"_default": {**parse_scheme(scheme).with_algorithm("rtn").to_dict()}})
    save(model, tmp_path / "q")
    again, tokens = load(tmp_path / "q"), torch.arange(8)[None]
    weights = {name: p for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}
    assert weights and all(again.get_parameter(name).meta == p.meta for name, p in weights.items())
    assert all(torch.equal(again.get_parameter(name), p) for name, p in weights.items())
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, again(tokens).logits)
