"""What to do to one weight: typed configs, and the short schemes that stand for them.

Grammar: `none | [<activation>-]<format>[-g<N>|-row|-tensor|-b<N>|-b<R>x<C>][-sym|-asym]`, a format being a row of the
table (`int4`, `float8`, `float8-e5m2`, ...). What stands before it is said of activations, what follows of the weight.
Without a suffix the format's default holds; `-b<N>` is short for blocks of N rows and N columns.

An activation is `a8[-g<N>|-token][-sym|-asym]` or `f8[-g<N>|-token|-tensor]`; without one, activations stay as they
are. `a8` quantizes the input of a product to int8 codes, anew each time: symmetric in groups of 32 of a token unless it
says otherwise (`a8-int4-g32`, `a8-token-asym-int8`). `f8` quantizes it to float8 (e4m3) numbers, with a scale a token
unless it says otherwise (`f8-float8`, `f8-tensor-float8-tensor`, `f8-g128-float8-b128`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from llmquant.errors import ConfigError
from llmquant.formats import FORMATS, Format, get_format
from llmquant.primitives.dynamic import DEFAULT_GROUP, FLOAT8, INT8, Activation
from llmquant.primitives.granularity import (
    Granularity,
    MappingType,
    PerAxis,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
    PerTokenGroup,
    block_shape,
    granularity_name,
)
from llmquant.primitives.spec import QuantSpec

_DEFAULT_TOKENS: dict[str, Granularity] = {INT8: PerTokenGroup(DEFAULT_GROUP), FLOAT8: PerToken()}
SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, eq=False)
class QuantConfig:
    """What is to be done to a weight and to the activations that meet it. Reaches any row of the table of formats.

    Args:
        format: a name in the table, for instance `int5`.
        granularity: what shares a scale, said of the logical [out, in] matrix; None is the format's default.
        mapping_type: symmetric, or asymmetric with an integer zero point a block.
        scale_dtype: how scales are stored; None means float16 for groups, float32 per row or tensor, and what
            the format says where it fixes it.
        algorithm: how codes and scales are chosen; None is the format's default (`search` for integers).
        activation: how inputs of products are quantized; None leaves them as they are.
        scale_rule: how a scale follows from the largest magnitude of its block, where the format knows several rules.

    Raises:
        ConfigError: where the format cannot have what is asked.
    """

    format: str
    granularity: Granularity | None = None
    mapping_type: MappingType = MappingType.SYMMETRIC
    scale_dtype: torch.dtype | None = None
    algorithm: str | None = None
    activation: Activation | None = None
    scale_rule: str | None = None

    def __post_init__(self) -> None:
        row = get_format(self.format)
        _set(self, granularity=self.granularity or _default_granularity(row))
        _set(self, scale_dtype=self.scale_dtype or _default_scale_dtype(row, self.granularity))
        _set(self, algorithm=self.algorithm or row.algorithms[0])
        _set(self, scale_rule=self.scale_rule or (row.scale_rules[0] if row.scale_rules else None))
        self._check(row)

    def _check(self, row: Format) -> None:
        assert self.granularity is not None
        shared = granularity_name(self.granularity)
        if shared not in row.granularities:
            raise ConfigError(f"{row.name} has no scales per {shared}", hint=f"one of {', '.join(row.granularities)}")
        if row.fixed_group and self.granularity != _default_granularity(row):
            raise ConfigError(f"{row.name} has groups of {row.group_size} only", hint="leave granularity out")
        if self.mapping_type is MappingType.ASYMMETRIC and not row.asymmetric:
            raise ConfigError(f"{row.name} is symmetric only", hint="leave mapping_type out")
        allowed = row.scale_dtypes or tuple(SCALE_DTYPES.values())
        if self.scale_dtype not in allowed:
            raise ConfigError(
                f"scales of {row.name} cannot be stored as {self.scale_dtype}",
                hint=f"one of {', '.join(map(_dtype_name, allowed))}",
            )
        if self.algorithm not in row.algorithms:
            raise ConfigError(
                f"{row.name} has no algorithm {self.algorithm!r}", hint=f"one of {', '.join(row.algorithms)}"
            )
        if self.scale_rule is not None and self.scale_rule not in row.scale_rules:
            known = ", ".join(row.scale_rules)
            raise ConfigError(
                f"{row.name} has no scale rule {self.scale_rule!r}", hint=f"one of {known}" if known else "leave it out"
            )

    def spec(self, rows: int, columns: int) -> QuantSpec:
        """What this means for a logical [rows, columns] matrix."""
        assert self.granularity is not None and self.scale_dtype is not None
        block = block_shape(self.granularity, rows, columns)
        return QuantSpec(get_format(self.format), block, self.mapping_type, self.scale_dtype, self.scale_rule)

    def with_algorithm(self, algorithm: str) -> QuantConfig:
        """The same with another algorithm, where the format has it."""
        known = algorithm in get_format(self.format).algorithms
        return from_dict({**self.to_dict(), "algorithm": algorithm}) if known else self

    @property
    def scheme(self) -> str:
        """The short name of activation, format, granularity and mapping, with defaults left out."""
        row = get_format(self.format)
        assert self.granularity is not None
        suffix = "-" + _shared_name(self.granularity, "g", "b")
        name = self.format if self.granularity == _default_granularity(row) else self.format + suffix
        activation = f"{self.activation.scheme}-" if self.activation else ""
        return activation + name + ("-asym" if self.mapping_type is MappingType.ASYMMETRIC else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: the inverse of `from_dict`. Activation and scale rule are named only where there is one."""
        assert self.granularity is not None and self.algorithm is not None
        return {
            "format": self.format,
            "granularity": _shared_name(self.granularity, "group-", "block-"),
            "mapping_type": self.mapping_type.value,
            "scale_dtype": _dtype_name(self.scale_dtype),
            "algorithm": self.algorithm,
            **({"activation": self.activation.to_dict()} if self.activation else {}),
            **({"scale_rule": self.scale_rule} if self.scale_rule else {}),
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QuantConfig) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.scheme, self.scale_dtype, self.algorithm))

    def __str__(self) -> str:
        return self.scheme


