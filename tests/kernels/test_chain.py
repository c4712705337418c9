"""Chains against torch's own operators, bit for bit; skipped where the processor cannot run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from cases import Case
from torch import Tensor

from llmquant.kernels import cpu, ops
from llmquant.kernels.cpu import chain
from llmquant.kernels.cpu.chain import Chain
from llmquant.kernels.packed import Packed
from llmquant.primitives.dynamic import Activation

MISSING = cpu.BACKENDS["avx512_vnni"].missing
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

TOKENS, WIDTHS, EPS = (1, 2, 3, 5), (8, 64, 100, 576, 1000), 1e-5
SCHEMES = ("int4-g32", "int4-g32-asym", "int3-g16-asym", "int8-row", "int8-g32", "int4-tensor")
ACTIVATIONS = (None, Activation(32), Activation(32, True), Activation(0), Activation(0, True), Activation(64))
ROWS = 37  # neither a multiple of a vector nor of two threads

every_dtype = pytest.mark.parametrize("dtype", chain.DTYPES, ids=str)
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.scheme if a else "a16")


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """As many threads for the chain; torch gives the same bits with any number."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def wide(dtype: torch.dtype, *shape: int) -> Tensor:
    """Numbers of many magnitudes, and zeros of both signs."""
    x = torch.randn(shape) * torch.randn(shape).mul_(2).exp_()
    return torch.where(torch.rand(shape) < 0.02, torch.copysign(torch.zeros(()), x), x).to(dtype)


