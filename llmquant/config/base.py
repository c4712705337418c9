"""What to do to one weight and to the activations that meet it; its JSON form."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from llmquant.errors import ConfigError
from llmquant.formats import FORMATS, METHODS, SCALE_CODES, Format, get_format
from llmquant.primitives.dynamic import ALL_TOKENS, DEFAULT_GROUP, Activation
from llmquant.primitives.granularity import (
    Granularity,
    MappingType,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
    block_shape,
    granularity_name,
)
from llmquant.primitives.spec import QuantSpec

_OVER_ROWS = ("tensor", "block")

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

        scale_bits: 8 stores scales of groups as signed codes of so many bits under a float32 scale of their row, where
            the format knows that (`scale_dtype` is int8 then); None stores them as floats.

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
    scale_bits: int | None = None

    def __post_init__(self) -> None:
        row = get_format(self.format)
        _set(self, granularity=self.granularity or _default_granularity(row))
        self._check_scale_bits(row)
        _set(self, scale_dtype=self.scale_dtype or _default_scale_dtype(row, self.granularity, self.scale_bits))
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
        codes = (SCALE_CODES[self.scale_bits],) if self.scale_bits else ()
        allowed = codes or row.scale_dtypes or tuple(SCALE_DTYPES.values())
        if self.scale_dtype not in allowed:
            raise ConfigError(
                f"scales of {row.name} cannot be stored as {self.scale_dtype}",
                hint=f"one of {', '.join(map(_dtype_name, allowed))}",
            )
        if self.algorithm not in row.algorithms:
            raise ConfigError(
                f"{row.name} has no algorithm {self.algorithm!r}", hint=f"one of {', '.join(row.algorithms)}"
            )
        if not self._has(self.algorithm):
            raise ConfigError(f"{self.algorithm} needs scales per group or row, not per {shared}")
        if self.scale_rule is not None and self.scale_rule not in row.scale_rules:
            known = ", ".join(row.scale_rules)
            raise ConfigError(
                f"{row.name} has no scale rule {self.scale_rule!r}", hint=f"one of {known}" if known else "leave it out"
            )

    def _check_scale_bits(self, row: Format) -> None:
        if self.scale_bits is None:
            return
        if self.scale_bits not in row.scale_bits:
            known = ", ".join(f"{found.name} ({bits})" for found in FORMATS.values() for bits in found.scale_bits)
            raise ConfigError(
                f"{row.name} has no scales of {self.scale_bits} bits", hint=f"leave scale_bits out; {known} have them"
            )
        if not isinstance(self.granularity, PerGroup):
            assert self.granularity is not None
            shared = granularity_name(self.granularity)
            raise ConfigError(
                f"scales of {self.scale_bits} bits are those of groups, not one per {shared}",
                hint=f"a group size ({row.name}-g32-s{self.scale_bits}), or leave scale_bits out",
            )

    def spec(self, rows: int, columns: int) -> QuantSpec:
        """What this means for a logical [rows, columns] matrix."""
        assert self.granularity is not None and self.scale_dtype is not None
        block = block_shape(self.granularity, rows, columns)
        return QuantSpec(get_format(self.format), block, self.mapping_type, self.scale_dtype, self.scale_rule)

    def with_algorithm(self, algorithm: str) -> QuantConfig:
        """The same with another algorithm, where the format and the granularity have it."""
        return from_dict({**self.to_dict(), "algorithm": algorithm}) if self._has(algorithm) else self

    def _has(self, algorithm: str) -> bool:
        assert self.granularity is not None
        known = algorithm in get_format(self.format).algorithms
        return known and not (METHODS[algorithm].within_rows and granularity_name(self.granularity) in _OVER_ROWS)

    @property
    def scheme(self) -> str:
        """The short name of activation, format, granularity and mapping, with defaults left out."""
        row = get_format(self.format)
        assert self.granularity is not None
        suffix = "-" + _shared_name(self.granularity, "g", "b")
        name = self.format if self.granularity == _default_granularity(row) else self.format + suffix
        activation = f"{self.activation.scheme}-" if self.activation else ""
        name += f"-s{self.scale_bits}" if self.scale_bits else ""
        return activation + name + ("-asym" if self.mapping_type is MappingType.ASYMMETRIC else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: the inverse of `from_dict`. What few configs have is named only where it is there."""
        assert self.granularity is not None and self.algorithm is not None
        return {
            "format": self.format,
            "granularity": _shared_name(self.granularity, "group-", "block-"),
            "mapping_type": self.mapping_type.value,
            "scale_dtype": _dtype_name(self.scale_dtype),
            "algorithm": self.algorithm,
            **({"activation": self.activation.to_dict()} if self.activation else {}),
            **({"scale_rule": self.scale_rule} if self.scale_rule else {}),
            **({"scale_bits": self.scale_bits} if self.scale_bits else {}),
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
        scale_bits: int | None = None,
    ) -> None:
        super().__init__(format, granularity, mapping_type, scale_dtype, algorithm, None, scale_rule, scale_bits)


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
        scale_bits: int | None = None,
    ) -> None:
        super().__init__(format, granularity, mapping_type, scale_dtype, algorithm, activation, scale_rule, scale_bits)


