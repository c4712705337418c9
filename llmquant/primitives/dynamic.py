"""Activations as int8 codes, made anew for every input. This rule is what every kernel has to reproduce.

Along a token, `group` neighbours share a scale; the last group may be shorter. All arithmetic is float32:

* symmetric: scale = max|x| / 127, code = round(x / scale) clamped to -127..127, x ~ code * scale;
* asymmetric: low = min(x, 0) and high = max(x, 0) of the group, scale = (high - low) / 255,
  zero point = round(-128 - low / scale) clamped to -128..127, code = round(x / scale) + zero point clamped likewise,
  x ~ (code - zero point) * scale.

Divisions are divisions, not products with an inverse; rounding is half to even. Where the scale is 0 (zeros, or
numbers so small that it underflows) the divisor is 1. A group that holds NaN or infinity, or whose range overflows,
gets the scale NaN with codes and zero point 0: every product with it is NaN, never a number that looks right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmquant.errors import ConfigError
from llmquant.primitives.blocks import block_counts, from_blocks, to_blocks
from llmquant.primitives.granularity import Granularity, MappingType, PerToken, PerTokenGroup

DEFAULT_GROUP = 32
_DTYPE = "int8"
_LARGEST_GROUP = 2**31 - 1  # what native code can count with


@dataclass(frozen=True)
class Activation:
    """How the input of a product is quantized.

    Attributes:
        group: neighbours of a token that share a scale; 0 means the whole token.
        asymmetric: whether groups have zero points.

    Raises:
        ConfigError: for a group that is negative or too large to count with.
    """

    group: int
    asymmetric: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.group <= _LARGEST_GROUP:
            raise ConfigError(f"activations cannot be quantized in groups of {self.group}", hint="for instance 32")

    @classmethod
    def of(cls, granularity: Granularity, mapping_type: MappingType = MappingType.SYMMETRIC) -> Activation:
        """The same in the words of a config. Raises `ConfigError` for what activations cannot have."""
        if not isinstance(granularity, PerToken | PerTokenGroup):
            raise ConfigError(
                f"activations cannot be quantized {granularity}", hint="PerToken() or PerTokenGroup(group_size)"
            )
        group = granularity.group_size if isinstance(granularity, PerTokenGroup) else 0
        return cls(group, mapping_type is MappingType.ASYMMETRIC)

    @property
    def scheme(self) -> str:
        """What goes before the scheme of a weight: `a8`, `a8-g64`, `a8-token`, `a8-token-asym`."""
        group = f"-g{self.group}" if self.group else "-token"
        return "a8" + ("" if self.group == DEFAULT_GROUP else group) + ("-asym" if self.asymmetric else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: the inverse of `from_dict`."""
        return {"dtype": _DTYPE, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Any) -> Activation:
        """Reads what `to_dict` gives. Raises `ConfigError` for anything else."""
        fields = {"dtype": str, "group": int, "asymmetric": bool}
        known = (
            isinstance(values, Mapping)
            and {key: type(value) for key, value in values.items()} == fields
            and values["dtype"] == _DTYPE
        )
        if not known:
            raise ConfigError(f"cannot read the activation {values!r}", hint=f"for instance {cls(32).to_dict()}")
        return cls(values["group"], values["asymmetric"])

    def width(self, columns: int) -> int:
        """Elements that share a scale in a token of `columns` elements; at least 1."""
        return max(min(self.group or columns, columns), 1)


class DynamicCodes(NamedTuple):
    """An activation in codes.

    codes: int8 [..., K].
    scale: float32 [..., G], G = ceil(K / group).
    zero_point: int8 [..., G], or None where codes are symmetric.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None


def quantize_activation(x: Tensor, activation: Activation) -> DynamicCodes:
    """x float [..., K] -> codes, by the rule of this module."""
    leading, columns = x.shape[:-1], x.shape[-1]
    block = (1, activation.width(columns))
    groups = to_blocks(x.reshape(leading.numel(), columns).float(), block)  # [T, G, n], padded with zeros
    low, high, levels, limits = _range(groups, activation)
    span = high - low
    scale = torch.where(span.isfinite(), span / levels, torch.nan)
    divisor = torch.where(scale == 0, 1.0, scale)
    zero_point = _zero_point(low / divisor, activation)
    codes = (groups / divisor.unsqueeze(-1)).round_().add_(zero_point.unsqueeze(-1)).clamp_(*limits)
    flat = from_blocks(codes.nan_to_num_(0.0), leading.numel(), columns, block)
    return DynamicCodes(
        flat.to(torch.int8).reshape(x.shape),
        scale.reshape(*leading, scale.shape[-1]),
        zero_point.to(torch.int8).reshape(*leading, scale.shape[-1]) if activation.asymmetric else None,
    )


def dequantize_activation(quantized: DynamicCodes, activation: Activation) -> Tensor:
    """Codes -> what they stand for, float32 [..., K]."""
    shape = quantized.codes.shape
    rows, columns = shape[:-1].numel(), shape[-1]
    block = (1, activation.width(columns))
    scale = quantized.scale.reshape(rows, block_counts(rows, columns, block)[1], 1)
    distance = to_blocks(steps(quantized, activation).reshape(rows, columns), block)
    return from_blocks(distance * scale, rows, columns, block).reshape(shape)


def steps(quantized: DynamicCodes, activation: Activation) -> Tensor:
    """Codes less their zero points, float32 [..., K]: integers from -255 to 255."""
    codes = quantized.codes.float()
    if quantized.zero_point is None:
        return codes
    columns = codes.shape[-1]
    return codes - quantized.zero_point.float().repeat_interleave(activation.width(columns), -1)[..., :columns]


def _range(groups: Tensor, activation: Activation) -> tuple[Tensor, Tensor, float, tuple[int, int]]:
    """Lowest and highest value of each group [T, G], how many steps lie between them, and the limits of codes."""
    if activation.asymmetric:
        low, high = torch.aminmax(groups, dim=-1)
        return low.clamp(max=0), high.clamp(min=0), 255, (-128, 127)
    high = groups.abs().amax(-1)
    return torch.zeros_like(high), high, 127, (-127, 127)


def _zero_point(low_steps: Tensor, activation: Activation) -> Tensor:
    """Zero points [T, G] as float32 numbers, from the lowest value in steps; 0 for a group without a scale."""
    if not activation.asymmetric:
        return torch.zeros_like(low_steps)
    return (-128 - low_steps).round_().clamp_(-128, 127).nan_to_num_(0.0)
