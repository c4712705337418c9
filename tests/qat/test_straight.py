"""The straight-through estimator: values to the bit, gradients against formulas and torch's own fake quantization."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import ONE_PER_FORMAT, STATIC, Case, make_weight
from torch import Tensor, nn

from llmquant import qat
from llmquant.config.base import QuantConfig
from llmquant.kernels import registry
from llmquant.primitives.blocks import to_blocks
from llmquant.primitives.dynamic import fake_quantize
from llmquant.primitives.spec import QParams
from llmquant.primitives.stats import InputStats
from llmquant.qat.straight import fake_quantized_input, straight_through, within_reach
from llmquant.quantize import quantize_weight
from llmquant.tensor import QuantizedTensor

N, K = 6, 70
DYNAMIC = [Case(s) for s in ("a8-int4-g32", "a8-token-asym-int8", "f8-float8", "f8-tensor-int3-g32", "nvfp4-nvfp4")]
EVERY = [*ONE_PER_FORMAT, *DYNAMIC, *STATIC]


def config_of(case: Case) -> QuantConfig:
    """By round to nearest where the format has it, which clips less than search."""
    return case.config.with_algorithm("rtn")


def prepared(case: Case, weight: Tensor) -> tuple[nn.Linear, InputStats]:
    layer, stats = nn.Linear(K, N), InputStats(low=torch.tensor(-2.0), high=torch.tensor(3.0))
    layer.weight.data.copy_(weight)
    qat.prepare(layer, config_of(case), stats={"weight": stats})
    return layer, stats


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_values_are_those_of_the_quantized_layer_and_gradients_those_of_its_operands(case: Case) -> None:
    weight, x, seed = make_weight((N, K)) * 50, torch.randn(2, 5, K) * 2, torch.randn(2, 5, N)
    layer, stats = prepared(case, weight)
    x.requires_grad_()
    out = layer(x)
    out.backward(seed)
    with torch.no_grad():
        silent = layer(x)
    gradients = layer.weight.grad, layer.bias.grad, x.grad
    report = qat.convert(layer)
    assert list(report.quantized) == ["weight"] and not report.warnings

    quantized = layer.weight
    assert isinstance(quantized, QuantizedTensor)
    assert torch.equal(quantized, quantize_weight(weight, config_of(case), stats))
    with registry.force("reference"), torch.no_grad():
        assert torch.equal(out, layer(x)) and torch.equal(silent, out)
    activation = quantized.meta.activation
    met, passes = x.detach(), torch.ones(2, 5, K)
    if activation is not None:
        met = fake_quantize(x.detach(), activation, quantized.static_scale)
        if quantized.static_scale is not None:
            passes = reach_of_inputs(x.detach(), quantized)
            assert 0.01 < float((passes == 0).float().mean()) < 0.9
    plain = F.linear(met.flatten(0, 1).requires_grad_(), quantized.dequantize().requires_grad_(), layer.bias)
    assert torch.allclose(out.flatten(0, 1), plain, rtol=1e-4, atol=1e-4)
    expected = (
        (seed.flatten(0, 1).T @ met.flatten(0, 1)) * within_reach(weight, quantized),
        seed.sum((0, 1)),
        (seed @ quantized.dequantize()) * passes,
    )
    for found, wanted in zip(gradients, expected, strict=True):
        assert found is not None and torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def reach_of_inputs(x: Tensor, quantized: QuantizedTensor) -> Tensor:
    """Where an input has a code without clamping; of float8, where it is nearer to 448 than to what would follow."""
    assert quantized.meta.activation is not None and quantized.act_scale is not None
    if quantized.meta.activation.dtype != "int8":
        return (x.abs() <= 464 * quantized.act_scale).float()
    zero = 0 if quantized.act_zero_point is None else int(quantized.act_zero_point)
    lowest = -128 if quantized.meta.activation.asymmetric else -127
    codes = torch.round(x / quantized.act_scale) + zero
    return ((codes >= lowest) & (codes <= 127)).float()


@pytest.mark.parametrize("scheme", ["int2-g16-asym", "int3-g32-asym", "int4-row-asym", "int8-g32-asym", "int4-g32"])
def test_weights_are_clipped_where_torch_says_so(scheme: str) -> None:
    """Against `torch.fake_quantize_per_tensor_affine`, a group at a time."""
    config = Case(scheme).config  # by search, which clips
    weight = make_weight((5, 64)) * 20
    quantized = quantize_weight(weight, config)
    matrix, bits = quantized.packed(), quantized.format.bits
    zeros = matrix.zeros()
    x = to_blocks(weight, matrix.block).clone().requires_grad_()
    for row, group in [(r, g) for r in range(x.shape[0]) for g in range(x.shape[1])]:
        scale = float(matrix.scale[row, group])
        zero = 2 ** (bits - 1) if zeros is None else int(zeros[row, group])
        part = x[row, group] * (1 if scale > 0 else -1)
        torch.fake_quantize_per_tensor_affine(part, abs(scale), zero, 0, 2**bits - 1).sum().backward()
    assert x.grad is not None
    found = to_blocks(within_reach(weight, quantized).float(), matrix.block)
    assert torch.equal(found, x.grad.abs())
    assert scheme.startswith("int8") or 0 < float((found == 0).float().mean()) < 0.35


@pytest.mark.parametrize("case", [c for c in ONE_PER_FORMAT if c.format.storage != "semisparse"], ids=str)
def test_what_lies_outside_has_an_outermost_code_and_what_lies_inside_is_near_one(case: Case) -> None:
    weight = make_weight((N, K)) * 50
    quantized = quantize_weight(weight, case.config)
    matrix, fmt = quantized.packed(), quantized.format
    params = QParams(matrix.scales(), matrix.zeros())
    every_code = torch.arange(2**fmt.bits, dtype=torch.uint8).reshape(1, 1, -1)
    zero = None if params.zero_point is None else torch.zeros(1, 1, dtype=torch.uint8)
    numbers = fmt.numerics.decode(every_code, QParams(torch.ones(1, 1), zero), fmt).flatten()
    half_steps = numbers[numbers.isfinite()].unique().diff().max() / 2 * matrix.scales().float()[..., None].abs()
    x = to_blocks(weight, matrix.block)
    outside = []
    for factor in (1.0, 3.0):
        wide = x * factor
        decoded = fmt.numerics.decode(fmt.numerics.encode(wide, params, fmt), params, fmt)
        beyond = fmt.numerics.decode(fmt.numerics.encode(wide * 4, params, fmt), params, fmt)
        grown = weight * factor
        inside = to_blocks(within_reach(grown, quantized).float(), matrix.block).bool()
        inside |= x == 0  # padding
        assert torch.equal(decoded[~inside], beyond[~inside])
        assert ((decoded - wide).abs() <= half_steps * 1.0001)[inside].all()
        outside.append(float((~inside).float().mean()))
    assert outside[0] < 0.2 and outside[1] > outside[0] + 0.1


def test_stacks_and_transposed_weights_are_clipped_like_their_matrices() -> None:
    weight = make_weight((3, N, K)) * 50
    config = Case("int2-g16").config
    stack = quantize_weight(weight, config)
    inside = within_reach(weight, stack)
    assert not inside.all()
    for i in range(3):
        assert torch.equal(inside[i], within_reach(weight[i], quantize_weight(weight[i], config)))
    turned = quantize_weight(weight.mT.contiguous(), config, transposed=True)
    assert torch.equal(within_reach(weight.mT, turned), inside.mT)


def test_dynamic_inputs_pass_all_of_their_gradient() -> None:
    x = (torch.randn(3, K) * 100).requires_grad_()
    activation = Case("a8-int4-g32").config.activation
    assert activation is not None
    value = fake_quantized_input(x, activation, None)
    assert torch.equal(value, fake_quantize(x.detach(), activation)) and not torch.equal(value, x)
    value.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # type: ignore[arg-type]


def test_what_comes_out_may_be_written_to() -> None:
    source, value = torch.randn(4, requires_grad=True), torch.ones(4)
    out = straight_through(source, value) + 0
    direct = straight_through(source, torch.ones(4))
    direct += 1
    (out.sum() + 2 * direct.sum()).backward()
    assert torch.equal(direct, torch.full((4,), 2.0)) and torch.equal(source.grad, torch.full((4,), 3.0))  # type: ignore[arg-type]
