"""Products whose inputs have one static scale: every set of kernels against the reference, whatever comes in."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from cases import DTYPES, Case, make_weight
from torch import Tensor

from llmquant.kernels import cpu, ops, reference
from llmquant.kernels.packed import Packed
from llmquant.primitives.dynamic import (
    ALL_TOKENS,
    FLOAT8,
    INT8,
    Activation,
    StaticScale,
    fake_quantize,
    quantize_activation,
)

ROWS, COLUMNS = 40, 200
# Sums in float32 and their rounding; tiles take bfloat16 inputs and weights as bfloat16.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}
SYMMETRIC = (Activation(ALL_TOKENS, static=True), StaticScale(torch.tensor([[0.02]])))
ASYMMETRIC = (
    Activation(ALL_TOKENS, True, static=True),
    StaticScale(torch.tensor([[0.02]]), torch.tensor([[-31]], dtype=torch.int8)),
)
SCHEMES = ("int8", "int8-asym", "int4-g32", "int3-g48-asym", "int5-tensor", "int1-g32", "float8")
every_scale = pytest.mark.parametrize("given", [SYMMETRIC, ASYMMETRIC], ids=["s8", "s8-asym"])
every_backend = pytest.mark.parametrize("name", cpu.BACKENDS)


@cache
def packed(scheme: str) -> Packed:
    return Case(scheme).quantize(make_weight((ROWS, COLUMNS)) * 10).packed()


def backend(name: str) -> cpu.Native:
    found = cpu.BACKENDS[name]
    if found.missing:
        pytest.skip(found.missing)
    return found


def inputs(tokens: int, dtype: torch.dtype) -> Tensor:
    """Most within the scale's reach, some beyond it, and one of each sign beyond what an int32 could count."""
    x = torch.randn(tokens, COLUMNS)
    x[0, 3], x[0, 4] = 60000.0, -60000.0
    if dtype != torch.float16:
        x[-1, 5], x[-1, 6] = 1e12, -1e12
    return x.to(dtype)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@every_scale
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_is_the_rule(scheme: str, dtype: torch.dtype, given: tuple[Activation, StaticScale]) -> None:
    (activation, static), x = given, inputs(3, dtype)
    low, zero = (-128, -31) if activation.asymmetric else (-127, 0)
    codes = ((x.float() / static.scale).round() + zero).clamp(low, 127)
    assert torch.equal(quantize_activation(x, activation, static).codes.float(), codes)
    wanted = ((codes - zero).double() * static.scale.double()) @ packed(scheme).dequantize().double().T
    assert relative(reference.linear_int8(x, packed(scheme), activation, None, static), wanted) < TOLERANCE[dtype]


@every_backend
@every_scale
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_every_set_computes_what_the_reference_does(
    name: str, scheme: str, dtype: torch.dtype, tokens: int, given: tuple[Activation, StaticScale]
) -> None:
    x, bias = inputs(tokens, dtype), torch.randn(ROWS)
    wanted = reference.linear_int8(x, packed(scheme), given[0], bias, given[1])
    found = backend(name).linear_int8(x, packed(scheme), given[0], bias, given[1])
    assert relative(found, wanted) < TOLERANCE[dtype]


@every_backend
@every_scale
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_is_nan_and_no_other(
    name: str, bad: float, given: tuple[Activation, StaticScale]
) -> None:
    clean = torch.randn(20, COLUMNS)
    x = clean.clone()
    x[7, 150] = bad
    served = backend(name)
    found, wanted = (served.linear_int8(t, packed("int4-g32"), given[0], None, given[1]) for t in (x, clean))
    others = torch.arange(20) != 7
    assert found[7].isnan().all() and torch.equal(found[others], wanted[others])


@every_scale
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", ["int4-g32", "float8"])
def test_opcheck(scheme: str, bias: bool, given: tuple[Activation, StaticScale]) -> None:
    x, b = torch.randn(2, 3, COLUMNS, requires_grad=True), torch.randn(ROWS, requires_grad=True)
    args = (x, *packed(scheme), *given[1], *([b] if bias else []))
    torch.library.opcheck(torch.ops.llmquant.linear_int8_static.default, args)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", ["int4-g32", "float8"])
def test_opcheck_of_float8(scheme: str, bias: bool) -> None:
    x, b = torch.randn(2, 3, COLUMNS, requires_grad=True), torch.randn(ROWS, requires_grad=True)
    args = (x, *packed(scheme), SYMMETRIC[1].scale, *([b] if bias else []))
    torch.library.opcheck(torch.ops.llmquant.linear_float8_static.default, args)


@every_backend
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float8_products_are_those_of_rounded_inputs(name: str, scheme: str, dtype: torch.dtype) -> None:
    x, bias, scale = inputs(20, dtype), torch.randn(ROWS), SYMMETRIC[1].scale
    seen = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    wanted = seen.to(dtype).double() @ packed(scheme).dequantize().double().T + bias.double()
    activation = Activation(ALL_TOKENS, dtype=FLOAT8, static=True)
    found = backend(name).linear_float8(x, packed(scheme), activation, bias, SYMMETRIC[1])
    assert relative(found, wanted) < TOLERANCE[dtype]


def test_scales_of_the_weight_meet_the_input_as_its_float8_codes_mean_it() -> None:
    weight, x = packed("float8"), torch.randn(5, COLUMNS)
    activation = Activation(ALL_TOKENS, dtype=FLOAT8, static=True)
    scale = weight.scale.clone().requires_grad_()
    ops.linear_float8(x, weight._replace(scale=scale), activation, None, SYMMETRIC[1]).square().sum().backward()
    again = weight.scale.clone().requires_grad_()
    seen = fake_quantize(x, activation, SYMMETRIC[1])
    ops.linear(seen, weight._replace(scale=again)).square().sum().backward()
    assert torch.equal(scale.grad, again.grad) and not torch.equal(seen, x)


def test_nothing_is_rounded_with_a_scale_that_is_missing() -> None:
    for x in (torch.randn(2, COLUMNS), torch.randn(2, COLUMNS, requires_grad=True)):
        for dtype in (INT8, FLOAT8):
            with pytest.raises(RuntimeError, match="does not go with"):
                ops.linear_as(x, packed("int4-g32"), Activation(ALL_TOKENS, dtype=dtype, static=True))
        with pytest.raises(RuntimeError, match="does not go with"):
            ops.fake_quantize(x, Activation(ALL_TOKENS, dtype=FLOAT8, static=True))


@every_scale
def test_watched_and_unwatched_calls_agree(given: tuple[Activation, StaticScale]) -> None:
    """With and without torch's dispatcher."""
    x = torch.randn(3, COLUMNS)
    for activation, static in (given, (Activation(ALL_TOKENS, dtype=FLOAT8, static=True), SYMMETRIC[1])):
        alone = ops.linear_as(x, packed("int4-g32"), activation, None, static)
        watched = ops.linear_as(x.clone().requires_grad_(), packed("int4-g32"), activation, None, static)
        assert watched.requires_grad and torch.equal(alone, watched)
