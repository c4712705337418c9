"""Aten's products for CUDA weights, without a card: chosen where they fit, right where aten has them on the CPU, and
given what aten's own checks for CUDA accept."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from cases import ONE_PER_FORMAT, Case, make_weight
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from llmquant.kernels import aten, ops, reference, registry
from llmquant.kernels.packed import Packed
from llmquant.kernels.triton import TRITON, Triton
from llmquant.packing.bits import unpack
from llmquant.primitives.dynamic import (
    ALL_TOKENS,
    FLOAT8,
    INT8,
    Activation,
    StaticScale,
    dequantize_activation,
    quantize_activation,
)
from llmquant.primitives.metrics import compute_error

ROWS, COLUMNS = 48, 256
BFLOAT16 = torch.bfloat16


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def packed(scheme: str) -> Packed:
    return Case(scheme).quantize(make_weight((ROWS, COLUMNS))).packed()


# --- the choice -----------------------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """A machine that says it has a CUDA device of some capability, and Triton or not."""
    capability, has_triton = request.param
    find = importlib.util.find_spec
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0) if i else capability)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: (name if has_triton else None) if name == "triton" else find(name)
    )
    monkeypatch.setitem(registry.BACKENDS, "triton", Triton())
    registry.choose.cache_clear()
    yield
    registry.choose.cache_clear()


CHOICES = [
    # capability of the card, Triton, format, block, columns; kernel and part of its reason
    (((8, 0), True), "int4", (1, 32), 64, "aten", "_weight_int4pack_mm for a few bfloat16 inputs; for others triton"),
    (((8, 0), True), "int4", (1, 48), 96, "triton", "aten: rows of 96 are not made of groups of 32, 64, 128 or 256"),
    (((8, 0), True), "int4", (1, 64), 96, "triton", "aten: rows of 96 are not made of groups of 32, 64, 128 or 256"),
    (((8, 0), True), "int3", (1, 32), 64, "triton", "aten: aten has no product for int3"),
    (((8, 0), True), "mxfp4", (1, 32), 64, "triton", "aten: aten has no product for mxfp4"),
    (((8, 0), True), "int8", (1, 64), 64, "aten", "_int_mm for inputs in int8 codes"),
    (((8, 0), True), "int8", (1, 32), 64, "triton", "aten: its rows have several scales"),
    (((8, 0), True), "int8", (1, 68), 68, "triton", "aten: 68 columns are not a multiple of 8"),
    (((8, 0), True), "float8", (1, 64), 64, "triton", "aten: a card has compute capability 8.0, less than 8.9"),
    (((8, 9), True), "float8", (1, 64), 64, "aten", "_scaled_mm for bfloat16 inputs in float8 codes"),
    (((8, 9), True), "float8", (128, 128), 256, "triton", "aten: its rows have several scales"),
    (((8, 0), False), "int3", (1, 32), 64, "reference", "triton: triton is not installed"),
    (((7, 5), True), "int4", (1, 32), 64, "reference", "a card has compute capability 7.5, less than 8.0"),
]


@pytest.mark.parametrize(("card", "name", "block", "columns", "kernel", "reason"), CHOICES, indirect=["card"])
def test_the_choice_for_a_card_has_its_reason(
    card: None, name: str, block: tuple[int, int], columns: int, kernel: str, reason: str
) -> None:
    choice = registry.choose(name, block, columns, "cuda")
    assert choice.kernel == kernel and reason in choice.reason
    assert "portable: the weight lies on cuda" in choice.reason
    assert registry.choose(name, block, columns, "cpu").kernel not in ("aten", "triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_the_reference_serves_and_says_why() -> None:
    choice = registry.choose("int4", (1, 32), 64, "cuda")
    assert choice.kernel == "reference" and "aten: there is no CUDA device" in choice.reason.replace(", triton:", ":")


# --- the arithmetic, with aten's products for the CPU --------------------------------------------------------------


@pytest.fixture
def int4_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same product in the order of codes that aten has for the CPU."""
    pack, multiply = torch.ops.aten._convert_weight_to_int4pack_for_cpu, torch.ops.aten._weight_int4pack_mm_for_cpu
    monkeypatch.setattr(aten, "pack_int4", lambda qdata, columns: pack(unpack(qdata, 4, columns).int(), 1))
    monkeypatch.setattr(aten, "multiply_int4", multiply)


