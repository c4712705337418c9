"""Copies, dtypes, devices, pickles, modules, sizes: what a weight must survive, and what it must say of itself."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from cases import ALL_CASES, DTYPES, ONE_PER_FORMAT, Case, make_weight
from layouts import LAYOUTS, Layout
from torch import Tensor, nn

from llmquant.errors import UnsupportedOpError
from llmquant.formats import FORMATS
from llmquant.tensor import NAMED, STORAGE, QuantizedTensor, tensor_class

every_format = pytest.mark.parametrize("case", ONE_PER_FORMAT, ids=str)
every_layout = pytest.mark.parametrize("at", [LAYOUTS[0], LAYOUTS[3]], ids=str)  # the simplest and the hardest


def saved(value: object, weights_only: bool = True) -> object:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


def same(a: Tensor, b: Tensor) -> bool:
    return (
        type(a) is type(b)
        and isinstance(a, nn.Parameter) == isinstance(b, nn.Parameter)
        and (a.shape, a.dtype, a.meta, a.requires_grad) == (b.shape, b.dtype, b.meta, b.requires_grad)
        and torch.equal(a, b)
        and torch.equal(a.dequantize(), b.dequantize())
    )


# --- copies -----------------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[Tensor], object]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "torch.save": saved,
    "torch.save of everything": lambda w: saved(w, weights_only=False),
    "flatten and unflatten": lambda w: _flattened(w),
}


def _flattened(w: Tensor) -> Tensor:
    names, context = w.__tensor_flatten__()
    inner = {name: getattr(w, name).clone() for name in names}
    found = type(w).__tensor_unflatten__(inner, context, w.shape, w.stride())
    return nn.Parameter(found, requires_grad=False) if isinstance(w, nn.Parameter) else found


@every_format
@every_layout
@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_copies_are_the_same_and_apart(case: Case, at: Layout, name: str, dtype: torch.dtype) -> None:
    weight = at.quantize(case, dtype)
    for original in (weight, nn.Parameter(weight, requires_grad=False)):
        found = COPIES[name](original)
        assert same(found, original)
        assert found.qdata.data_ptr() != weight.qdata.data_ptr()
        before = original.clone()
        for _, tensor in found.parts():
            tensor.zero_()
        assert torch.equal(original, before)


@every_format
def test_every_inner_tensor_is_listed(case: Case) -> None:
    weight = LAYOUTS[0].quantize(case)
    names, _ = weight.__tensor_flatten__()
    assert names == [f.name for f, _ in weight.parts()]
    outer = ["tensor_scale"] * case.format.tensor_scale + ["row_scale"] * case.row_scale
    assert names == ["qdata", "scale"] + ["zero_point"] * case.asymmetric + outer


@every_format
def test_deepcopy_of_a_module_keeps_its_ties(case: Case) -> None:
    weight = nn.Parameter(LAYOUTS[0].quantize(case), requires_grad=False)
    module = nn.ModuleDict({"a": nn.Linear(70, 6), "b": nn.Linear(70, 6), "c": nn.Linear(70, 6)})
    module["a"].weight = module["b"].weight = weight
    module["c"].weight = nn.Parameter(LAYOUTS[0].quantize(case), requires_grad=False)
    for found in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        a, b, c = (found[name].weight for name in "abc")
        assert a is b and a is not c and a is not weight
        assert same(a, weight) and isinstance(a, nn.Parameter)
        assert len(list(found.parameters())) == 5


# --- copy_, equal, empty_like -----------------------------------------------------------------------------


@every_format
@every_layout
def test_copy_and_empty_like(case: Case, at: Layout) -> None:
    weight, other = at.quantize(case), at.quantize(case, seed=1)
    target = torch.empty_like(weight)
    assert (target.shape, target.meta, target.dtype, type(target)) == (
        weight.shape,
        weight.meta,
        weight.dtype,
        type(weight),
    )
    assert target.copy_(other) is target
    assert torch.equal(target, other) and not torch.equal(target, weight)
    assert torch.empty_like(weight, dtype=torch.float16).dtype == torch.float16
    assert torch.empty_like(weight, device="meta").is_meta


@every_format
def test_equal_sees_every_difference(case: Case) -> None:
    weight = LAYOUTS[0].quantize(case)
    assert torch.equal(weight, weight.clone())
    for name, tensor in [(f.name, t) for f, t in weight.parts()]:
        other = weight.clone()
        changed = getattr(other, name)
        changed.copy_(tensor + 1)
        assert not torch.equal(weight, other), name
    assert not torch.equal(weight, weight.t())
    assert not torch.equal(weight, weight.dequantize())
    assert not torch.equal(weight, weight[:5])
    for scheme in ("int8", "int8-asym", "int8-g32-asym", "float8", "float8-e5m2", "float8-tensor"):
        other = Case(scheme).quantize(make_weight((6, 70)))
        if repr(other) != repr(weight):
            assert not torch.equal(weight, other) and not torch.equal(other, weight)


def test_equal_bytes_of_another_format_are_not_equal() -> None:
    weight = Case("float8").quantize(make_weight((6, 70)))
    other = weight.rebuild(lambda _, t: t, format="float8-e5m2")
    assert torch.equal(weight.qdata, other.qdata) and not torch.equal(weight, other)


@every_format
def test_copy_refuses_what_is_not_quantized_alike(case: Case) -> None:
    weight = LAYOUTS[0].quantize(case)
    others = [Case(s).quantize(make_weight((6, 70))) for s in ("int4-row", "int4-g64", "float8-tensor")]
    for other in (make_weight((6, 70)), weight[:, :64], *others):
        with pytest.raises(UnsupportedOpError, match="copy_"):
            weight.copy_(other)
    with pytest.raises(UnsupportedOpError, match="copy_"):
        make_weight((6, 70)).copy_(weight)


# --- dtype and device -------------------------------------------------------------------------------------

CASTS: dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype]] = {
    "to float16": (lambda w: w.to(torch.float16), torch.float16),
    "to float32": (lambda w: w.to(torch.float32), torch.float32),
    "to bfloat16 by keyword": (lambda w: w.to(dtype=torch.bfloat16), torch.bfloat16),
    "to device and dtype": (lambda w: w.to("cpu", torch.float16), torch.float16),
    "to like another": (lambda w: w.to(torch.empty(0, dtype=torch.bfloat16)), torch.bfloat16),
    "type_as": (lambda w: w.type_as(torch.empty(0, dtype=torch.float16)), torch.float16),
    "half": (lambda w: w.half(), torch.float16),
    "float": (lambda w: w.float(), torch.float32),
    "bfloat16": (lambda w: w.bfloat16(), torch.bfloat16),
    "double": (lambda w: w.double(), torch.float64),
}


@every_format
@every_layout
@pytest.mark.parametrize("name", CASTS)
def test_a_cast_changes_the_dtype_and_no_code(case: Case, at: Layout, name: str) -> None:
    cast, dtype = CASTS[name]
    for own in DTYPES[:2]:
        weight = at.quantize(case, own)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                found = cast(weight)
            assert found.dtype == dtype and found.dequantize().dtype == dtype
            assert torch.equal(found.dequantize(), weight.dequantize(dtype))
            assert torch.equal(found.qdata, weight.qdata) and torch.equal(found.scale, weight.scale)
            assert found.scale.dtype == weight.scale.dtype
        assert weight.dtype == own


def test_a_cast_to_the_own_dtype_is_no_copy_unless_asked_for() -> None:
    weight = LAYOUTS[0].quantize(ONE_PER_FORMAT[0])
    assert weight.to(weight.dtype) is weight and weight.cpu() is weight
    assert weight.to(weight.dtype, copy=True).qdata.data_ptr() != weight.qdata.data_ptr()


@every_format
@every_layout
def test_meta(case: Case, at: Layout) -> None:
    weight = at.quantize(case)
    found = weight.to("meta")
    assert found.is_meta and found.shape == weight.shape and found.meta == weight.meta
    assert all(t.is_meta for _, t in found.parts())


# --- size and words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_bytes_are_those_of_the_format(case: Case) -> None:
    for at in LAYOUTS:
        check_bytes(case, at)


def check_bytes(case: Case, at: Layout) -> None:
    weight, fmt = at.quantize(case), case.format
    block_rows, block_columns = weight.meta.block
    across, along = -(-6 // block_rows), -(-70 // block_columns)
    sparse = fmt.storage == "semisparse"  # 18 fours of two codes, and their places
    row = 2 * 18 + 18 // 2 if sparse else -(-70 * fmt.bits // 8)
    matrix = 6 * row + across * along * weight.scale.dtype.itemsize
    if case.asymmetric:
        matrix += across * -(-along * fmt.bits // 8)
    matrix += 4 * fmt.tensor_scale + 4 * across * case.row_scale
    assert weight.nbytes == matrix * (3 if at.experts else 1)
    assert weight.nbytes == sum(tensor.nbytes for _, tensor in weight.parts())
    assert weight.element_size() * weight.numel() == pytest.approx(weight.nbytes, rel=1e-12)
    assert weight.numel() == torch.Size(at.shape).numel()
    # What the format promises: its bits, plus the scales.
    bits, columns = (5, 72) if sparse else (fmt.bits, 70)
    assert weight.qdata.nbytes * 8 >= weight.numel() * bits
    assert weight.qdata.nbytes * 8 < (weight.numel() / 70) * (columns * bits + 8)


@every_format
def test_repr_names_what_matters_and_shows_no_values(case: Case) -> None:
    text = repr(LAYOUTS[3].quantize(case, torch.bfloat16))
    block = "x".join(map(str, LAYOUTS[3].quantize(case).meta.block))
    mapping = "asymmetric" if case.asymmetric else " symmetric"
    for word in (case.format.name, "(3, 70, 6)", block, "bfloat16", "transposed", "cpu", mapping):
        assert word in text
    assert "\n" not in text and len(text) < 200
    assert "transposed" not in repr(LAYOUTS[0].quantize(case))
    assert repr(nn.Parameter(LAYOUTS[0].quantize(case), requires_grad=False))


@every_format
def test_shared_memory(case: Case) -> None:
    weight = LAYOUTS[0].quantize(case)
    before = weight.dequantize()
    assert not weight.is_shared()
    assert weight.share_memory_() is weight
    assert weight.is_shared() and all(t.is_shared() for _, t in weight.parts())
    assert torch.equal(weight.dequantize(), before)


@every_format
def test_addresses_tell_weights_apart(case: Case) -> None:
    a, b = LAYOUTS[0].quantize(case), LAYOUTS[0].quantize(case)
    assert a.data_ptr() == a.detach().data_ptr() != b.data_ptr() != 0


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_its_class(name: str) -> None:
    row = FORMATS[name]
    cls = tensor_class(row)
    assert issubclass(cls, STORAGE[row.storage]) and name in cls.formats
    assert sum(name in named.formats for named in NAMED) == 1
    assert type(Case(name).quantize(make_weight((2, 8)))) is cls


@every_format
def test_the_kernel_says_why(case: Case) -> None:
    assert all(LAYOUTS[0].quantize(case).kernel())


def test_weights_never_require_a_gradient_by_themselves() -> None:
    weight = LAYOUTS[0].quantize(ONE_PER_FORMAT[0])
    assert not weight.requires_grad and weight.is_leaf
    assert not nn.Parameter(weight, requires_grad=False).requires_grad


# --- modules ----------------------------------------------------------------------------------------------


def tied_module(case: Case, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    """A table and a head that share one weight, and a layer of its own."""
    module = nn.ModuleDict({"table": nn.Embedding(6, 70), "head": nn.Linear(70, 6), "own": nn.Linear(70, 6)}).to(dtype)
    shared = nn.Parameter(case.quantize(make_weight((6, 70), dtype, seed)), requires_grad=False)
    module["table"].weight = module["head"].weight = shared
    module["own"].weight = nn.Parameter(case.quantize(make_weight((6, 70), dtype, seed + 1)), requires_grad=False)
    return module


@every_format
@pytest.mark.parametrize("move", ["half", "to", "bfloat16", "float"])
def test_a_module_changes_dtype_in_place_and_keeps_ties(case: Case, move: str) -> None:
    module = tied_module(case)
    before = module["own"].weight.dequantize(torch.float32)
    dtype = {"half": torch.float16, "to": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32}[move]
    moved = module.to(dtype) if move == "to" else getattr(module, move)()
    assert moved is module
    assert module["table"].weight is module["head"].weight
    assert isinstance(module["own"].weight, nn.Parameter) and isinstance(module["own"].weight, QuantizedTensor)
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert torch.equal(module["own"].weight.dequantize(), before.to(dtype))
    assert module["own"](torch.randn(2, 70).to(dtype)).dtype == dtype


@every_format
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("through_disk", [False, True])
def test_state_dict_round_trip(case: Case, assign: bool, through_disk: bool) -> None:
    source, target = tied_module(case), tied_module(case, seed=7)
    state = source.state_dict()
    assert {key for key in state if key.endswith("weight")} == {"table.weight", "head.weight", "own.weight"}
    state = saved(state) if through_disk else state
    assert not torch.equal(target["own"].weight, source["own"].weight)
    kept = target["own"].weight
    result = target.load_state_dict(state, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    for name in ("table", "head", "own"):
        assert isinstance(target[name].weight, nn.Parameter)
        assert torch.equal(target[name].weight, source[name].weight)
    assert (target["own"].weight is kept) == (not assign)
    tokens = torch.tensor([1, 5])
    assert torch.equal(target["head"](target["table"](tokens)), source["head"](source["table"](tokens)))


@every_format
def test_state_of_another_format_is_refused(case: Case) -> None:
    plain = nn.ModuleDict({"table": nn.Embedding(6, 70), "head": nn.Linear(70, 6), "own": nn.Linear(70, 6)})
    with pytest.raises(RuntimeError, match="copy_"):
        tied_module(case).load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="copy_"):
        plain.load_state_dict(tied_module(case).state_dict())


def test_saving_a_row_slice_and_views_keeps_their_values() -> None:
    weight = LAYOUTS[0].quantize(Case("int4-g32-asym"))
    for part in (weight[2:4], weight[:, 32:], weight.t(), LAYOUTS[2].quantize(Case("int3-g32"))[1]):
        assert torch.equal(saved(part).dequantize(), part.dequantize())


def test_splitting_many_times_leaves_the_source_alone() -> None:
    weight = LAYOUTS[0].quantize(Case("int4-g32-asym"))
    before = weight.dequantize()
    for first, second in pairwise(weight.chunk(3)):
        assert not torch.equal(first, second)
        torch.cat([first, second])
    assert torch.equal(weight.dequantize(), before)


@every_format
def test_setting_data_of_another_dtype_changes_the_dtype_in_place(case: Case) -> None:
    """As tools do that train adapters in float32 on a model of 16 bits."""
    weight = nn.Parameter(case.quantize(make_weight((6, 70), torch.bfloat16)), requires_grad=False)
    plain = weight.dequantize(torch.float32)
    weight.data = weight.data.to(torch.float32)
    assert weight.dtype == weight.data.dtype == torch.float32 and isinstance(weight, nn.Parameter)
    assert torch.equal(weight.dequantize(), plain)
    assert F.linear(torch.ones(2, 70), weight).dtype == torch.float32
    assert copy.deepcopy(weight).dtype == torch.float32 and "float32" in repr(weight)