class StaticActivationConfig(QuantConfig):
    """Quantizes a weight, and the input of each product with it by a scale from a calibration run.

    For the arguments see `QuantConfig`; `quantize_` needs the `stats` of `collect_stats` for it.
    """

    def __init__(
        self,
        format: str,
        granularity: Granularity | None = None,
        mapping_type: MappingType = MappingType.SYMMETRIC,
        scale_dtype: torch.dtype | None = None,
        algorithm: str | None = None,
        activation: Activation = Activation(ALL_TOKENS, static=True),  # noqa: B008  (frozen)
        scale_rule: str | None = None,
        scale_bits: int | None = None,
    ) -> None:
        super().__init__(format, granularity, mapping_type, scale_dtype, algorithm, activation, scale_rule, scale_bits)


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
    return config_of(
        None if activation is None else Activation.from_dict(activation),
        format=str(values["format"]),
        granularity=parse_granularity(str(values["granularity"])) if values.get("granularity") else None,
        mapping_type=_parse_mapping(values.get("mapping_type", "symmetric")),
        scale_dtype=_parse_scale_dtype(values.get("scale_dtype")),
        algorithm=values.get("algorithm"),
        scale_rule=values.get("scale_rule"),
        scale_bits=values.get("scale_bits"),
    )


def config_of(activation: Activation | None, **weight: Any) -> QuantConfig:
    """The config whose class says what becomes of activations."""
    if activation is None:
        return WeightOnlyConfig(**weight)
    kind = StaticActivationConfig if activation.static else DynamicActivationConfig
    return kind(**weight, activation=activation)


def unknown_key(key: str, known: list[str], where: str) -> ConfigError:
    """The error for a misspelt key."""
    near = difflib.get_close_matches(str(key), known, n=2)
    return ConfigError(
        f"unknown key {key!r}", where=where, hint=f"did you mean {' or '.join(near)}?" if near else ", ".join(known)
    )


def parse_granularity(text: str) -> Granularity:
    if found := re.fullmatch(r"(?:g|group-)([0-9]+)", text):
        return PerGroup(int(found[1]))
    if found := re.fullmatch(r"(?:b|block-)([0-9]+)(?:x([0-9]+))?", text):
        return PerBlock((int(found[1]), int(found[2] or found[1])))
    if text not in ("row", "tensor"):
        raise ConfigError(f"unknown granularity {text!r}", hint="row, tensor, group-<size> or block-<size>")
    return PerRow() if text == "row" else PerTensor()


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


def _default_scale_dtype(row: Format, granularity: Granularity | None, scale_bits: int | None) -> torch.dtype:
    if scale_bits:
        return SCALE_CODES[scale_bits]
    if row.scale_dtypes:
        return row.scale_dtypes[0]
    return torch.float16 if isinstance(granularity, PerGroup) else torch.float32


def _parse_mapping(text: Any) -> MappingType:
    if text not in [m.value for m in MappingType]:
        raise ConfigError(f"unknown mapping_type {text!r}", hint="symmetric or asymmetric")
    return MappingType(text)


def _parse_scale_dtype(text: Any) -> torch.dtype | None:
    fixed = {_dtype_name(dtype): dtype for row in FORMATS.values() for dtype in row.scale_dtypes}
    known = SCALE_DTYPES | fixed | {_dtype_name(dtype): dtype for dtype in SCALE_CODES.values()}
    if text is not None and text not in known:
        raise ConfigError(f"unknown scale_dtype {text!r}", hint=f"one of {', '.join(known)}")
    return known[text] if text else None


def _dtype_name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
