"""A weight becomes plain tensors and comes back; nothing else does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import ALL_CASES, STATIC, Case, make_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIGS, Folders, assert_same, build, load, raw, weights
from torch import nn

from llmquant import quantize_
from llmquant.checkpoint.state import assemble, component_key, components, describe, expected, logical_shape, state_dict
from llmquant.config.schemes import parse_scheme
from llmquant.errors import CheckpointError
from llmquant.primitives.dynamic import FLOAT8, Activation
from llmquant.quantize import quantize_weight
from llmquant.tensor import QuantizedTensor, tensor_class

SHAPES = st.one_of(
    st.tuples(st.integers(1, 6), st.integers(1, 70)),
    st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 70)),
)


def quantized(case: Case, shape: tuple[int, ...], transposed: bool = False) -> QuantizedTensor:
    return quantize_weight(make_weight(shape), case.config.with_algorithm("rtn"), transposed=transposed)


@settings(max_examples=150)
@given(case=st.sampled_from(ALL_CASES), shape=SHAPES, transposed=st.booleans())
def test_components_and_entry_give_the_weight_back(case: Case, shape: tuple[int, ...], transposed: bool) -> None:
    weight = quantized(case, shape, transposed)
    tensors, entry = components("a.weight", weight), describe(weight)
    back = assemble("a.weight", entry, tensors, torch.bfloat16)
    assert type(back) is type(weight) is tensor_class(case.format)
    assert back.dtype == torch.bfloat16 and back.meta == weight.meta and back.shape == weight.shape
    assert_same({f.name: raw(t) for f, t in back.parts()}, {f.name: raw(t) for f, t in weight.parts()})
    assert describe(back) == entry


@settings(max_examples=150)
@given(case=st.sampled_from(ALL_CASES), shape=SHAPES, transposed=st.booleans())
def test_the_entry_promises_what_is_stored(case: Case, shape: tuple[int, ...], transposed: bool) -> None:
    weight = quantized(case, shape, transposed)
    entry = describe(weight)
    tensors = components("w", weight)
    assert expected("w", entry) == {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}
    assert sum(t.nbytes for t in tensors.values()) == weight.nbytes
    # The rank rule, and keys that no other weight can have.
    assert tensors["w"].dim() == weight.dim() + 1
    assert all(t.dim() == weight.dim() for key, t in tensors.items() if key != "w")
    assert set(tensors) == {"w", "w_scale"} | ({"w_zero_point"} if case.asymmetric else set()) | (
        {"w_tensor_scale"} if case.format.tensor_scale else {"w_row_scale"} if case.row_scale else set()
    )
    logical = logical_shape(entry)
    assert logical == ((*shape[:-2], shape[-1], shape[-2]) if transposed else shape)


@pytest.mark.parametrize("missing", ["qdata", "scale", "zero_point"])
def test_a_missing_component_is_refused_by_name(missing: str) -> None:
    weight = quantized(Case("int3-g32-asym"), (4, 70))
    tensors = components("m.w", weight)
    del tensors[component_key("m.w", missing)]
    with pytest.raises(CheckpointError, match=f"{component_key('m.w', missing)} is missing"):
        assemble("m.w", describe(weight), tensors, torch.float32)


@pytest.mark.parametrize("which", ["qdata", "scale", "zero_point"])
@pytest.mark.parametrize("wrong", [lambda t: t[:-1], lambda t: t.to(torch.float64), lambda t: t.unsqueeze(0)])
def test_a_component_of_wrong_shape_or_dtype_is_refused_by_name(which: str, wrong: Any) -> None:
    weight = quantized(Case("int3-g32-asym"), (4, 70))
    tensors, key = components("m.w", weight), component_key("m.w", which)
    tensors[key] = wrong(tensors[key])
    with pytest.raises(CheckpointError, match="expected") as error:
        assemble("m.w", describe(weight), tensors, torch.float32)
    assert error.value.where == key


def test_an_entry_of_an_unknown_format_is_a_checkpoint_error() -> None:
    entry = describe(quantized(Case("int4-g32"), (4, 64)))
    with pytest.raises(CheckpointError, match="int99") as error:
        expected("m.w", {**entry, "format": "int99"})
    assert "m.w" in str(error.value) and error.value.hint


@pytest.mark.parametrize("family", CONFIGS)
def test_a_models_state_holds_every_weight_once(family: str, folders: Folders) -> None:
    model = load(folders(family))
    plain = {fqn: raw(p) for fqn, p in model.named_parameters()}
    report = quantize_(model, CONFIGS[family])
    tensors, entries = state_dict(model)
    assert set(entries) == set(report.quantized)
    taken = {key for fqn, entry in entries.items() for key in expected(fqn, entry)}
    assert taken <= set(tensors)
    kept = {key: raw(t) for key, t in tensors.items() if key not in taken and key in plain}
    assert_same(kept, {fqn: value for fqn, value in plain.items() if fqn not in entries})
    quantized_bytes = sum(tensors[key].nbytes for key in taken)
    assert quantized_bytes == sum(p.nbytes for p in {id(p): p for _, p in weights(model)}.values())
    assert not any(isinstance(t, (QuantizedTensor, nn.Parameter)) or t.requires_grad for t in tensors.values())


def test_a_tied_weight_is_stored_under_its_canonical_name(folders: Folders) -> None:
    model = load(folders("llama-tied"))
    quantize_(model, CONFIGS["llama-tied"])
    tensors, entries = state_dict(model)
    assert "model.embed_tokens.weight" in entries
    assert not [key for key in [*tensors, *entries] if key.startswith("lm_head")]


def test_two_equal_weights_that_are_not_tied_are_both_stored(folders: Folders) -> None:
    model = load(folders("llama"))
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    quantize_(model, {"_embedding": "int8", "_head": "int8"})
    tensors, entries = state_dict(model)
    assert sorted(entries) == ["lm_head.weight", "model.embed_tokens.weight"]
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_a_deep_copy_has_the_same_state(folders: Folders) -> None:
    model = load(folders.quantized("llama-tied"))
    (tensors, entries), (copied, copied_entries) = state_dict(model), state_dict(copy.deepcopy(model))
    assert entries == copied_entries
    assert_same({k: raw(t) for k, t in tensors.items()}, {k: raw(t) for k, t in copied.items()})
    assert all(copied[key].data_ptr() != tensors[key].data_ptr() for key in tensors)


def test_a_plain_model_has_no_entries() -> None:
    tensors, entries = state_dict(build("llama"))
    assert entries == {} and "lm_head.weight" in tensors


# --- activations ------------------------------------------------------------------------------------------


def with_activation(scheme: str, shape: tuple[int, ...] = (4, 70), transposed: bool = False) -> QuantizedTensor:
    return quantize_weight(make_weight(shape), parse_scheme(scheme).with_algorithm("rtn"), transposed=transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "activation",
    [Activation(32), Activation(0), Activation(48, True), Activation(-1, dtype=FLOAT8)],
    ids=lambda a: a.scheme,
)
@pytest.mark.parametrize("stem", ["int4-g32", "int3-g24-asym", "float8"])
def test_an_entry_names_the_activation_and_nothing_else_changes(
    stem: str, activation: Activation, transposed: bool
) -> None:
    weight, plain = (with_activation(s, transposed=transposed) for s in (f"{activation.scheme}-{stem}", stem))
    entry = describe(weight)
    assert entry == {**describe(plain), "activation": activation.to_dict()}
    assert "activation" not in describe(plain)
    tensors = components("w", weight)
    assert_same({k: raw(t) for k, t in tensors.items()}, {k: raw(t) for k, t in components("w", plain).items()})
    back = assemble("w", entry, tensors, torch.float32)
    assert back.meta == weight.meta and back.meta.activation == activation
    assert assemble("w", describe(plain), tensors, torch.float32).meta.activation is None


@pytest.mark.parametrize("shape", [(4, 70), (3, 4, 70)], ids=str)
@pytest.mark.parametrize("case", STATIC, ids=str)
def test_a_static_scale_is_a_component(case: Case, shape: tuple[int, ...]) -> None:
    weight = case.quantize(make_weight(shape))
    tensors, entry, matrices = components("w", weight), describe(weight), (*shape[:-2], 1, 1)
    assert (tensors["w_act_scale"].dtype, tensors["w_act_scale"].shape) == (torch.float32, matrices)
    assert ("w_act_zero_point" in tensors) == weight.meta.activation.asymmetric
    assert {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()} == expected("w", entry)
    assert entry["activation"]["static"] is True
    back = assemble("w", entry, tensors, torch.float32)
    assert torch.equal(back, weight) and back.meta == weight.meta
    for key in tensors:
        with pytest.raises(CheckpointError):
            assemble("w", entry, {name: t for name, t in tensors.items() if name != key}, torch.float32)


UNREADABLE: dict[str, Any] = {
    "another dtype": {"dtype": "float8", "group": 32, "asymmetric": False},
    "a field too many": {"dtype": "int8", "group": 32, "asymmetric": False, "scale": 1.0},
    "a static group": {"dtype": "int8", "group": 32, "asymmetric": False, "static": True},
    "a field too few": {"dtype": "int8", "group": 32},
    "a negative group": {"dtype": "int8", "group": -1, "asymmetric": False},
    "a scheme": "a8",
    "null": None,
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_activation_that_is_not_known_is_refused_and_not_ignored(name: str) -> None:
    weight = with_activation("a8-int4-g32")
    entry = {**describe(weight), "activation": UNREADABLE[name]}
    for call in (
        lambda: expected("m.w", entry),
        lambda: assemble("m.w", entry, components("m.w", weight), torch.float32),
    ):
        with pytest.raises(CheckpointError, match="manifest says of a weight") as caught:
            call()
        assert "m.w" in str(caught.value) and "later llmquant" in str(caught.value)
