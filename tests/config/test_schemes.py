"""Configs and the short schemes that stand for them: one meaning, two spellings, and exact errors."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmquant.config.base import (
    SCALE_DTYPES,
    DynamicActivationConfig,
    QuantConfig,
    StaticActivationConfig,
    WeightOnlyConfig,
    from_dict,
)
from llmquant.config.named import (
    Float8DynamicActivationFloat8SemiSparseWeightConfig,
    Float8DynamicActivationFloat8WeightConfig,
    Float8DynamicActivationInt4WeightConfig,
    Float8StaticActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt4WeightConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MXDynamicActivationMXWeightConfig,
    MXWeightOnlyConfig,
    NF4WeightOnlyConfig,
    NVFP4DynamicActivationNVFP4WeightConfig,
    NVFP4WeightOnlyConfig,
)
from llmquant.config.schemes import parse_config, parse_scheme
from llmquant.errors import ConfigError, LlmQuantError
from llmquant.formats import FORMATS, METHODS
from llmquant.primitives.dynamic import ALL_TOKENS, FLOAT8, Activation
from llmquant.primitives.granularity import (
    MappingType,
    PerAxis,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
    PerTokenGroup,
)

ASYM = MappingType.ASYMMETRIC
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
S8, S8_ASYM = Activation(ALL_TOKENS, static=True), Activation(ALL_TOKENS, True, static=True)
SF8 = Activation(ALL_TOKENS, dtype=FLOAT8, static=True)


@st.composite
def configs(draw: st.DrawFn) -> QuantConfig:
    row = FORMATS[draw(st.sampled_from(sorted(FORMATS)))]
    sizes = st.just(row.group_size) if row.fixed_group else st.integers(1, 4096)
    granularity = {
        "group": PerGroup(draw(sizes)),
        "row": PerRow(),
        "tensor": PerTensor(),
        "block": PerBlock((draw(st.integers(1, 4096)), draw(st.sampled_from([1, 128])))),
    }
    inputs = st.sampled_from([0, 1, 32, 48, 4096])
    int8 = st.builds(Activation, inputs, st.booleans())
    float8 = st.builds(Activation, st.one_of(inputs, st.just(ALL_TOKENS)), st.just(False), st.just(FLOAT8))
    static = st.sampled_from([S8, S8_ASYM, SF8])
    mx = st.builds(
        Activation,
        *(st.just(32), st.just(False), st.sampled_from([name for name, row in FORMATS.items() if row.scale_rules])),
        st.sampled_from(["", "floor", "ceil", "even", "rceil"]),
    )
    nvfp4 = st.builds(Activation, st.sampled_from([0, ALL_TOKENS]), st.just(False), st.just("nvfp4"))
    shared = draw(st.sampled_from(row.granularities))
    algorithms = [name for name in row.algorithms if shared in ("group", "row") or not METHODS[name].within_rows]
    return QuantConfig(
        row.name,
        granularity[shared],
        draw(st.sampled_from(list(MappingType) if row.asymmetric else [MappingType.SYMMETRIC])),
        draw(st.sampled_from([None, *(row.scale_dtypes or SCALE_DTYPES.values())])),
        draw(st.sampled_from([None, *algorithms])),
        draw(st.one_of(st.none(), int8, float8, static, mx, nvfp4)),
    )


def a8(activation: Activation, *weight: Any) -> DynamicActivationConfig:
    return DynamicActivationConfig(*weight, activation=activation)


def s8(activation: Activation, *weight: Any) -> StaticActivationConfig:
    return StaticActivationConfig(*weight, activation=activation)


# --- the grammar ------------------------------------------------------------------------------------------

GRAMMAR = [
    ("none", None),
    ("int4", WeightOnlyConfig("int4", PerGroup(128))),
    ("int4-g64", WeightOnlyConfig("int4", PerGroup(64))),
    ("int4-g128", WeightOnlyConfig("int4", PerGroup(128))),
    ("int4-row", WeightOnlyConfig("int4", PerRow())),
    ("int4-tensor", WeightOnlyConfig("int4", PerTensor())),
    ("int4-sym", WeightOnlyConfig("int4")),
    ("int4-asym", WeightOnlyConfig("int4", None, ASYM)),
    ("int4-g32-asym", WeightOnlyConfig("int4", PerGroup(32), ASYM)),
    ("int4-row-sym", WeightOnlyConfig("int4", PerRow())),
    ("int3-g7", WeightOnlyConfig("int3", PerGroup(7))),
    ("int3-g7-s8-asym", WeightOnlyConfig("int3", PerGroup(7), ASYM, scale_bits=8)),
    ("int8", WeightOnlyConfig("int8", PerRow())),
    ("int8-tensor-asym", WeightOnlyConfig("int8", PerTensor(), ASYM)),
    ("int1-g32", WeightOnlyConfig("int1", PerGroup(32))),
    ("float8", WeightOnlyConfig("float8", PerRow())),
    ("float8-tensor", WeightOnlyConfig("float8", PerTensor())),
    ("float8-e5m2", WeightOnlyConfig("float8-e5m2", PerRow())),
    ("float8-e5m2-tensor-sym", WeightOnlyConfig("float8-e5m2", PerTensor())),
    ("a8-int4", a8(Activation(32), "int4")),
    ("a8-int4-g32", a8(Activation(32), "int4", PerGroup(32))),
    ("a8-sym-int4-g32", a8(Activation(32), "int4", PerGroup(32))),
    ("a8-g32-sym-int4-g32", a8(Activation(32), "int4", PerGroup(32))),
    ("a8-int3-g64-asym", a8(Activation(32), "int3", PerGroup(64), ASYM)),
    ("a8-int8-row", a8(Activation(32), "int8")),
    ("a8-g64-int4-g32", a8(Activation(64), "int4", PerGroup(32))),
    ("a8-asym-int4-g32", a8(Activation(32, True), "int4", PerGroup(32))),
    ("a8-asym-int4-g32-asym", a8(Activation(32, True), "int4", PerGroup(32), ASYM)),
    ("a8-token-int8", a8(Activation(0), "int8")),
    ("a8-token-asym-int8-tensor", a8(Activation(0, True), "int8", PerTensor())),
    ("float8-b128", WeightOnlyConfig("float8", PerBlock((128, 128)))),
    ("float8-e5m2-b1x64-sym", WeightOnlyConfig("float8-e5m2", PerBlock((1, 64)))),
    ("f8-float8", a8(Activation(0, dtype=FLOAT8), "float8")),
    ("f8-token-float8", a8(Activation(0, dtype=FLOAT8), "float8")),
    ("f8-token-sym-float8-row", a8(Activation(0, dtype=FLOAT8), "float8")),
    ("f8-tensor-float8-tensor", a8(Activation(ALL_TOKENS, dtype=FLOAT8), "float8", PerTensor())),
    ("f8-g128-float8-b128", a8(Activation(128, dtype=FLOAT8), "float8", PerBlock((128, 128)))),
    ("f8-int4-g32-asym", a8(Activation(0, dtype=FLOAT8), "int4", PerGroup(32), ASYM)),
    ("a8-g1-asym-float8-e5m2", a8(Activation(1, True), "float8-e5m2")),
    ("s8-int8", s8(S8, "int8")),
    ("s8-sym-int8-tensor", s8(S8, "int8", PerTensor())),
    ("s8-tensor-int8", s8(S8, "int8")),
    ("s8-asym-int8-row", s8(S8_ASYM, "int8")),
    ("s8-asym-int4-g32-asym", s8(S8_ASYM, "int4", PerGroup(32), ASYM)),
    ("sf8-float8", s8(SF8, "float8")),
    ("sf8-float8-tensor", s8(SF8, "float8", PerTensor())),
    ("mxfp8-mxfp8", a8(Activation(32, dtype="mxfp8"), "mxfp8")),
    ("mxfp8-floor-mxfp8", a8(Activation(32, dtype="mxfp8", scale_rule="floor"), "mxfp8")),
    ("mxfp8-rceil-mxfp8", a8(Activation(32, dtype="mxfp8", scale_rule="rceil"), "mxfp8")),
    ("mxfp8-e5m2", WeightOnlyConfig("mxfp8-e5m2")),
    ("mxfp8-e5m2-mxfp8", a8(Activation(32, dtype="mxfp8-e5m2"), "mxfp8")),
    ("mxfp8-mxfp8-e5m2", a8(Activation(32, dtype="mxfp8"), "mxfp8-e5m2")),
    ("mxfp6-e2m3-even-mxfp6-e3m2", a8(Activation(32, False, "mxfp6-e2m3", "even"), "mxfp6-e3m2")),
    ("mxfp8-int4-g32-asym", a8(Activation(32, dtype="mxfp8"), "int4", PerGroup(32), ASYM)),
    ("nvfp4-nvfp4", a8(Activation(ALL_TOKENS, dtype="nvfp4"), "nvfp4")),
    ("nvfp4-tensor-nvfp4", a8(Activation(ALL_TOKENS, dtype="nvfp4"), "nvfp4")),
    ("nvfp4-token-nvfp4", a8(Activation(0, dtype="nvfp4"), "nvfp4")),
    ("nvfp4-token-float8-e5m2-tensor", a8(Activation(0, dtype="nvfp4"), "float8-e5m2", PerTensor())),
]


@pytest.mark.parametrize(("scheme", "config"), GRAMMAR, ids=[scheme for scheme, _ in GRAMMAR])
def test_schemes_and_what_they_mean(scheme: str, config: QuantConfig | None) -> None:
    assert parse_scheme(scheme) == config == parse_config(scheme)
    assert type(parse_scheme(scheme)) is type(config)
    if config is not None:
        assert parse_scheme(config.scheme) == config and str(config) == config.scheme


@pytest.mark.parametrize("name", FORMATS)
def test_the_name_of_a_format_is_a_scheme_with_its_defaults(name: str) -> None:
    row = FORMATS[name]
    config = parse_scheme(name)
    assert config == WeightOnlyConfig(name) and config.scheme == name
    assert config.granularity == (PerGroup(row.group_size) if row.group_size else PerRow())
    assert config.algorithm == row.algorithms[0] and config.mapping_type is MappingType.SYMMETRIC


@given(configs())
def test_a_scheme_says_format_granularity_mapping_and_activation(config: QuantConfig) -> None:
    found = parse_scheme(config.scheme)
    for name in ("format", "granularity", "mapping_type", "activation"):
        assert getattr(found, name) == getattr(config, name)
    assert parse_scheme(found.scheme) == found and found.scheme == config.scheme


@given(configs())
def test_json_round_trip(config: QuantConfig) -> None:
    plain = json.loads(json.dumps(config.to_dict()))
    assert ("activation" in plain) == (config.activation is not None)
    assert ("scale_rule" in plain) == bool(FORMATS[config.format].scale_rules)
    found = from_dict(plain)
    assert found == config and hash(found) == hash(config) and found.to_dict() == plain
    assert parse_config(plain) == config
    assert pickle.loads(pickle.dumps(config)) == config


@given(configs(), configs())
def test_equal_means_the_same_in_every_field(a: QuantConfig, b: QuantConfig) -> None:
    same = all(
        getattr(a, name) == getattr(b, name)
        for name in ("format", "granularity", "mapping_type", "scale_dtype", "algorithm", "activation", "scale_rule")
    )
    assert (a == b) == same
    assert a != "int4" and a != None  # noqa: E711


@given(configs(), st.integers(1, 500), st.integers(1, 5000))
def test_spec(config: QuantConfig, rows: int, columns: int) -> None:
    spec = config.spec(rows, columns)
    assert spec.format is FORMATS[config.format] and spec.scale_dtype == config.scale_dtype
    assert spec.scale_rule == config.scale_rule
    expected = {"PerAxis": (1, columns), "PerTensor": (rows, columns)}
    if isinstance(config.granularity, PerGroup):
        assert spec.block == (1, min(config.granularity.group_size, columns))
    elif isinstance(config.granularity, PerBlock):
        tall, wide = config.granularity.block_size
        assert spec.block == (min(tall, rows), min(wide, columns))
    else:
        assert spec.block == expected[type(config.granularity).__name__]


def test_scales_are_float16_for_groups_and_float32_elsewhere() -> None:
    for row in (row for row in FORMATS.values() if not row.scale_dtypes):
        for shared, granularity in (("group", PerGroup(32)), ("row", PerRow()), ("tensor", PerTensor())):
            if shared in row.granularities:
                expected = torch.float16 if shared == "group" else torch.float32
                assert WeightOnlyConfig(row.name, granularity).scale_dtype == expected


def test_what_search_and_scale_rule_mean() -> None:
    found = MXWeightOnlyConfig("mxfp8", scale_rule="rceil", search=False)
    assert (found.algorithm, found.scale_rule, found.scale_dtype) == ("rtn", "rceil", torch.float8_e8m0fnu)
    assert from_dict({"format": "mxfp8", "scale_rule": "rceil", "algorithm": "rtn"}) == found != parse_scheme("mxfp8")
    assert found.with_algorithm("search").scale_rule == "rceil"
    assert NVFP4WeightOnlyConfig(search=False).algorithm == NF4WeightOnlyConfig(search=False).algorithm == "rtn"
    assert NVFP4DynamicActivationNVFP4WeightConfig(search=False).algorithm == "rtn"
    both = MXDynamicActivationMXWeightConfig("mxfp6-e3m2", scale_rule="even", search=False)
    assert (both.algorithm, both.scale_rule, both.activation.scale_rule) == ("rtn", "even", "even")
    assert both.scheme == "mxfp6-e3m2-even-mxfp6-e3m2" and from_dict(both.to_dict()) == both
    assert parse_scheme("mxfp4").scale_rule == "floor" and parse_scheme("nvfp4").scale_rule is None


# --- named configs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "scheme"),
    [
        (Int4WeightOnlyConfig(), "int4"),
        (Int4WeightOnlyConfig(32), "int4-g32"),
        (Int4WeightOnlyConfig(group_size=64, mapping_type=ASYM), "int4-g64-asym"),
        (Int8WeightOnlyConfig(), "int8"),
        (Int8WeightOnlyConfig(PerTensor(), ASYM), "int8-tensor-asym"),
        (IntxWeightOnlyConfig(), "int8"),
        (IntxWeightOnlyConfig(torch.int3, PerGroup(32)), "int3-g32"),
        (IntxWeightOnlyConfig(torch.int1, PerAxis(0), ASYM), "int1-asym"),
        (IntxWeightOnlyConfig(torch.int4), "int4-row"),
        (Float8WeightOnlyConfig(), "float8"),
        (Float8WeightOnlyConfig(E5M2), "float8-e5m2"),
        (Float8WeightOnlyConfig(E4M3, PerTensor()), "float8-tensor"),
        (MXWeightOnlyConfig(), "mxfp4"),
        (MXWeightOnlyConfig("mxfp6-e3m2"), "mxfp6-e3m2"),
        (MXWeightOnlyConfig(format="mxfp8-e5m2", scale_rule="floor", search=True), "mxfp8-e5m2"),
        (NF4WeightOnlyConfig(), "nf4"),
        (NF4WeightOnlyConfig(double_quant=True, group_size=128), "nf4-g128"),
        (NF4WeightOnlyConfig(double_quant=False), "nf4-single"),
        (NVFP4WeightOnlyConfig(), "nvfp4"),
        (NVFP4WeightOnlyConfig(search=True), "nvfp4"),
        (DynamicActivationConfig("int5"), "a8-int5"),
        (Int8DynamicActivationInt4WeightConfig(), "a8-int4-g32"),
        (Int8DynamicActivationInt4WeightConfig(64, PerToken()), "a8-token-int4-g64"),
        (Int8DynamicActivationInt4WeightConfig(act_mapping_type=ASYM), "a8-asym-int4-g32"),
        (Int8DynamicActivationInt4WeightConfig(mapping_type=ASYM), "a8-int4-g32-asym"),
        (Int8DynamicActivationInt8WeightConfig(), "a8-token-int8"),
        (Int8DynamicActivationInt8WeightConfig(act_mapping_type=ASYM), "a8-token-asym-int8"),
        (Int8DynamicActivationInt8WeightConfig(PerGroup(32), PerTokenGroup(32), ASYM, ASYM), "a8-asym-int8-g32-asym"),
        (StaticActivationConfig("int5"), "s8-int5"),
        (Int8StaticActivationInt8WeightConfig(), "s8-int8"),
        (Int8StaticActivationInt8WeightConfig(PerTensor(), act_mapping_type=ASYM), "s8-asym-int8-tensor"),
        (Int8StaticActivationInt8WeightConfig(PerGroup(32), PerTensor(), mapping_type=ASYM), "s8-int8-g32-asym"),
        (Float8StaticActivationFloat8WeightConfig(), "sf8-float8"),
        (Float8StaticActivationFloat8WeightConfig(PerTensor(), E5M2), "sf8-float8-e5m2-tensor"),
        (Float8DynamicActivationFloat8WeightConfig(), "f8-float8"),
        (Float8DynamicActivationFloat8WeightConfig(PerRow(), E5M2), "f8-float8-e5m2"),
        (Float8DynamicActivationFloat8WeightConfig(PerTensor()), "f8-tensor-float8-tensor"),
        (Float8DynamicActivationFloat8WeightConfig(PerBlock((128, 128))), "f8-g128-float8-b128"),
        (Float8DynamicActivationFloat8WeightConfig((PerToken(), PerTensor())), "f8-float8-tensor"),
        (Float8DynamicActivationFloat8WeightConfig((PerTokenGroup(64), PerBlock((32, 64)))), "f8-g64-float8-b32x64"),
        (Float8DynamicActivationFloat8SemiSparseWeightConfig(), "f8-float8-2x4"),
        (Float8DynamicActivationFloat8SemiSparseWeightConfig(PerTokenGroup(64)), "f8-g64-float8-2x4"),
        (MXDynamicActivationMXWeightConfig(), "mxfp8-mxfp8"),
        (MXDynamicActivationMXWeightConfig("mxfp4"), "mxfp4-mxfp4"),
        (MXDynamicActivationMXWeightConfig("mxfp4", act_format="mxfp8-e5m2"), "mxfp8-e5m2-mxfp4"),
        (NVFP4DynamicActivationNVFP4WeightConfig(), "nvfp4-nvfp4"),
        (NVFP4DynamicActivationNVFP4WeightConfig(act_granularity=PerToken()), "nvfp4-token-nvfp4"),
        (Float8DynamicActivationInt4WeightConfig(), "f8-int4"),
        (Float8DynamicActivationInt4WeightConfig(32, PerTensor(), ASYM), "f8-tensor-int4-g32-asym"),
        (Int8DynamicActivationIntxWeightConfig(), "a8-token-asym-int8-g32"),
        (
            Int8DynamicActivationIntxWeightConfig(
                torch.int3, PerRow(), ASYM, None, MappingType.SYMMETRIC, PerTokenGroup(64)
            ),
            "a8-g64-int3-asym",
        ),
    ],
    ids=str,
)
def test_named_configs_are_typed_fronts(named: QuantConfig, scheme: str) -> None:
    plain = parse_scheme(scheme)
    assert named == plain and plain == named and hash(named) == hash(plain)
    assert named.scheme == scheme and from_dict(named.to_dict()) == named
    assert pickle.loads(pickle.dumps(named)) == named


def test_named_configs_pass_on_what_schemes_cannot_say() -> None:
    config = Int4WeightOnlyConfig(64, scale_dtype=torch.bfloat16, algorithm="rtn")
    assert config == WeightOnlyConfig("int4", PerGroup(64), scale_dtype=torch.bfloat16, algorithm="rtn")
    assert config != parse_scheme("int4-g64") and config.scheme == "int4-g64"
    assert IntxWeightOnlyConfig(torch.int5, algorithm="rtn").algorithm == "rtn"
    a8 = Int8DynamicActivationInt4WeightConfig(scale_dtype=torch.float32, algorithm="rtn")
    assert (a8.scale_dtype, a8.algorithm, a8.activation) == (torch.float32, "rtn", Activation(32))
    a8 = Int8DynamicActivationIntxWeightConfig(weight_scale_dtype=torch.bfloat16, algorithm="rtn")
    assert (a8.scale_dtype, a8.algorithm, a8.activation) == (torch.bfloat16, "rtn", Activation(0, True))
    assert Int8WeightOnlyConfig(PerGroup(32), scale_dtype=torch.float16).scale_dtype == torch.float16


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_integer_dtype_of_torch_has_its_format(bits: int) -> None:
    assert IntxWeightOnlyConfig(getattr(torch, f"int{bits}")).format == f"int{bits}"


def test_configs_do_not_change() -> None:
    config = parse_scheme("int4")
    with pytest.raises(AttributeError):
        config.format = "int8"


def test_another_algorithm() -> None:
    assert parse_scheme("int4-g64").with_algorithm("rtn") == Int4WeightOnlyConfig(64, algorithm="rtn")
    a8 = parse_scheme("a8-g64-int4").with_algorithm("rtn")
    assert (a8.algorithm, a8.scheme) == ("rtn", "a8-g64-int4")
    float8 = parse_scheme("float8")
    assert float8.with_algorithm("search") == float8


# --- mappings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "scheme"),
    [
        ({"format": "int4"}, "int4"),
        ({"format": "int4", "group_size": 64}, "int4-g64"),
        ({"format": "int4", "granularity": "group-64"}, "int4-g64"),
        ({"format": "int4", "granularity": "row", "mapping_type": "asymmetric"}, "int4-row-asym"),
        ({"format": "float8", "granularity": "tensor", "scale_dtype": "float32"}, "float8-tensor"),
        ({"format": "int4", "activation": {"dtype": "int8", "group": 0, "asymmetric": True}}, "a8-token-asym-int4"),
        (
            {"format": "int4", "activation": {"dtype": "float8_e4m3fn", "group": -1, "asymmetric": False}},
            "f8-tensor-int4",
        ),
        (
            {"format": "int8", "activation": {"dtype": "int8", "group": -1, "asymmetric": True, "static": True}},
            "s8-asym-int8",
        ),
        ({"format": "float8", "granularity": "block-128"}, "float8-b128"),
        ({"format": "float8", "granularity": "block-64x128"}, "float8-b64x128"),
        ({"format": "int4", "activation": None}, "int4"),
        ({"format": "int4", "algorithm": "search", "scale_dtype": None, "granularity": None}, "int4"),
    ],
    ids=str,
)
def test_mappings(values: dict[str, Any], scheme: str) -> None:
    before = dict(values)
    assert from_dict(values) == parse_scheme(scheme)
    assert values == before


def test_none_is_none() -> None:
    assert parse_config(None) is None and parse_config("none") is None


# --- errors -----------------------------------------------------------------------------------------------

BAD_SCHEMES = {
    "": "unknown scheme",
    "s8": "s8 by -sym or -asym",
    "s8-token-int8": "one scale for all inputs",
    "s8-g32-int8": "one scale for all inputs",
    "sf8-asym-float8": "symmetric only",
    "sf8-float9": "float8",
    "itn4": "int4",
    "int9": "int8",
    "int": "int",
    "float16": "float8",
    "int4-": "'-'",
    "int4_g64": "int4",
    "int4-g": "-g<size>",
    "int4-g0": "at least 1",
    "int4-g-64": "g-64",
    "int4-64": "-64",
    "int4-g64-row": "-row",
    "int4-asym-g64": "-asym-g64",
    "int4-g64-asymm": "asymm",
    "INT4": "int4",
    " int4": "int4",
    "int4 ": "int4",
    "none-g64": "none",
    "float8-asym": "symmetric only",
    "float8-g64": "no scales per group",
    "float8-e4m3": "-e4m3",
    "a8": "a8-int4-g32",
    "a8-": "int4",
    "a8int4": "a8-int4-g32",
    "a8-none": "'none'",
    "a8-g0-int4": "at least 1",
    "a8-g4294967296-int4": "4294967296",
    "a8-row-int4": "row-int4",
    "a8-asym-g64-int4": "g64-int4",
    "a8-token-g64-int4": "g64-int4",
    "a8-a8-int4": "a8-int4",
    "a8-int4-token": "-token",
    "a8-tensor-int4": "all tokens",
    "f8": "f8-float8",
    "f8float8": "f8-float8",
    "f8-row-float8": "row-float8",
    "f8-asym-float8": "symmetric only",
    "f8-g0-float8": "at least 1",
    "float8-b": "-b<size>",
    "float8-b0": "at least 1",
    "float8-b128x": "-b<size>",
    "int4-b128": "no scales per block",
    "int4-a8": "-a8",
    "A8-int4": "int4",
    "mxfp8-": "said of activations",
    "mxfp8-itn4": "said of activations",
    "mxfp8-rceil": "-rceil",
    "mxfp8-none": "-none",
    "mxfp8-token-mxfp8": "groups of 32 only",
    "mxfp8-g32-mxfp8": "-g32-mxfp8",
    "mxfp8-asym-mxfp8": "-asym-mxfp8",
    "mxfp8-mxfp8-mxfp8": "'-mxfp8'",
    "mxfp8-a8-int4": "-a8-int4",
    "nvfp4-tensor": "no scales per tensor",
    "nvfp4-floor-nvfp4": "no scale rule",
    "a8-mxfp8-mxfp8": "'-mxfp8'",
}


@pytest.mark.parametrize("scheme", BAD_SCHEMES)
def test_bad_schemes_say_what_is_wrong(scheme: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_scheme(scheme)
    assert BAD_SCHEMES[scheme] in str(caught.value)
    assert isinstance(caught.value, LlmQuantError) and isinstance(caught.value, ValueError)


@given(st.text(max_size=20))
def test_no_text_does_anything_but_parse_or_raise_a_config_error(text: str) -> None:
    try:
        config = parse_scheme(text)
    except ConfigError:
        return
    assert config is None or parse_scheme(config.scheme) == config


@given(
    st.sampled_from(["", "a8", "a8-", "f8", "f8-", "mxfp8-", "mxfp8-rceil-", "nvfp4-token-"]),
    st.one_of(st.just(""), st.text("-g0123456789tokenaysm", max_size=12)),
    st.sampled_from(sorted(FORMATS)),
    st.text("-g0123456789rowtensaymi", max_size=12),
)
def test_no_affix_does_anything_but_parse_or_raise_a_config_error(a8: str, infix: str, name: str, suffix: str) -> None:
    try:
        config = parse_scheme(a8 + infix + name + suffix)
    except ConfigError:
        return
    assert config is not None and parse_scheme(config.scheme) == config


BAD_CONFIGS: dict[str, tuple[Any, str]] = {
    "unknown format": (lambda: WeightOnlyConfig("int9"), "int8"),
    "no scales per column": (lambda: WeightOnlyConfig("int4", PerAxis(1)), "axis=1"),
    "per token": (lambda: WeightOnlyConfig("int4", PerToken()), "PerToken"),
    "groups of float8": (lambda: WeightOnlyConfig("float8", PerGroup(32)), "row, tensor"),
    "asymmetric float8": (lambda: WeightOnlyConfig("float8", mapping_type=ASYM), "symmetric only"),
    "scales of another dtype": (lambda: WeightOnlyConfig("int4", scale_dtype=torch.float64), "float64"),
    "scales of integers": (lambda: WeightOnlyConfig("int4", scale_dtype=torch.int8), "float16"),
    "unknown algorithm": (lambda: WeightOnlyConfig("int4", algorithm="gptqq"), "rtn"),
    "no search for float8": (lambda: WeightOnlyConfig("float8", algorithm="search"), "rtn"),
    "groups of another size": (lambda: WeightOnlyConfig("nvfp4", PerGroup(32)), "16"),
    "rows of mxfp4": (lambda: WeightOnlyConfig("mxfp4", PerRow()), "group"),
    "other scales of mxfp4": (lambda: WeightOnlyConfig("mxfp4", scale_dtype=torch.float16), "float8_e8m0fnu"),
    "float scales quantized twice": (lambda: NF4WeightOnlyConfig(scale_dtype=torch.float16), "uint8"),
    "whole scales of nf4-single": (lambda: WeightOnlyConfig("nf4-single", scale_dtype=torch.uint8), "float16"),
    "2:4 per tensor": (lambda: WeightOnlyConfig("float8-2x4", PerTensor()), "row"),
    "rows of nf4": (lambda: WeightOnlyConfig("nf4", PerRow()), "group"),
    "small scales of int4": (lambda: WeightOnlyConfig("int4", scale_dtype=E4M3), "float16"),
    "unknown rule": (lambda: MXWeightOnlyConfig(scale_rule="round"), "rceil"),
    "a rule where there is one only": (lambda: WeightOnlyConfig("nvfp4", scale_rule="floor"), "leave it out"),
    "no MX format": (lambda: MXWeightOnlyConfig("nvfp4"), "mxfp8"),
    "no MX format of activations": (lambda: MXDynamicActivationMXWeightConfig("mxfp8", "float8"), "mxfp6-e2m3"),
    "unknown rule on both sides": (lambda: MXDynamicActivationMXWeightConfig(scale_rule="round"), "rceil"),
    "nvfp4 activations in groups": (
        lambda: NVFP4DynamicActivationNVFP4WeightConfig(act_granularity=PerTokenGroup(16)),
        "PerToken() or PerTensor()",
    ),
    "no integer": (lambda: IntxWeightOnlyConfig(torch.float32), "torch.int4"),
    "no float8": (lambda: Float8WeightOnlyConfig(torch.int8), "float8_e4m3fn"),
    "activations per row": (lambda: Int8DynamicActivationInt4WeightConfig(32, PerRow()), "PerToken"),
    "activations of another dtype": (
        lambda: from_dict({"format": "int4", "activation": {"dtype": "int4", "group": 32, "asymmetric": False}}),
        "'dtype': 'int8'",
    ),
    "activations in short": (lambda: from_dict({"format": "int4", "activation": "a8"}), "'group': 32"),
    "empty group of a token": (lambda: Int8DynamicActivationInt4WeightConfig(32, PerTokenGroup(0)), "at least 1"),
    "float8 activations with zero points": (
        lambda: DynamicActivationConfig("int4", activation=Activation(0, True, FLOAT8)),
        "symmetric only",
    ),
    "float8 in groups": (lambda: Float8DynamicActivationFloat8WeightConfig(PerGroup(32)), "row, tensor, block"),
    "float8 weights in integers": (lambda: Float8DynamicActivationFloat8WeightConfig(PerRow(), torch.int8), "e4m3fn"),
    "int8 for all tokens": (
        lambda: Int8DynamicActivationInt8WeightConfig(act_granularity=PerTensor()),
        "all tokens",
    ),
    "empty block": (lambda: PerBlock((0, 128)), "at least 1"),
    "empty group": (lambda: Int4WeightOnlyConfig(0), "at least 1"),
    "no format": (lambda: from_dict({"group_size": 64}), "'format'"),
    "misspelt field": (lambda: from_dict({"format": "int4", "groupsize": 64}), "group_size"),
    "misspelt mapping": (lambda: from_dict({"format": "int4", "mapping_type": "asym"}), "asymmetric"),
    "misspelt granularity": (lambda: from_dict({"format": "int4", "granularity": "rows"}), "row"),
    "misspelt scale": (lambda: from_dict({"format": "int4", "scale_dtype": "fp16"}), "float16"),
    "group of no size": (lambda: from_dict({"format": "int4", "group_size": "big"}), "group-big"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configs_say_what_is_wrong(name: str) -> None:
    call, text = BAD_CONFIGS[name]
    with pytest.raises(ConfigError) as caught:
        call()
    assert text in str(caught.value)
