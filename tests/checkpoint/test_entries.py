"""Manifests: whatever parses is written back as it was; whatever is changed in one is accepted as right, or named."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmquant.checkpoint.entries import check_entry, scale_dtype
from llmquant.checkpoint.manifest import digest, new_manifest, promises
from llmquant.checkpoint.state import assemble, entry, expected, logical_shape
from llmquant.config.base import WeightOnlyConfig
from llmquant.errors import CheckpointError, ConfigError, LlmQuantError, ManifestError
from llmquant.formats import FORMATS, SCALE_CODES
from llmquant.primitives.dynamic import Activation
from llmquant.tensor import Meta

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ACTIVATIONS = [None, Activation(32), Activation(-1, True, static=True), Activation.default("nvfp4")]


@st.composite
def entries(draw: st.DrawFn) -> dict[str, Any]:
    """Entries that a writer may write: every format, shape, block and mapping that the table allows."""
    fmt = FORMATS[draw(st.sampled_from(sorted(FORMATS)))]
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 80))
    blocks = {"row": (1, columns), "tensor": (rows, columns), "group": (1, min(fmt.group_size or 16, columns))}
    blocks["block"] = (min(8, rows), min(8, columns))
    block = blocks[draw(st.sampled_from(fmt.granularities))]
    dtypes = [t for t in (*fmt.scale_dtypes, *DTYPES) if fmt.allows_scales(t)]
    dtypes += [SCALE_CODES[bits] for bits in fmt.scale_bits if block[0] == 1]
    transposed = draw(st.booleans())
    shape = (*draw(st.sampled_from([(), (3,)])), *((columns, rows) if transposed else (rows, columns)))
    meta = Meta(fmt.name, block, columns, transposed, draw(st.sampled_from(ACTIVATIONS)))
    return entry(meta, shape, draw(st.sampled_from(dtypes)), draw(st.booleans()) and fmt.asymmetric)


NAMES = st.text("abc._0", min_size=1, max_size=8).map(lambda name: f"w{name}-")  # no key of one is that of another
MANIFESTS = st.dictionaries(NAMES, entries(), max_size=4).map(lambda found: new_manifest([], found))


@settings(max_examples=200)
@given(MANIFESTS)
def test_whatever_a_writer_writes_parses_and_comes_back(manifest: dict[str, Any]) -> None:
    again = json.loads(json.dumps(manifest))
    promised = promises(again)
    assert promised == promises(manifest) and again == manifest and digest(again) == digest(manifest)
    assert len(promised) >= 2 * len(manifest["weights"])
    for fqn, described in manifest["weights"].items():
        fmt = check_entry(described)
        dtype = scale_dtype(described, fmt)
        tensors = {key: torch.zeros(shape, dtype=kind) for key, (kind, shape) in expected(fqn, described).items()}
        weight = assemble(fqn, described, tensors, torch.float32)
        assert entry(weight.meta, described["shape"], dtype, described["asymmetric"]) == described
        assert tuple(weight.shape) == tuple(described["shape"])
        assert logical_shape(described)[-1] == weight.meta.columns


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(-2, 2**33), max_size=3),
    st.dictionaries(st.text(max_size=2), st.none(), max_size=2),
    st.sampled_from(["int4", "mxfp4", "int8", "float16", "uint8", "nn", "float8_e4m3fn", "load"]),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in inner for found in [(*path, key), *places(item, (*path, key))]]


@settings(max_examples=500)
@given(MANIFESTS.filter(lambda m: m["weights"]), st.data())
def test_any_mutation_gives_a_named_error_or_a_manifest_that_makes_sense(
    manifest: dict[str, Any], data: st.DataObject
) -> None:
    mutated = copy.deepcopy(manifest)
    *path, last = data.draw(st.sampled_from([p for p in places(mutated) if p[0] in ("weights", "format_version")]))
    inside = mutated
    for key in path:
        inside = inside[key]
    if data.draw(st.booleans()) or not isinstance(inside, dict):
        inside[last] = data.draw(JUNK)
    else:
        del inside[last]
    try:
        promised = promises(mutated)
    except LlmQuantError as error:
        assert isinstance(error, CheckpointError) and error.where
        return
    for _, shape in promised.values():  # no size that could not be, and none that costs
        assert torch.Size(shape).numel() < 2**63
    assert digest(mutated) != digest(manifest) or mutated == manifest


GOOD = {
    "format": "int4",
    "bits": 4,
    "shape": [8, 32],
    "block": [1, 16],
    "transposed": False,
    "scale_dtype": "float16",
    "asymmetric": True,
}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"format": 3}, "format is a str"),
    ({"format": "int9"}, "unknown format"),
    ({"bits": 3}, "bits of int4 are 4"),
    ({"shape": []}, "no shape"),
    ({"shape": [8]}, "no shape"),
    ({"shape": [1] * 9}, "no shape"),
    ({"shape": [2**31 - 1] * 3}, "no shape"),
    ({"shape": [8, 0]}, "positive"),
    ({"shape": [8, -1]}, "positive"),
    ({"shape": [8, 2**31]}, "positive"),
    ({"shape": [8, 32.0]}, "positive"),
    ({"shape": [8, True]}, "positive"),
    ({"shape": "8x32"}, "shape is a list"),
    ({"block": [1]}, r"\[rows, columns\]"),
    ({"block": [1, 16, 1]}, r"\[rows, columns\]"),
    ({"block": [0, 16]}, "positive"),
    ({"format": "mxfp4", "scale_dtype": "float8_e8m0fnu", "asymmetric": False}, "groups of mxfp4 have 32"),
    ({"format": "nf4", "block": [8, 32], "scale_dtype": "uint8", "asymmetric": False}, "within a row"),
    ({"transposed": 1}, "transposed is a bool"),
    ({"transposed": None}, "transposed is a bool"),
    ({"asymmetric": "yes"}, "asymmetric is a bool"),
    ({"format": "nf4-single", "block": [1, 16]}, "no zero points"),
    ({"scale_dtype": "float8_e4m3fn"}, "no scales of"),
    ({"scale_dtype": "int64"}, "no scales of"),
    ({"scale_dtype": "nn"}, "no scales of"),
    ({"scale_dtype": "load"}, "no scales of"),
    ({"scale_dtype": ["float16"]}, "scale_dtype is a str"),
    ({"scale_dtype": "int8", "block": [8, 32]}, "groups within a row"),
    ({"format": "int8", "bits": 8, "scale_dtype": "int8"}, "no scales of"),
    ({"activation": {"dtype": "int8"}}, "activation"),
    ({"activation": 3}, "activation"),
]


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_every_way_for_an_entry_to_be_wrong(change: dict[str, Any], words: str) -> None:
    described = GOOD | ({"bits": FORMATS[change["format"]].bits} if change.get("format") in FORMATS else {}) | change
    assert expected("w", GOOD)
    with pytest.raises(ManifestError, match=words) as error:
        expected("w", described)
    assert error.value.where == "w" and error.value.hint


@pytest.mark.parametrize("missing", [key for key in GOOD if key != "bits"])
def test_a_field_that_is_missing(missing: str) -> None:
    with pytest.raises(ManifestError, match=missing):
        expected("w", {key: value for key, value in GOOD.items() if key != missing})


@pytest.mark.parametrize("entry_", [None, [], "int4", 3])
def test_an_entry_that_is_no_object(entry_: Any) -> None:
    with pytest.raises(ManifestError, match="object"):
        expected("w", entry_)


def test_fields_of_later_versions_are_ignored() -> None:
    assert expected("w", GOOD | {"surprise": [1]}) == expected("w", GOOD)


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[2J", "a" * 1001])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(ManifestError, match="no name"):
        promises(new_manifest([], {name: GOOD}))


def test_two_weights_of_which_one_takes_the_others_tensor() -> None:
    with pytest.raises(ManifestError, match="lay claim to w_scale"):
        promises(new_manifest([], {"w": GOOD, "w_scale": GOOD}))


@pytest.mark.parametrize("version", [True, 1.0, "1", 0, 2, None, [1]])
def test_versions_that_are_not_the_number_one(version: Any) -> None:
    with pytest.raises(CheckpointError, match="version"):
        promises(new_manifest([], {}) | {"format_version": version})


def test_configs_give_entries_that_pass() -> None:
    """What users can ask for is what readers accept."""
    for name in FORMATS:
        spec = WeightOnlyConfig(format=name).spec(8, 64)
        assert check_entry(entry(Meta(name, spec.block, 64), (8, 64), spec.scale_dtype, spec.asymmetric)).name == name
    with pytest.raises(ConfigError):
        WeightOnlyConfig(format="int9")
