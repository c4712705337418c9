"""Configs by the names the field knows: typed fronts of the config classes of `config.base`."""

from __future__ import annotations

import torch

from llmquant.config.base import DynamicActivationConfig, StaticActivationConfig, WeightOnlyConfig
from llmquant.errors import ConfigError
from llmquant.formats import FORMATS, get_format
from llmquant.primitives.dynamic import DEFAULT_GROUP, FLOAT8, Activation
from llmquant.primitives.granularity import (
    Granularity,
    MappingType,
    PerAxis,
    PerBlock,
    PerGroup,
    PerTensor,
    PerToken,
    PerTokenGroup,
)


class Int4WeightOnlyConfig(WeightOnlyConfig):
    """Four bits, groupwise; with `scale_bits=8` the scales of groups are codes of one byte."""

    def __init__(
        self,
        group_size: int = 128,
        mapping_type: MappingType = MappingType.SYMMETRIC,
        scale_dtype: torch.dtype | None = None,
        algorithm: str = "search",
        scale_bits: int | None = None,
    ) -> None:
        super().__init__("int4", PerGroup(group_size), mapping_type, scale_dtype, algorithm, scale_bits=scale_bits)


class IntxWeightOnlyConfig(WeightOnlyConfig):
    """One to eight bits: `weight_dtype` is `torch.int1` ... `torch.int8`.

    Two to six bits in groups take `scale_bits=8`: the scales of groups are then codes of one byte.
    """

    def __init__(
        self,
        weight_dtype: torch.dtype = torch.int8,
        granularity: Granularity = PerAxis(0),  # noqa: B008  (frozen)
        mapping_type: MappingType = MappingType.SYMMETRIC,
        scale_dtype: torch.dtype | None = None,
        algorithm: str = "search",
        scale_bits: int | None = None,
    ) -> None:
        name = _format_of(weight_dtype, "affine")
        super().__init__(name, granularity, mapping_type, scale_dtype, algorithm, scale_bits=scale_bits)


class Int8WeightOnlyConfig(WeightOnlyConfig):
    """Eight bits, one scale a row."""

    def __init__(
        self,
        granularity: Granularity = PerAxis(0),  # noqa: B008  (frozen)
        mapping_type: MappingType = MappingType.SYMMETRIC,
        scale_dtype: torch.dtype | None = torch.float32,
    ) -> None:
        super().__init__("int8", granularity, mapping_type, scale_dtype)


class Float8WeightOnlyConfig(WeightOnlyConfig):
    """float8 numbers: `weight_dtype` is `torch.float8_e4m3fn` or `torch.float8_e5m2`."""

    def __init__(
        self,
        weight_dtype: torch.dtype = torch.float8_e4m3fn,
        granularity: Granularity = PerAxis(0),  # noqa: B008  (frozen)
    ) -> None:
        super().__init__(_format_of(weight_dtype, "scaled"), granularity)


class MXWeightOnlyConfig(WeightOnlyConfig):
    """Microscaling, a prototype: small floats in blocks of 32 whose scale is a power of two.

    Args:
        format: `mxfp4`, `mxfp6-e2m3`, `mxfp6-e3m2`, `mxfp8` (e4m3) or `mxfp8-e5m2`.
        scale_rule: `floor` (that of the OCP specification), `ceil`, `even` or `rceil`.
        search: whether the scales next to that of the rule are tried, too.
    """

    def __init__(self, format: str = "mxfp4", scale_rule: str = "floor", search: bool = True) -> None:
        super().__init__(_mx(format), algorithm=_search_or_not(search), scale_rule=scale_rule)


class NVFP4WeightOnlyConfig(WeightOnlyConfig):
    """NVFP4, a prototype: fp4 in blocks of 16 with e4m3 scales, and one float32 scale a matrix.

    Args:
        search: whether the block scales around that of the rule are tried, too.
    """

    def __init__(self, search: bool = True) -> None:
        super().__init__("nvfp4", algorithm=_search_or_not(search))


class NF4WeightOnlyConfig(WeightOnlyConfig):
    """NF4 (QLoRA): the sixteen values of NormalFloat, groupwise.

    Args:
        double_quant: whether scales are codes of eight bits under a float32 scale of the row; else they are floats.
        group_size: neighbours along a row that share a scale.
        scale_dtype: of the scales without double quantization, float16 by default.
        search: whether scales around the largest magnitude of a group are tried, too.
    """

    def __init__(
        self,
        double_quant: bool = True,
        group_size: int = 64,
        scale_dtype: torch.dtype | None = None,
        search: bool = True,
    ) -> None:
        name = "nf4" if double_quant else "nf4-single"
        super().__init__(name, PerGroup(group_size), scale_dtype=scale_dtype, algorithm=_search_or_not(search))


