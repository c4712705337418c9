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
from llmquant.primitives.dynamic import ALL_TOKENS, Activation, StaticScale

MISSING = cpu.BACKENDS["avx512_vnni"].missing
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

TOKENS, WIDTHS, EPS = (1, 2, 3, 5), (8, 64, 100, 576, 1000), 1e-5
SCHEMES = (
    "int4-g32",
    "int4-g32-asym",
    "int3-g16-asym",
    "int8-row",
    "int8-g32",
    "int4-tensor",
    "mxfp4",
    "nvfp4",
    "mxfp6-e3m2",
)
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


@pytest.mark.parametrize("asymmetric", [False, True])
@every_dtype
@pytest.mark.usefixtures("threads")
def test_products_with_static_scales_are_those_of_the_operators(asymmetric: bool, dtype: torch.dtype) -> None:
    activation = Activation(ALL_TOKENS, asymmetric, static=True)
    static = StaticScale(torch.tensor([[0.03]]), torch.tensor([[9]], dtype=torch.int8) if asymmetric else None)
    for width, tokens in product((64, 576), TOKENS):
        weight, made, x = weight_of("int8-row", width), Chain(tokens, dtype), wide(dtype, tokens, width)
        assert chain.refusal(weight, activation) is None
        found = made.linear(x, weight, None, activation, static)
        made.run()
        assert_same_bits(found, ops.linear_int8(x, weight, activation, None, static))


@every_dtype
def test_products_of_nf4(dtype: torch.dtype) -> None:
    """Two bytes a number; plain inputs only."""
    for width, tokens in product(WIDTHS, TOKENS):
        weight, made, x = weight_of("nf4", width), Chain(tokens, dtype), wide(dtype, tokens, width)
        found = made.linear(x, weight, None, None)
        made.run()
        assert_same_bits(found, ops.linear(x, weight))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@every_activation
@every_dtype
@pytest.mark.usefixtures("threads")
def test_what_is_not_finite_comes_out_as_nan(bad: float, activation: Activation | None, dtype: torch.dtype) -> None:
    """With int8 activations the other tokens keep their bits; without, what shares a product with it is NaN too."""
    for scheme, width in product(("int4-g32-asym", "int8-row", "nvfp4"), (64, 576)):
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


# --- attention --------------------------------------------------------------------------------------------

GROUPS = ((2, 2), (9, 3), (8, 1))
LENGTHS = (*range(1, 10), 15, 16, 17, 31, 32, 33, 47, 50, 65, 111, 384, 385, 511, 512, 513, 515, 516, 530, 1025)


def skip_if_torch_attends_otherwise(head: int, dtype: torch.dtype) -> None:
    if not chain.attention_like_torch(head, dtype):
        pytest.skip("this torch sums in another order, and nobody will ask for such a chain")


