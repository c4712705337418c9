"""Learned rounding: gradients against autograd through the formula, and laws of what is learned."""

from __future__ import annotations

import pytest
import torch
from cases import Case, make_weight
from torch import Tensor

from llmquant.algorithms.rtn import Codes
from llmquant.algorithms.search import search
from llmquant.algorithms.signround import Rounding, reaching
from llmquant.primitives.blocks import from_blocks, to_blocks
from llmquant.primitives.spec import QuantSpec

SCHEMES = ["int1-g32", "int2-g32-asym", "int3-g24", "int4-g32", "int4-g24-asym", "int5-row-asym", "int8-row"]
SHAPE = (6, 70)  # a short last group

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def values(codes: Codes, spec: QuantSpec) -> Tensor:
    decoded = spec.format.numerics.decode(to_blocks(codes.codes, spec.block), codes.qparams, spec.format)
    return from_blocks(decoded, *codes.codes.shape, spec.block)


def started(scheme: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Codes, QuantSpec]:
    rows = make_weight(SHAPE, dtype)
    spec = Case(scheme).config.spec(*SHAPE)
    return rows, search(rows.float(), None, spec), spec


def spread(per_group: Tensor, spec: QuantSpec) -> Tensor:
    return per_group.float().repeat_interleave(spec.block[1], dim=1)[:, : SHAPE[1]]


@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_where_it_is_told_to(scheme: str, dtype: torch.dtype) -> None:
    rows, start, spec = started(scheme, dtype)
    rounding = Rounding(rows, start, spec)
    assert torch.equal(rounding.codes().codes, start.codes)
    assert torch.equal(rounding.codes().qparams.scale, start.qparams.scale)
    assert torch.equal(rounding.value(torch.float32), values(start, spec))


@every_scheme
def test_its_value_is_what_will_be_stored(scheme: str) -> None:
    rows, start, spec = started(scheme)
    before = rows.clone()
    rounding = Rounding(rows, start, spec)
    for i in range(20):
        rounding.step(make_weight(SHAPE, seed=i), 0.1, 0.05)
        codes = rounding.codes()
        assert torch.equal(rounding.value(torch.float32), values(codes, spec))
        assert int(codes.codes.max()) <= spec.format.top_code and codes.qparams.scale.dtype == spec.scale_dtype
    assert not torch.equal(codes.codes, start.codes) and torch.equal(rows, before)


@every_scheme
def test_signs_are_those_of_autograd(scheme: str) -> None:
    """One small step against the formula W^ = s (clip(round(W / s + V) + z) - z), rounding passed straight through."""
    rows, start, spec = started(scheme)
    start.qparams.scale[0] *= 0.5  # so that many codes are clipped
    start = Codes(spec.format.numerics.encode(to_blocks(rows, spec.block), start.qparams, spec.format), start.qparams)
    start = start._replace(codes=from_blocks(start.codes, *SHAPE, spec.block))
    slope = make_weight(SHAPE, seed=1)
    shift = torch.zeros(SHAPE, requires_grad=True)
    factor = torch.ones(start.qparams.scale.shape, requires_grad=True)
    scale = spread(start.qparams.scale, spec) * spread(factor, spec)
    zero = spec.format.midpoint if start.qparams.zero_point is None else spread(start.qparams.zero_point, spec)
    wanted = rows / scale + shift + zero
    rounded = wanted + (wanted.round() - wanted).detach()
    (((rounded.clamp(0, spec.format.top_code) - zero) * scale) * slope).sum().backward()

    rounding = Rounding(rows, start, spec)
    rounding.step(slope, 0.25, 0.125)
    assert shift.grad is not None and factor.grad is not None
    assert torch.equal(rounding._shift, -0.25 * shift.grad.sign())
    assert torch.equal(rounding._factor, 1 - 0.125 * factor.grad.sign())
    assert (shift.grad == 0).any() and (shift.grad != 0).any()


@pytest.mark.parametrize("scheme", ["int2-g32-asym", "int3-g24", "int4-g32", "int5-row-asym"])
def test_signed_descent_lowers_the_error_of_a_product(scheme: str) -> None:
    """Inputs of rank 40 in 70 columns leave room for errors that do no harm."""
    rows, start, spec = started(scheme)
    inputs = make_weight((200, 40), seed=2) @ make_weight((40, 70), seed=3)
    rounding = Rounding(rows, start, spec)

    def error() -> float:
        return float((inputs @ (rounding.value(torch.float32) - rows).T).square().mean())

    found, steps = [error()], 50
    for i in range(steps):
        rate = (1 - i / steps) / steps
        rounding.step((rounding.value(torch.float32) - rows) @ (inputs.T @ inputs), rate, rate)
        found.append(error())
    assert 0.2 * found[0] < min(found) < 0.9 * found[0]


@pytest.mark.parametrize("scheme", ["int2-g32-asym", "int3-g24", "int4-g32", "int5-row-asym"])
def test_codes_that_are_not_the_nearest_can_be_a_start(scheme: str) -> None:
    rows, start, spec = started(scheme)
    moved = torch.randint(-3, 4, SHAPE, generator=torch.Generator().manual_seed(0))
    given = start._replace(codes=(start.codes + moved).clamp(0, spec.format.top_code).to(torch.uint8))
    rounding = Rounding(rows, given, spec)
    assert torch.equal(rounding.codes().codes, given.codes)
    near = given.codes == start.codes
    found = reaching(rows, given, spec)
    assert torch.equal(found[near], rows[near]) and not near.all()
    # Weights were moved towards their codes, and stay on the side that they came from.
    gap, left = values(given, spec) - rows, values(given, spec) - found
    assert ((gap * left) >= 0).all() and (left.abs() <= gap.abs() + 1e-6).all()