def assert_same_bits(found: Tensor, wanted: Tensor) -> None:
    """Also of zeros; any NaN is as good as another."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    a, b = (t.masked_fill(t.isnan(), torch.nan).view(torch.int16) for t in (found, wanted))
    assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} differ"


def weight_of(scheme: str, columns: int, rows: int = ROWS) -> Packed:
    return Case(scheme).quantize(torch.randn(rows, columns) * 0.05).packed()


def linear(x: Tensor, weight: Packed, bias: Tensor | None, activation: Activation | None) -> Tensor:
    return ops.linear(x, weight, bias) if activation is None else ops.linear_int8(x, weight, activation, bias)


# --- every operator alone ---------------------------------------------------------------------------------

Made = tuple[Chain, Tensor, Tensor]
"""A chain of one step, where its result will be, and what torch says."""


def _norm(tokens: int, width: int, dtype: torch.dtype) -> Made:
    if not chain.norms_like_torch(width, dtype):
        pytest.skip("this torch sums in another order, and nobody will ask for such a chain")
    made, x, weight = Chain(tokens, dtype), wide(dtype, tokens, width), wide(dtype, width)
    return made, made.norm(x, weight, EPS), weight * F.rms_norm(x, (width,), None, EPS)


def _gate(tokens: int, width: int, dtype: torch.dtype) -> Made:
    made, x = Chain(tokens, dtype), wide(dtype, tokens, 2 * width)
    gates, up = x.chunk(2, -1)
    return made, made.gate(x), F.silu(gates).mul_(up)


def _add(tokens: int, width: int, dtype: torch.dtype) -> Made:
    made, x, y = Chain(tokens, dtype), wide(dtype, tokens, width), wide(dtype, tokens, width)
    wanted = x + y
    made.add_(x, y)
    return made, x, wanted


def _rope(tokens: int, head: int, dtype: torch.dtype, places: int | None = None) -> Made:
    """Three heads of four are turned."""
    made, x = Chain(tokens, dtype), wide(dtype, tokens, 4 * head)
    cos, sin = wide(dtype, 2, places or tokens, head)
    heads = x.view(tokens, 4, head)
    turned = heads[:, :3]
    turned = (turned * cos[:, None]).add_(turned.roll(head // 2, -1).mul_(sin[:, None]))
    wanted = torch.cat([turned, heads[:, 3:]], 1).flatten(1)
    made.rope_(x, cos, sin, 3)
    return made, x, wanted


def _rope_at_one_place(tokens: int, head: int, dtype: torch.dtype) -> Made:
    return _rope(tokens, head, dtype, 1)


OPERATORS: tuple[Callable[[int, int, torch.dtype], Made], ...] = (_norm, _gate, _add, _rope, _rope_at_one_place)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize("width", WIDTHS)
@every_dtype
@pytest.mark.usefixtures("threads")
def test_an_operator_rounds_as_torch_does(operator: Callable, width: int, dtype: torch.dtype) -> None:
    for tokens in TOKENS:
        made, found, wanted = operator(tokens, width, dtype)
        made.run()
        assert_same_bits(found, wanted)


@every_dtype
def test_norms_of_models_are_like_torchs(dtype: torch.dtype) -> None:
    assert all(chain.norms_like_torch(width, dtype) for width in (64, 576, 896, 2048, 4096))


@every_dtype
@pytest.mark.usefixtures("threads")
def test_silu_of_every_number(dtype: torch.dtype) -> None:
    """At a width that leaves torch a rest for its scalar code."""
    codes = torch.arange(5 * 13109).remainder(2**16).to(torch.uint16).view(dtype).reshape(5, -1)
    x = torch.cat([codes, torch.ones_like(codes)], -1)
    made = Chain(5, dtype)
    found = made.gate(x)
    made.run()
    assert_same_bits(found, F.silu(x.chunk(2, -1)[0]))


@pytest.mark.parametrize("scheme", SCHEMES)
@every_activation
@every_dtype
@pytest.mark.usefixtures("threads")
def test_products_are_those_of_the_operators(scheme: str, activation: Activation | None, dtype: torch.dtype) -> None:
    done = 0
    for width, tokens in product(WIDTHS, TOKENS):
        weight = weight_of(scheme, width)
        if chain.refusal(weight, activation) is not None:
            continue
        for bias in (None, wide(dtype, ROWS)):
            made, x = Chain(tokens, dtype), wide(dtype, tokens, width)
            found = made.linear(x, weight, bias, activation)
            made.run()
            assert_same_bits(found, linear(x, weight, bias, activation))
            done += 1
    assert done >= 2 * len(TOKENS) * (len(WIDTHS) - 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@every_activation
@every_dtype
@pytest.mark.usefixtures("threads")
def test_what_is_not_finite_comes_out_as_nan(bad: float, activation: Activation | None, dtype: torch.dtype) -> None:
    """With int8 activations the other tokens keep their bits; without, what shares a product with it is NaN too."""
    for scheme, width in product(("int4-g32-asym", "int8-row"), (64, 576)):
        weight, x = weight_of(scheme, width), torch.randn(3, width).to(dtype)
        x[1, width // 2 + 8] = bad
        made = Chain(3, dtype)
        found = made.linear(x, weight, None, activation)
        made.run()
        assert found[1].isnan().all()
        if activation is not None:
            assert_same_bits(found, ops.linear_int8(x, weight, activation))
        x[1] = 1
        made.run()
        assert_same_bits(found, linear(x, weight, None, activation))  # nothing of it stays


# --- several in a row -------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, Activation(32), Activation(0, True)], ids=str)
@every_dtype
@pytest.mark.usefixtures("threads")
def test_steps_see_what_earlier_ones_wrote_at_every_run(activation: Activation | None, dtype: torch.dtype) -> None:
    """The second half of a decoder layer; input and output are others each time, the stream between them stays."""
    up, down, out = (weight_of("int4-g32", k, n) for k, n in ((64, 200), (100, 64), (96, 64)))
    stream, scale, bias = wide(dtype, 3, 64), wide(dtype, 64), wide(dtype, 200)
    made, wanted = Chain(3, dtype), stream.clone()
    made.add_(stream, made.linear(None, out, None, activation))
    gates = made.linear(made.norm(stream, scale, EPS), up, bias, activation)
    act = None if activation and activation.group else activation  # 100 columns end a group of 32 early, which is fine
    made.add_(stream, made.linear(made.gate(gates), down, None, act))
    own = made.norm(stream, scale, EPS)
    for _ in range(3):
        x, given = wide(dtype, 3, 96), torch.empty(3, 64, dtype=dtype)
        wanted = wanted + linear(x, out, None, activation)
        a, b = linear(scale * F.rms_norm(wanted, (64,), None, EPS), up, bias, activation).chunk(2, -1)
        wanted = wanted + linear(F.silu(a).mul_(b), down, None, act)
        made.run(x, given)
        assert_same_bits(stream, wanted)
        assert_same_bits(given, scale * F.rms_norm(wanted, (64,), None, EPS))
    assert own.isnan().all(), "the last step's own buffer is for runs without another one"


def test_a_chain_keeps_its_tensors_alive() -> None:
    made = Chain(2, torch.bfloat16)
    x = wide(torch.bfloat16, 2, 576)
    wanted_of = weight_of("int8-row", 576)
    found = made.linear(x.clone(), wanted_of._replace(qdata=wanted_of.qdata.clone()), None, None)
    litter = [torch.full((2, 576), 7.0).bfloat16() for _ in range(50)]
    made.run()
    assert litter and torch.equal(found, ops.linear(x, wanted_of))


@pytest.mark.parametrize("wrong", ["dtype", "strides"])
def test_a_tensor_that_native_code_would_misread_is_refused(wrong: str) -> None:
    x = wide(torch.bfloat16, 4, 64)
    y = x.half() if wrong == "dtype" else wide(torch.bfloat16, 64, 4).t()
    with pytest.raises(AssertionError):
        Chain(4, torch.bfloat16).add_(x, y)


REFUSALS: dict[str, tuple[str, int, Activation | None, str | None]] = {
    "float8": ("float8-row", 64, None, "no integer products of float8"),
    "groups of 10": ("int4-g10", 100, None, "avx512 serves the weights"),
    "activations in 20": ("int4-g32", 64, Activation(20), "activation groups of 20 are no multiple of 32"),
    "activations in 8 columns": ("int4-g32", 8, Activation(32), "no multiple of 32"),
    "whole tokens of 8 columns": ("int4-g32", 8, Activation(0), None),
    "activations in 96": ("int4-g32", 576, Activation(96, True), None),
    "no activations": ("int3-g16-asym", 100, None, None),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_says_why(name: str) -> None:
    scheme, columns, activation, reason = REFUSALS[name]
    found = chain.refusal(weight_of(scheme, columns), activation)
    assert found is None if reason is None else reason in str(found)