def sqnr(exact: Tensor, found: Tensor) -> float:
    return float(compute_error(exact, found.double()))


@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g64-asym", "int4-g128", "int4-g256-asym", "int4-b4x32"])
@pytest.mark.parametrize("shape", [(COLUMNS,), (1, COLUMNS), (2, 3, COLUMNS), (32, COLUMNS)], ids=str)
def test_int4(int4_on_cpu: None, scheme: str, shape: tuple[int, ...]) -> None:
    weight = packed("int4-g32" if "b4" in scheme else scheme)
    if "b4" in scheme:  # rows share scales
        weight = weight._replace(scale=weight.scale[::4].contiguous(), block=(4, 32))
    x, bias = torch.randn(shape, dtype=BFLOAT16), torch.randn(ROWS, dtype=BFLOAT16)
    found = aten.linear(x, weight, bias)
    exact = F.linear(x.double(), weight.dequantize().double(), bias.double())
    assert found.dtype == BFLOAT16 and found.shape == exact.shape
    assert 42 < sqnr(exact, found) < 60
    assert "aten" in weight.__dict__ and torch.equal(aten.linear(x, weight, bias), found)


def test_what_int4_does_not_take_goes_on(int4_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, few = packed("int4-g32"), torch.randn(2, COLUMNS, dtype=BFLOAT16)
    monkeypatch.setattr(aten, "multiply_int4", lambda *_: pytest.fail("it should not be called"))
    others = [
        (few.float(), weight),
        (few.half(), weight),
        (torch.randn(33, COLUMNS, dtype=BFLOAT16), weight),
        (few[:0], weight),
        (few, weight.panel(0, 0)),
        (few, weight.panel(0, 12)),
        (few, Packed.passing(*weight)),
        (few, packed("int3-g32")),
    ]
    for x, other in others:
        assert torch.equal(aten.linear(x, other, None), reference.linear(x, other, None))


def test_the_copy_of_int4_codes_follows_its_sources(int4_on_cpu: None) -> None:
    weight, other = (Case("int4-g32-asym").quantize(make_weight((ROWS, COLUMNS), seed=i)) for i in range(2))
    x = torch.randn(3, COLUMNS, dtype=BFLOAT16)
    wanted = [aten.linear(x, other.packed(), None), aten.linear(x, weight.packed(), None)]
    assert not torch.equal(*wanted)
    weight[:24].copy_(other[:24])  # by way of views
    weight[24:].copy_(other[24:])
    assert torch.equal(aten.linear(x, weight.packed(), None), wanted[0])
    weight.scale.mul_(2)  # as an optimizer does
    assert torch.equal(aten.linear(x, weight.packed(), None), wanted[0] * 2)


def test_scales_and_zeros_mean_the_weight() -> None:
    """value = (code - 8) * scale + zero, to the precision of bfloat16 and no better."""
    for scheme in ("int4-g32", "int4-g32-asym"):
        weight = packed(scheme)
        scale, zero = aten.scales_and_zeros(weight).float().unbind(-1)  # [G, N] each
        codes = unpack(weight.qdata, 4, COLUMNS).float() - 8
        found = codes * scale.T.repeat_interleave(32, 1) + zero.T.repeat_interleave(32, 1)
        moved = (found - weight.dequantize()).abs() / (scale.T.abs().repeat_interleave(32, 1) * 8)
        assert 2**-11 < moved.max() < 2**-7
        assert (zero == 0).all() == (weight.zero_point is None)


def test_nibbles_are_swapped_as_aten_wants_them() -> None:
    codes = torch.randint(16, (4, 64), dtype=torch.uint8)
    weight = Packed(packed("int4-g32").qdata, torch.ones(1, 1), None, "int4", (1, 32), COLUMNS)
    codes = unpack(weight.qdata, 4, COLUMNS)
    assert torch.equal(aten.swap_nibbles(weight.qdata), codes[:, ::2] << 4 | codes[:, 1::2])


@pytest.mark.parametrize("scheme", ["int8-row", "int8-tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=str)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_int8_has_the_bits_of_the_reference(
    scheme: str, dtype: torch.dtype, asymmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, bias = packed(scheme), torch.randn(ROWS)
    called: list[int] = []
    product = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (called.append(len(a)), product(a, b))[1])
    for shape in ((17, COLUMNS), (2, 3, 9, COLUMNS)):
        x = torch.randn(shape).to(dtype)
        for group in (0, COLUMNS):
            activation = Activation(group, asymmetric)
            found = aten.linear_int8(x, weight, activation, bias)
            assert torch.equal(found, reference.linear_int8(x, weight, activation, bias))
    assert called == [17, 17, 54, 54]


def test_what_int8_does_not_take_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_int_mm", lambda *_: pytest.fail("it should not be called"))
    weight, x, token = packed("int8-row"), torch.randn(20, COLUMNS), Activation(0)
    others = [
        (x[:16], weight, token),
        (x, weight, Activation(32)),
        (x, weight.panel(0, 12), token),
        (x, packed("int8-row-asym"), token),
        (x, packed("int4-row"), token),
    ]
    for given, other, activation in others:
        found = aten.linear_int8(given, other, activation, None)
        assert torch.equal(found, reference.linear_int8(given, other, activation, None))


@pytest.mark.parametrize("scheme", ["float8-row", "float8-tensor"])
@pytest.mark.parametrize("group", [0, ALL_TOKENS, COLUMNS])
@pytest.mark.parametrize("shape", [(COLUMNS,), (2, 9, COLUMNS)], ids=str)
def test_float8(scheme: str, group: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = packed(scheme), torch.randn(ROWS, dtype=BFLOAT16)
    x, activation = torch.randn(shape, dtype=BFLOAT16), Activation(group, dtype=FLOAT8)
    called: list[torch.Size] = []
    product = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *a, **k: (called.append(a[2].shape), product(*a, **k))[1])
    found = aten.linear_float8(x, weight, activation, bias)
    seen = dequantize_activation(quantize_activation(x, activation), activation)
    exact = F.linear(seen.double(), weight.dequantize().double(), bias.double())
    assert found.dtype == BFLOAT16 and found.shape == exact.shape
    assert 48 < sqnr(exact, found) < 65 and len(called) == 1


def test_what_float8_does_not_take_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **__: pytest.fail("it should not be called"))
    weight, x = packed("float8-row"), torch.randn(20, COLUMNS, dtype=BFLOAT16)
    token = Activation(0, dtype=FLOAT8)
    others = [
        (x.float(), weight, token),
        (x.half(), weight, token),
        (x[:0], weight, token),
        (x, weight, Activation(64, dtype=FLOAT8)),
        (x, weight.panel(0, 24), token),
        (x, packed("float8-e5m2-row"), token),
        (x, packed("int4-g32"), token),
    ]
    for given, other, activation in others:
        found = aten.linear_float8(given, other, activation, None)
        assert torch.equal(found, reference.linear_float8(given, other, activation, None))


@pytest.mark.parametrize("tokens", [1, 20])
def test_inputs_may_share_a_scale_that_was_chosen_before(tokens: int) -> None:
    x = torch.randn(tokens, COLUMNS, dtype=BFLOAT16)
    x[0, 5] = 1e4  # far beyond it
    scale, zero_point = torch.tensor([[0.02]]), torch.tensor([[-31]], dtype=torch.int8)
    for dtype, scheme, static in (
        (INT8, "int8-row", StaticScale(scale)),
        (INT8, "int8-row", StaticScale(scale, zero_point)),
        (FLOAT8, "float8-row", StaticScale(scale)),
        (FLOAT8, "float8-tensor", StaticScale(scale)),
    ):
        weight, activation = packed(scheme), Activation(ALL_TOKENS, static.zero_point is not None, dtype, static=True)
        found, wanted = (
            (b.linear_int8 if dtype == INT8 else b.linear_float8)(x, weight, activation, None, static)
            for b in (aten, reference)
        )
        assert sqnr(wanted, found) > 48


# --- tensors that say they lie on a card -----------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Notes the names of aten's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class ThroughAten(TorchFunctionMode):
    """What methods of tensors do, by aten: they ask builds of torch without CUDA for a device guard that these lack."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        op = torch.ops.aten
        if func is Tensor.__getitem__:
            tensor, slices = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
            for dim, part in enumerate(slices):
                tensor = op.slice(tensor, dim, part.start, part.stop)
            return tensor
        if func is Tensor.contiguous:
            return op.clone(args[0], memory_format=torch.contiguous_format)
        if func is Tensor.bfloat16:
            return op._to_copy(args[0], dtype=BFLOAT16)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fake_mode(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """Tensors without memory, on any device: whatever mixes devices, or looks at values, fails."""
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    return FakeTensorMode(allow_non_fake_inputs=True)  # tables of values, which are kept on the CPU


def on_device(weight: Packed, device: str) -> Packed:
    tensors = (None if t is None else torch.empty(t.shape, dtype=t.dtype, device=device) for t in weight[:3])
    return Packed(*tensors, *weight[3:])


@pytest.mark.parametrize(
    ("scheme", "activation", "product"),
    [
        ("int4-g32", None, "_weight_int4pack_mm"),
        ("int4-g128", None, "_weight_int4pack_mm"),
        ("int8-row", Activation(0), "_int_mm"),
        ("int8-row", Activation(0, True), "_int_mm"),
        ("float8-row", Activation(0, dtype=FLOAT8), "_scaled_mm"),
        ("float8-tensor", Activation(0, dtype=FLOAT8), "_scaled_mm"),
        ("float8-row", Activation(ALL_TOKENS, dtype=FLOAT8), "_scaled_mm"),
        ("float8-tensor", Activation(ALL_TOKENS, dtype=FLOAT8), "_scaled_mm"),
    ],
)
def test_aten_accepts_what_it_is_given_on_a_card(
    scheme: str, activation: Activation | None, product: str, fake_mode: FakeTensorMode
) -> None:
    made = packed(scheme)
    with fake_mode, ThroughAten(), Calls() as calls:
        weight = on_device(made, "cuda")
        x = torch.empty(2, 10, COLUMNS, dtype=BFLOAT16, device="cuda")
        bias = torch.empty(ROWS, dtype=BFLOAT16, device="cuda")
        if activation is None:
            out = aten.linear(x, weight, bias)
        elif activation.dtype == INT8:
            out = aten.linear_int8(x, weight, activation, bias)
        else:
            out = aten.linear_float8(x, weight, activation, bias)
    assert (out.shape, out.dtype, out.device.type) == ((2, 10, ROWS), BFLOAT16, "cuda")
    assert product in calls.names


@pytest.mark.parametrize("case", ONE_PER_FORMAT, ids=str)
def test_no_operator_leaves_the_device(case: Case, fake_mode: FakeTensorMode) -> None:
    """On a device that torch knows by name alone, so that its own methods need nothing of it."""
    made = case.quantize(make_weight((33, 100))).packed()
    made.dequantize()  # makes the tables that are kept
    with fake_mode:
        weight = on_device(made, "lazy")
        x, bias = torch.empty(3, 100, device="lazy"), torch.empty(33, device="lazy")
        indices = torch.empty(4, dtype=torch.int64, device="lazy")
        for backend in (aten, reference):
            results = [
                backend.linear(x, weight, bias),
                backend.linear_int8(x, weight, Activation(32, True), bias),
                backend.linear_float8(x, weight, Activation(32, dtype=FLOAT8), bias),
                backend.matmul(bias[None], weight),
                backend.embedding(indices, weight, BFLOAT16),
            ]
            assert [tuple(r.shape) for r in results] == [(3, 33)] * 3 + [(1, 100), (4, 100)]
            assert {r.device.type for r in results} == {"lazy"}


def test_inputs_on_another_device_are_refused() -> None:
    weight = packed("int4-g32")
    away = Packed(*(None if t is None else t.to("meta") for t in weight[:3]), *weight[3:])
    x = torch.randn(2, COLUMNS)
    for call in (
        lambda: ops.linear(x, away),
        lambda: ops.linear_int8(x, away, Activation(0)),
        lambda: ops.linear_float8(x, away, Activation(0, dtype=FLOAT8)),
        lambda: ops.embedding(torch.zeros(2, dtype=torch.int64), away, BFLOAT16),
    ):
        with pytest.raises(RuntimeError, match="the input lies on cpu, the weight on meta"):
            call()


def test_the_backends_stand_between_those_for_cpus_and_the_reference() -> None:
    assert list(registry.BACKENDS)[-3:] == ["aten", "triton", "reference"] and registry.BACKENDS["triton"] is TRITON