class WeightOnlyConfig(QuantConfig):
    """Quantizes a weight, leaves activations as they are. For the arguments see `QuantConfig`."""

    def __init__(
        self,
        format: str,
        granularity: Granularity | None = None,
        mapping_type: MappingType = MappingType.SYMMETRIC,
        scale_dtype: torch.dtype | None = None,
        algorithm: str | None = None,
        scale_rule: str | None = None,
    ) -> None:
        super().__init__(format, granularity, mapping_type, scale_dtype, algorithm, scale_rule=scale_rule)


class DynamicActivationConfig(QuantConfig):
    """Quantizes a weight, and anew the input of each product with it. For the arguments see `QuantConfig`."""

    def __init__(
        self,
        format: str,
        granularity: Granularity | None = None,
        mapping_type: MappingType = MappingType.SYMMETRIC,
        scale_dtype: torch.dtype | None = None,
        algorithm: str | None = None,
        activation: Activation = Activation(DEFAULT_GROUP),  # noqa: B008  (frozen)
        scale_rule: str | None = None,
    ) -> None:
        super().__init__(format, granularity, mapping_type, scale_dtype, algorithm, activation, scale_rule)


class Int4WeightOnlyConfig(WeightOnlyConfig):
    """Four bits, groupwise."""

    def __init__(
        self,
        group_size: int = 128,
        mapping_type: MappingType = MappingType.SYMMETRIC,
        scale_dtype: torch.dtype | None = None,
        algorithm: str = "search",
    ) -> None:
        super().__init__("int4", PerGroup(group_size), mapping_type, scale_dtype, algorithm)


class IntxWeightOnlyConfig(WeightOnlyConfig):
    """One to eight bits: `weight_dtype` is `torch.int1` ... `torch.int8`."""

    def __init__(
        self,
        weight_dtype: torch.dtype = torch.int8,
        granularity: Granularity = PerAxis(0),  # noqa: B008  (frozen)
        mapping_type: MappingType = MappingType.SYMMETRIC,
        scale_dtype: torch.dtype | None = None,
        algorithm: str = "search",
    ) -> None:
        name = _format_of(weight_dtype, "affine")
        super().__init__(name, granularity, mapping_type, scale_dtype, algorithm)


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
        if not get_format(format).scale_rules:
            known = ", ".join(name for name, row in FORMATS.items() if row.scale_rules)
            raise ConfigError(f"{format} is no MX format", hint=f"one of {known}")
        super().__init__(format, algorithm=_search_or_not(search), scale_rule=scale_rule)