def attend(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """q [B, H, D], keys and values [B, H / groups, T, D] -> [B, H * D]."""
    grouped = q.shape[1] != keys.shape[1]
    return F.scaled_dot_product_attention(q[:, :, None], keys, values, scale=scale, enable_gqa=grouped).flatten(1)


def check_attention(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
    """The last key and value come with the query; behind them is room that nobody may read or write."""
    (tokens, heads, head), (_, kv_heads, length, _) = q.shape, keys.shape
    made = Chain(tokens, q.dtype)
    found = made.attention(torch.cat([q, keys[:, :, -1], values[:, :, -1]], 1).flatten(1), heads, kv_heads, head, scale)
    caches = [F.pad(x, (0, 0, 0, 3), value=torch.nan) for x in (keys, values)]
    wanted_caches = [cache.clone() for cache in caches]
    for cache in caches:
        cache[:, :, length - 1] = torch.nan
    found.look_at(caches[0], caches[1], length - 1)
    logsumexp = found.logsumexp()
    made.run()
    assert_same_bits(found.out, attend(q, keys, values, scale))
    wanted = chain._logsumexp(q, keys, values, scale)
    torch.testing.assert_close(logsumexp, wanted, rtol=0, atol=0, equal_nan=True)
    for cache, wanted_cache in zip(caches, wanted_caches, strict=True):
        assert_same_bits(cache, wanted_cache)


@pytest.mark.parametrize("head", [64, 128])
@every_dtype
@pytest.mark.usefixtures("threads")
def test_attention_is_torchs(head: int, dtype: torch.dtype) -> None:
    skip_if_torch_attends_otherwise(head, dtype)
    for i, (length, (heads, kv_heads)) in enumerate(product(LENGTHS, GROUPS)):
        tokens = 1 + i % 3
        q, keys, values = (
            wide(dtype, tokens, n, head) if i % 2 else torch.randn(tokens, n, head).to(dtype)
            for n in (heads, kv_heads * length, kv_heads * length)
        )
        q = q * (0.01, 1, 30)[i // 2 % 3]  # from all alike to one that drowns the others
        keys, values = (x.view(tokens, kv_heads, length, head) for x in (keys, values))
        check_attention(q, keys, values, 0.1 if length % 2 else head**-0.5)


@pytest.mark.parametrize("head", [32, 64, 96, 128, 256])
@every_dtype
def test_attention_is_torchs_where_rounding_errors_are_all_there_is(head: int, dtype: torch.dtype) -> None:
    skip_if_torch_attends_otherwise(head, dtype)
    generator = torch.Generator().manual_seed(5)
    for length, (heads, kv_heads) in product(LENGTHS, GROUPS):
        q, k, v = (x.to(dtype)[None] for x in chain._cancelling(length, heads, kv_heads, head, generator))
        check_attention(q, k, v, head**-0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e-39, 1e-6, 0.0])
@every_dtype
def test_attention_over_numbers_at_the_ends(bad: float, dtype: torch.dtype) -> None:
    """One such number, or nothing but such numbers, in the queries, the keys or the values."""
    skip_if_torch_attends_otherwise(64, dtype)
    for length, which, all_of_it in product((1, 7, 16, 47, 513, 530), range(3), (False, True)):
        given = [wide(dtype, 1, n, length if n == 2 else 1, 64) for n in (4, 2, 2)]
        if all_of_it:
            given[which].fill_(bad)
        else:
            given[which].view(-1)[-70] = bad
        check_attention(given[0].squeeze(2), given[1], given[2], 0.125)


@pytest.mark.skipif(cpu.BACKENDS["amx"].missing is not None, reason="not the processors on which it was measured")
@every_dtype
def test_attention_of_models_is_like_torchs(dtype: torch.dtype) -> None:
    assert all(chain.attention_like_torch(head, dtype) for head in (64, 96, 128))


def one_by_one(q: Tensor, k: Tensor, v: Tensor, scale: float, enable_gqa: bool) -> Tensor:
    """Attention as good as torch's, in another order."""
    assert enable_gqa
    k, v = (x.float().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    weights = (q.float() @ k.mT).mul_(scale).softmax(-1).to(q.dtype)
    return (weights.float().flip(-1) @ v.flip(-2)).to(q.dtype)


@pytest.mark.skipif(chain.attention_refusal(torch.float16, 64) is not None, reason="no attention here")
@every_dtype
def test_another_order_is_noticed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", one_by_one)
    assert not chain.attention_like_torch.__wrapped__(64, dtype)
    generator = torch.Generator().manual_seed(1)
    noticed = [n for n in chain.LENGTHS if not chain._attends_like_torch(n, 64, dtype, generator)]
    assert len(noticed) > 0.8 * len(chain.LENGTHS)


@every_dtype
@pytest.mark.usefixtures("threads")
def test_attention_sees_what_earlier_steps_wrote_and_a_cache_that_moves(dtype: torch.dtype) -> None:
    skip_if_torch_attends_otherwise(64, dtype)
    tokens, heads, kv_heads, head = 2, 6, 2, 64
    qkv, cos, sin = (torch.empty(tokens, n, dtype=dtype) for n in (10 * head, head, head))
    out, made = weight_of("int8-row", heads * head), Chain(tokens, dtype)
    made.rope_(qkv, cos, sin, heads + kv_heads)
    attention = made.attention(qkv, heads, kv_heads, head, 0.125)
    found = made.linear(attention.out, out, None, None)
    keys, values = (torch.randn(tokens, kv_heads, 4, head).to(dtype) for _ in range(2))
    caches = [F.pad(x, (0, 0, 0, 2)) for x in (keys, values)]
    for length in range(4, 9):
        if length == caches[0].shape[2]:
            caches = [F.pad(x, (0, 0, 0, 2)) for x in caches]
        for given in (qkv, cos, sin):
            given.copy_(torch.randn(given.shape))
        x = qkv.clone().view(tokens, -1, head)
        turned, v = x.split_with_sizes((heads + kv_heads, kv_heads), 1)
        turned = (turned * cos[:, None]).add_(turned.roll(head // 2, -1).mul_(sin[:, None]))
        keys = torch.cat([keys, turned[:, heads:, None]], 2)
        values = torch.cat([values, v[:, :, None]], 2)
        attention.look_at(caches[0], caches[1], length)
        made.run()
        assert_same_bits(found, ops.linear(attend(turned[:, :heads], keys, values, 0.125), out))


@pytest.mark.parametrize(("dtype", "head"), [(torch.float32, 64), (torch.float16, 48), (torch.float16, 288)])
def test_attentions_that_are_refused(dtype: torch.dtype, head: int) -> None:
    assert chain.attention_refusal(dtype, head) is not None
    assert not chain.attention_like_torch(head, dtype)


@pytest.mark.skipif(chain.attention_refusal(torch.float16, 64) is not None, reason="no attention here")
def test_a_cache_that_native_code_would_misread_is_refused() -> None:
    made = Chain(1, torch.float16)
    attention = made.attention(wide(torch.float16, 1, 8 * 64), 4, 2, 64, 0.125)
    good = wide(torch.float16, 1, 2, 5, 64)
    for keys, values, length in (
        (good.bfloat16(), good, 4),
        (good, good.mT.contiguous().mT, 4),
        (good, good[:, :, :4].contiguous(), 3),
        (good[:, :1].contiguous(), good[:, :1].contiguous(), 4),
        (good, good.clone(), 5),
        (good, good.clone(), -1),
    ):
        with pytest.raises(AssertionError):
            attention.look_at(keys, values, length)
    attention.look_at(good, good.clone(), 4)
    with pytest.raises(AssertionError, match="has run"):
        made.add_(attention.out, attention.out)


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
    "nf4": ("nf4", 64, None, None),
    "nf4 and integers": ("nf4", 64, Activation(32), "no integer products of nf4"),
    "mxfp8": ("mxfp8", 64, None, "no integer products of mxfp8"),
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