class Int8DynamicActivationInt4WeightConfig(DynamicActivationConfig):
    """Activations in eight bits, weights in four, groupwise."""

    def __init__(
        self,
        group_size: int = 32,
        act_granularity: Granularity = PerTokenGroup(DEFAULT_GROUP),  # noqa: B008  (frozen)
        act_mapping_type: MappingType = MappingType.SYMMETRIC,
        mapping_type: MappingType = MappingType.SYMMETRIC,
        scale_dtype: torch.dtype | None = None,
        algorithm: str = "search",
    ) -> None:
        activation = Activation.of(act_granularity, act_mapping_type)
        super().__init__("int4", PerGroup(group_size), mapping_type, scale_dtype, algorithm, activation)


class Int8DynamicActivationIntxWeightConfig(DynamicActivationConfig):
    """Activations in eight bits, weights in one to eight: `weight_dtype` is `torch.int1` ... `torch.int8`."""

    def __init__(
        self,
        weight_dtype: torch.dtype = torch.int8,
        weight_granularity: Granularity = PerGroup(32),  # noqa: B008  (frozen)
        weight_mapping_type: MappingType = MappingType.SYMMETRIC,
        weight_scale_dtype: torch.dtype | None = None,
        act_mapping_type: MappingType = MappingType.ASYMMETRIC,
        act_granularity: Granularity = PerToken(),  # noqa: B008  (frozen)
        algorithm: str = "search",
    ) -> None:
        name, activation = _format_of(weight_dtype, "affine"), Activation.of(act_granularity, act_mapping_type)
        super().__init__(name, weight_granularity, weight_mapping_type, weight_scale_dtype, algorithm, activation)


class Int8DynamicActivationInt8WeightConfig(DynamicActivationConfig):
    """Activations and weights in eight bits: a scale a token, and a scale a row."""

    def __init__(
        self,
        granularity: Granularity = PerAxis(0),  # noqa: B008  (frozen)
        act_granularity: Granularity = PerToken(),  # noqa: B008  (frozen)
        act_mapping_type: MappingType = MappingType.SYMMETRIC,
        mapping_type: MappingType = MappingType.SYMMETRIC,
        scale_dtype: torch.dtype | None = None,
        algorithm: str = "search",
    ) -> None:
        activation = Activation.of(act_granularity, act_mapping_type)
        super().__init__("int8", granularity, mapping_type, scale_dtype, algorithm, activation)


class Float8DynamicActivationFloat8WeightConfig(DynamicActivationConfig):
    """Activations and weights as float8 numbers; activations are `torch.float8_e4m3fn`.

    `granularity` says what shares a scale on both sides: `PerRow()` a token and a row, `PerTensor()` all tokens and the
    whole weight, `PerBlock((r, c))` c neighbours of a token and blocks of r x c weights. A pair says it of activations
    (`PerToken()`, `PerTokenGroup(n)`, `PerTensor()`) and weights apart.
    """

    def __init__(
        self,
        granularity: Granularity | tuple[Granularity, Granularity] = PerAxis(0),  # noqa: B008  (frozen)
        weight_dtype: torch.dtype = torch.float8_e4m3fn,
        scale_dtype: torch.dtype | None = None,
    ) -> None:
        tokens, weight = granularity if isinstance(granularity, tuple) else (_of_tokens(granularity), granularity)
        name, activation = _format_of(weight_dtype, "scaled"), Activation.of(tokens, dtype=FLOAT8)
        super().__init__(name, weight, scale_dtype=scale_dtype, activation=activation)


class Float8DynamicActivationFloat8SemiSparseWeightConfig(DynamicActivationConfig):
    """Activations and weights as float8 numbers, and two of four neighbours along a row of the weight dropped (2:4).

    A prototype: those of least magnitude go, whatever they mean to the model; training afterwards is not here yet.
    """

    def __init__(
        self,
        act_granularity: Granularity = PerToken(),  # noqa: B008  (frozen)
        scale_dtype: torch.dtype | None = None,
    ) -> None:
        activation = Activation.of(act_granularity, dtype=FLOAT8)
        super().__init__("float8-2x4", scale_dtype=scale_dtype, activation=activation)


class Float8DynamicActivationInt4WeightConfig(DynamicActivationConfig):
    """Activations as float8 numbers, weights in four bits, groupwise."""

    def __init__(
        self,
        group_size: int = 128,
        act_granularity: Granularity = PerToken(),  # noqa: B008  (frozen)
        mapping_type: MappingType = MappingType.SYMMETRIC,
        scale_dtype: torch.dtype | None = None,
        algorithm: str = "search",
    ) -> None:
        activation = Activation.of(act_granularity, dtype=FLOAT8)
        super().__init__("int4", PerGroup(group_size), mapping_type, scale_dtype, algorithm, activation)