class NVFP4WeightOnlyConfig(WeightOnlyConfig):
    """NVFP4, a prototype: fp4 in blocks of 16 with e4m3 scales, and one float32 scale a matrix.

    Args:
        search: whether the block scales around that of the rule are tried, too.
    """

    def __init__(self, search: bool = True) -> None:
        super().__init__("nvfp4", algorithm=_search_or_not(search))


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


def parse_scheme(scheme: str) -> QuantConfig | None:
    """A scheme as a config; None for `none`. Raises `ConfigError` that says which part is wrong."""
    if scheme == "none":
        return None
    activation, stem = _split_activation(scheme)
    row, rest = _split_stem(stem)
    found = re.fullmatch(r"(?:-(g[0-9]+|row|tensor|b[0-9]+(?:x[0-9]+)?))?(?:-(sym|asym))?", rest)
    if not found:
        raise ConfigError(
            f"cannot read {rest!r} in scheme {scheme!r}",
            hint=f"{row.name} may be followed by -g<size>, -row, -tensor or -b<size>, then -sym or -asym",
        )
    shared, mapping = found.groups()
    return _config(
        activation,
        format=row.name,
        granularity=_parse_granularity(shared) if shared else None,
        mapping_type=_suffix_mapping(mapping),
    )


def from_dict(values: Mapping[str, Any]) -> QuantConfig:
    """A mapping of config fields as a config; `group_size: n` is short for `granularity: group-n`.

    Raises `ConfigError` for unknown fields and values, with near names.
    """
    values = dict(values)
    known = [f.name for f in fields(QuantConfig)]
    if "format" not in values:
        raise ConfigError("a config needs a 'format'", where=str(values), hint=f"one of {', '.join(FORMATS)}")
    group_size = values.pop("group_size", None)
    if group_size is not None and values.get("granularity"):
        raise ConfigError("group_size and granularity say the same thing twice", where=str(values), hint="keep one")
    if group_size is not None:
        values["granularity"] = f"group-{group_size}"
    for key in values:
        if key not in known:
            raise unknown_key(key, [*known, "group_size"], f"config {values}")
    activation = values.get("activation")
    return _config(
        None if activation is None else Activation.from_dict(activation),
        format=str(values["format"]),
        granularity=_parse_granularity(str(values["granularity"])) if values.get("granularity") else None,
        mapping_type=_parse_mapping(values.get("mapping_type", "symmetric")),
        scale_dtype=_parse_scale_dtype(values.get("scale_dtype")),
        algorithm=values.get("algorithm"),
        scale_rule=values.get("scale_rule"),
    )


def parse_config(value: str | Mapping[str, Any] | None) -> QuantConfig | None:
    """A scheme, or a mapping of config fields, or None."""
    if value is None:
        return None
    return parse_scheme(value) if isinstance(value, str) else from_dict(value)


def unknown_key(key: str, known: list[str], where: str) -> ConfigError:
    """The error for a misspelt key."""
    near = difflib.get_close_matches(str(key), known, n=2)
    return ConfigError(
        f"unknown key {key!r}", where=where, hint=f"did you mean {' or '.join(near)}?" if near else ", ".join(known)
    )


def _config(activation: Activation | None, **weight: Any) -> QuantConfig:
    return (
        WeightOnlyConfig(**weight) if activation is None else DynamicActivationConfig(**weight, activation=activation)
    )


def _set(config: QuantConfig, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(config, name, value)


def _default_granularity(row: Format) -> Granularity:
    return PerGroup(row.group_size) if row.group_size else PerRow()


def _shared_name(granularity: Granularity, group: str, block: str) -> str:
    """A granularity of weights in words: `row`, `tensor`, `<group>32`, `<block>128`, `<block>64x128`."""
    match granularity:
        case PerGroup(size):
            return f"{group}{size}"
        case PerBlock((rows, columns)):
            return f"{block}{rows}" if rows == columns else f"{block}{rows}x{columns}"
    return granularity_name(granularity)


def _default_scale_dtype(row: Format, granularity: Granularity | None) -> torch.dtype:
    if row.scale_dtypes:
        return row.scale_dtypes[0]
    return torch.float16 if isinstance(granularity, PerGroup) else torch.float32


def _format_of(dtype: torch.dtype, storage: str) -> str:
    rows = {row.dtype: row.name for row in FORMATS.values() if row.storage == storage and row.dtype}
    if dtype not in rows:
        raise ConfigError(f"no format of weight_dtype {dtype}", hint="one of " + ", ".join(map(str, rows)))
    return rows[dtype]


def _split_activation(scheme: str) -> tuple[Activation | None, str]:
    """What a scheme says of activations, and the rest, which begins with the format."""
    if not scheme.startswith(("a8", "f8")):
        return None, scheme
    found = re.fullmatch(r"(a8|f8)(?:-(g[0-9]+|token|tensor))?(?:-(sym|asym))?-(.*)", scheme)
    if not found:
        raise ConfigError(
            f"cannot read the activations of scheme {scheme!r}",
            hint="a8 may be followed by -g<size> or -token, then -sym or -asym, and a format: a8-int4-g32; "
            "f8 by -g<size>, -token or -tensor, and a format: f8-float8",
        )
    prefix, shared, mapping, stem = found.groups()
    dtype = INT8 if prefix == "a8" else FLOAT8
    return Activation.of(_token_granularity(shared, dtype), _suffix_mapping(mapping), dtype), stem


def _token_granularity(shared: str | None, dtype: str) -> Granularity:
    named = {"token": PerToken(), "tensor": PerTensor(), None: _DEFAULT_TOKENS[dtype]}
    return named[shared] if shared in named else PerTokenGroup(int(str(shared)[1:]))


def _of_tokens(granularity: Granularity) -> Granularity:
    """What shares a scale of activations, where weights share it so."""
    match granularity:
        case PerAxis(0):
            return PerToken()
        case PerGroup(size) | PerBlock((_, size)):
            return PerTokenGroup(size)
    return granularity


def _suffix_mapping(suffix: str | None) -> MappingType:
    return MappingType.ASYMMETRIC if suffix == "asym" else MappingType.SYMMETRIC


def _split_stem(scheme: str) -> tuple[Format, str]:
    """The longest format name that starts the scheme, and the rest."""
    for name in sorted(FORMATS, key=len, reverse=True):
        if scheme == name or scheme.startswith(name + "-"):
            return FORMATS[name], scheme[len(name) :]
    near = difflib.get_close_matches(scheme, ["none", *FORMATS], n=3) or ["none", *FORMATS]
    raise ConfigError(f"unknown scheme {scheme!r}", hint="start with one of " + ", ".join(near))


def _parse_granularity(text: str) -> Granularity:
    if found := re.fullmatch(r"(?:g|group-)([0-9]+)", text):
        return PerGroup(int(found[1]))
    if found := re.fullmatch(r"(?:b|block-)([0-9]+)(?:x([0-9]+))?", text):
        return PerBlock((int(found[1]), int(found[2] or found[1])))
    if text not in ("row", "tensor"):
        raise ConfigError(f"unknown granularity {text!r}", hint="row, tensor, group-<size> or block-<size>")
    return PerRow() if text == "row" else PerTensor()


def _parse_mapping(text: Any) -> MappingType:
    if text not in [m.value for m in MappingType]:
        raise ConfigError(f"unknown mapping_type {text!r}", hint="symmetric or asymmetric")
    return MappingType(text)


def _parse_scale_dtype(text: Any) -> torch.dtype | None:
    fixed = {_dtype_name(dtype): dtype for row in FORMATS.values() for dtype in row.scale_dtypes}
    known = SCALE_DTYPES | fixed
    if text is not None and text not in known:
        raise ConfigError(f"unknown scale_dtype {text!r}", hint=f"one of {', '.join(known)}")
    return known[text] if text else None


def _dtype_name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _search_or_not(search: bool) -> str:
    return "search" if search else "rtn"