class Int8StaticActivationInt8WeightConfig(StaticActivationConfig):
    """Activations and weights in eight bits: one scale for all inputs, from a calibration run, and a scale a row.

    `granularity` is that of the weight, for instance `PerRow()` or `PerTensor()`; `act_granularity` can only be
    `PerTensor()`.
    """

    def __init__(
        self,
        granularity: Granularity = PerAxis(0),  # noqa: B008  (frozen)
        act_granularity: Granularity = PerTensor(),  # noqa: B008  (frozen)
        act_mapping_type: MappingType = MappingType.SYMMETRIC,
        mapping_type: MappingType = MappingType.SYMMETRIC,
        scale_dtype: torch.dtype | None = None,
        algorithm: str = "search",
    ) -> None:
        activation = Activation.of(act_granularity, act_mapping_type, static=True)
        super().__init__("int8", granularity, mapping_type, scale_dtype, algorithm, activation)


class Float8StaticActivationFloat8WeightConfig(StaticActivationConfig):
    """Activations and weights as float8 numbers: one scale for all inputs, from a calibration run.

    `granularity` is that of the weight, for instance `PerRow()` or `PerTensor()`; activations are
    `torch.float8_e4m3fn`.
    """

    def __init__(
        self,
        granularity: Granularity = PerAxis(0),  # noqa: B008  (frozen)
        weight_dtype: torch.dtype = torch.float8_e4m3fn,
        scale_dtype: torch.dtype | None = None,
    ) -> None:
        name, activation = _format_of(weight_dtype, "scaled"), Activation.of(PerTensor(), dtype=FLOAT8, static=True)
        super().__init__(name, granularity, scale_dtype=scale_dtype, activation=activation)


class MXDynamicActivationMXWeightConfig(DynamicActivationConfig):
    """Microscaling on both sides, a prototype: activations are rounded to MX blocks of 32 anew for every input.

    Args:
        format: of weights: `mxfp8` (e4m3), `mxfp8-e5m2`, `mxfp6-e2m3`, `mxfp6-e3m2` or `mxfp4`.
        act_format: of activations; None is that of the weights.
        scale_rule: of both sides: `floor` (that of the OCP specification), `ceil`, `even`, or `rceil` (as in torchao).
        search: whether the scales of weights next to that of the rule are tried, too. Those of activations never are.
    """

    def __init__(
        self, format: str = "mxfp8", act_format: str | None = None, scale_rule: str = "floor", search: bool = True
    ) -> None:
        activation = Activation.default(_mx(act_format or format), scale_rule)
        super().__init__(_mx(format), algorithm=_search_or_not(search), activation=activation, scale_rule=scale_rule)


class NVFP4DynamicActivationNVFP4WeightConfig(DynamicActivationConfig):
    """NVFP4 on both sides, a prototype: activations are rounded to e2m1 blocks of 16 anew for every input.

    Args:
        search: whether the block scales of weights around that of the rule are tried, too.
        act_granularity: what shares the float32 scale of activations: `PerTensor()`, as in torchao, all tokens of an
            input, so that a token's result depends on its neighbours; `PerToken()` a token.
    """

    def __init__(self, search: bool = True, act_granularity: Granularity = PerTensor()) -> None:  # noqa: B008  (frozen)
        activation = Activation.of(act_granularity, dtype="nvfp4")
        super().__init__("nvfp4", algorithm=_search_or_not(search), activation=activation)


def _format_of(dtype: torch.dtype, storage: str) -> str:
    rows = {row.dtype: row.name for row in FORMATS.values() if row.storage == storage and row.dtype}
    if dtype not in rows:
        raise ConfigError(f"no format of weight_dtype {dtype}", hint="one of " + ", ".join(map(str, rows)))
    return rows[dtype]


def _of_tokens(granularity: Granularity) -> Granularity:
    """What shares a scale of activations, where weights share it so."""
    match granularity:
        case PerAxis(0):
            return PerToken()
        case PerGroup(size) | PerBlock((_, size)):
            return PerTokenGroup(size)
    return granularity


def _mx(name: str) -> str:
    """The name of an MX format, or a `ConfigError`."""
    if not get_format(name).scale_rules:
        known = ", ".join(name for name, row in FORMATS.items() if row.scale_rules)
        raise ConfigError(f"{name} is no MX format", hint=f"one of {known}")
    return name


def _search_or_not(search: bool) -> str:
    return "search" if search else "rtn"
