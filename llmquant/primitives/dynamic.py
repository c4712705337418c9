"""Activations as int8, float8 or block float codes, made for every input. This rule is what every kernel has to follow.

Along a token, `group` neighbours share a scale; the last group may be shorter. All arithmetic is float32:

* int8, symmetric: scale = max|x| / 127, code = round(x / scale) clamped to -127..127, x ~ code * scale;
* int8, asymmetric: low = min(x, 0) and high = max(x, 0) of the group, scale = (high - low) / 255,
  zero point = round(-128 - low / scale) clamped to -128..127, code = round(x / scale) + zero point clamped likewise,
  x ~ (code - zero point) * scale;
* float8 (e4m3fn): scale = max|x| / 448, code = the float8 number nearest to x / scale clamped to -448..448,
  x ~ code * scale. All tokens of an input may share the scale, too: then a token's codes depend on its neighbours.
* MX and NVFP4: the formats of that name, rounded plainly by the rule of `primitives.blockfloat`; the float32 scale of
  NVFP4 is that of a token, or of all tokens.

A static activation has one scale (and zero point) for whatever may come: that of the lowest and highest value which a
calibration run saw, by the same formulas (`static_scale`). Codes are clamped as above, so values beyond them saturate.

Divisions are divisions, not products with an inverse; rounding is half to even. Where the scale is 0 (zeros, or
numbers so small that it underflows) the divisor is 1. A group that holds NaN or infinity, or whose range overflows,
gets the scale NaN with codes and zero point 0: every product with it is NaN, never a number that looks right. Of a
static activation so does a token that holds NaN or infinity, and no other.

Products with int8 codes are sums of integers, scaled afterwards. Products with other codes are those of what the codes
stand for, rounded once to the input's own dtype (`fake_quantize`), with the weights as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmquant.errors import ConfigError
from llmquant.formats import FORMATS, Format
from llmquant.primitives import blockfloat
from llmquant.primitives.blocks import block_counts, from_blocks, to_blocks
from llmquant.primitives.granularity import Granularity, MappingType, PerTensor, PerToken, PerTokenGroup
from llmquant.primitives.lowfloat import round_to_
from llmquant.primitives.minifloat import MINIFLOATS
from llmquant.primitives.spec import QuantSpec

DEFAULT_GROUP = 32
INT8, FLOAT8 = "int8", "float8_e4m3fn"
"""Dtypes of codes, by torch's names. Those of block floats go by the names of their formats."""
ALL_TOKENS = -1
"""The group that is the whole input: one scale for all of its tokens."""
_PREFIXES = {INT8: "a8", FLOAT8: "f8"}
_STATIC_PREFIXES = {INT8: "s8", FLOAT8: "sf8"}
_OPTIONAL = {"scale_rule": str, "static": bool}  # fields that plain JSON names only where they say something
_LARGEST_GROUP = 2**31 - 1  # what native code can count with
_CHUNK_ELEMENTS = 2**16  # whose temporaries stay in a core's cache


def block_floats() -> tuple[str, ...]:
    """The formats whose blocks activations can be quantized to."""
    return tuple(name for name, row in FORMATS.items() if _has_blocks(row))


def _has_blocks(row: Format) -> bool:
    """Whether codes are small floats in groups of one size."""
    return row.fixed_group and row.element in MINIFLOATS


def activation_dtypes() -> tuple[str, ...]:
    """All that activations can be quantized to."""
    return (*_PREFIXES, *block_floats())


def _default_group(dtype: str) -> int:
    """What shares a scale unless it is said: int8 has groups, float8 tokens, NVFP4 one float32 scale an input."""
    if dtype in _PREFIXES:
        return DEFAULT_GROUP if dtype == INT8 else 0
    row = FORMATS[dtype]
    return ALL_TOKENS if row.tensor_scale else row.group_size or 0


@dataclass(frozen=True)
class Activation:
    """How the input of a product is quantized.

    Attributes:
        group: neighbours of a token that share a scale; 0 means the whole token, `ALL_TOKENS` (float8 or static only)
            all of them. MX has groups of 32 only; of NVFP4 it says what shares the float32 scale, 0 or `ALL_TOKENS`.
        asymmetric: whether groups have zero points (int8 only).
        dtype: of the codes, `int8` or `float8_e4m3fn`, or a format of block floats (`mxfp8`, `nvfp4`, ...).
        scale_rule: of MX, how a scale follows from the largest magnitude; `floor` unless it is given.
        static: whether the scale is that of a calibration run, which the weight brings along (`StaticScale`); int8 and
            float8 only, and the group is `ALL_TOKENS` then.

    Raises:
        ConfigError: for another dtype, for a group that is negative or too large to count with, and for zero points,
            a rule or a scale for all tokens where the dtype has none.
    """

    group: int
    asymmetric: bool = False
    dtype: str = INT8
    scale_rule: str = ""
    static: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in activation_dtypes():
            known = " or ".join(activation_dtypes())
            raise ConfigError(f"activations cannot be quantized to {self.dtype!r}", hint=known)
        if self.static:
            self._check_static()
        elif self.dtype == INT8 and self.group == ALL_TOKENS:
            raise ConfigError(f"int8 activations have no scale for all tokens (group {self.group})", hint="PerToken()")
        if not ALL_TOKENS <= self.group <= _LARGEST_GROUP:
            raise ConfigError(f"activations cannot be quantized in groups of {self.group}", hint="for instance 32")
        if self.dtype != INT8 and self.asymmetric:
            raise ConfigError(f"{self.dtype} activations are symmetric only", hint="leave asym out")
        self._check_blocks()

    def _check_static(self) -> None:
        if self.dtype not in _STATIC_PREFIXES:
            raise ConfigError(f"{self.dtype} activations cannot be static", hint=" or ".join(_STATIC_PREFIXES))
        if self.group != ALL_TOKENS:
            raise ConfigError("static activations have one scale for all inputs", hint="PerTensor()")

    def _check_blocks(self) -> None:
        """Fills in the scale rule. Raises where block floats have no such group, or the dtype has no such rule."""
        row, rules = self.blocks, self.blocks.scale_rules if self.blocks else ()
        object.__setattr__(self, "scale_rule", self.scale_rule or "".join(rules[:1]))
        if self.scale_rule and self.scale_rule not in rules:
            known = f"one of {', '.join(rules)}" if rules else "leave it out"
            raise ConfigError(f"{self.dtype} activations have no scale rule {self.scale_rule!r}", hint=known)
        if row is not None and row.tensor_scale and self.group not in (0, ALL_TOKENS):
            raise ConfigError(
                f"{row.name} activations have blocks of {row.group_size} only; what shares their float32 scale is a "
                f"token or the input, not {self.group} neighbours",
                hint="PerToken() or PerTensor()",
            )
        if row is not None and not row.tensor_scale and self.group != row.group_size:
            raise ConfigError(
                f"{row.name} activations have groups of {row.group_size} only", hint=f"PerTokenGroup({row.group_size})"
            )

    @classmethod
    def of(
        cls,
        granularity: Granularity,
        mapping_type: MappingType = MappingType.SYMMETRIC,
        dtype: str = INT8,
        scale_rule: str = "",
        static: bool = False,
    ) -> Activation:
        """The same in the words of a config. Raises `ConfigError` for what activations cannot have."""
        asymmetric = mapping_type is MappingType.ASYMMETRIC
        match granularity:
            case PerToken():
                return cls(0, asymmetric, dtype, scale_rule, static)
            case PerTokenGroup(group_size):
                return cls(group_size, asymmetric, dtype, scale_rule, static)
            case PerTensor():
                return cls(ALL_TOKENS, asymmetric, dtype, scale_rule, static)
        raise ConfigError(
            f"activations cannot be quantized {granularity}",
            hint="PerToken(), PerTokenGroup(group_size), or PerTensor() in float8 and nvfp4",
        )

    @classmethod
    def default(cls, dtype: str, scale_rule: str = "") -> Activation:
        """What the prefix of a scheme means that says no more: `a8`, `f8`, `mxfp8`, `nvfp4`."""
        return cls(_default_group(dtype), dtype=dtype, scale_rule=scale_rule)

    @property
    def blocks(self) -> Format | None:
        """The format of block floats that codes are in; None for int8 and float8."""
        row = FORMATS.get(self.dtype)  # int8 is there, too, as a format of weights
        return row if row is not None and _has_blocks(row) else None

    @property
    def scheme(self) -> str:
        """What goes before the scheme of a weight: `a8`, `a8-token-asym`, `f8-tensor`, `s8`, `sf8`, `mxfp8-even`."""
        if self.static:
            return _STATIC_PREFIXES[self.dtype] + ("-asym" if self.asymmetric else "")
        names = {0: "-token", ALL_TOKENS: "-tensor"}
        group = names.get(self.group, f"-g{self.group}")
        said = "" if self.group == _default_group(self.dtype) else group
        usual = not self.scale_rule or self == Activation.default(self.dtype)
        rule = "" if usual else f"-{self.scale_rule}"
        return _PREFIXES.get(self.dtype, self.dtype) + said + rule + ("-asym" if self.asymmetric else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: the inverse of `from_dict`. `scale_rule` and `static` are named only where they say something."""
        return {key: value for key, value in asdict(self).items() if key not in _OPTIONAL or value}

    @classmethod
    def from_dict(cls, values: Any) -> Activation:
        """Reads what `to_dict` gives. Raises `ConfigError` for anything else."""
        fields = {"dtype": str, "group": int, "asymmetric": bool}
        found = {key: type(value) for key, value in values.items()} if isinstance(values, Mapping) else {}
        wanted = fields | {key: kind for key, kind in _OPTIONAL.items() if key in found}
        if found != wanted or values["dtype"] not in activation_dtypes():
            raise ConfigError(f"cannot read the activation {values!r}", hint=f"for instance {cls(32).to_dict()}")
        return cls(**values)

    def width(self, columns: int) -> int:
        """Elements that share a scale in a token of `columns` elements; at least 1.

        An input with one scale of its own for all of its tokens counts as one token.
        """
        return max(min(self.group if self.group > 0 else columns, columns), 1)

    def tokens(self, shape: torch.Size) -> tuple[int, int]:
        """Tokens in an input of that shape, and the elements of each; all of it is one where all share its scale.

        Tokens in block floats stay apart: their blocks do, whatever shares a second scale.
        """
        one = self.is_joint and self.blocks is None
        return (1, shape.numel()) if one else (shape[:-1].numel(), shape[-1])

    @property
    def is_joint(self) -> bool:
        """Whether the tokens of an input share a scale that is made from all of them."""
        return self.group == ALL_TOKENS and not self.static


class DynamicCodes(NamedTuple):
    """An activation in codes.

    codes: int8 or float8 [..., K]; of block floats uint8, one a byte.
    scale: float32 [..., G], G = ceil(K / group); [1, ..., 1] where all tokens share it. Of block floats in the dtype of
        the format, one a block.
    zero_point: int8 [..., G], or None where codes are symmetric.
    tensor_scale: float32 [..., 1], or [1, ..., 1] where all tokens share it, by which scales are multiplied; or None.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    tensor_scale: Tensor | None = None


class StaticScale(NamedTuple):
    """What a calibration run chose for all inputs of a weight.

    scale: float32, one element of any shape.
    zero_point: int8, likewise, or None where codes are symmetric.
    """

    scale: Tensor
    zero_point: Tensor | None = None


def static_scale(low: Tensor, high: Tensor, activation: Activation) -> StaticScale:
    """Lowest and highest input float32 [...] -> the scales [...] of a static activation, and its zero points."""
    low, high, levels, _ = _range(torch.stack([low, high], -1), activation)
    scale, divisor = _scales(high - low, levels)
    return StaticScale(scale, _zero_point(low / divisor).to(torch.int8) if activation.asymmetric else None)


def quantize_activation(x: Tensor, activation: Activation, static: StaticScale | None = None) -> DynamicCodes:
    """x float [..., K] -> codes, by the rule of this module; `static` only for a static activation."""
    if activation.blocks is not None:
        return _quantize_blocks(x, activation)
    tokens, columns = activation.tokens(x.shape)
    block = (1, activation.width(columns))
    groups = to_blocks(x.reshape(tokens, columns).float(), block)  # [T, G, n], padded with zeros
    low, high, levels, limits = _range(groups, activation)
    scale, divisor = _scales(high - low, levels) if static is None else _given_scales(low, high, static)
    codes = groups / divisor.unsqueeze(-1)
    zero_point = None
    if activation.asymmetric:
        zero_point = _zero_point(low / divisor) if static is None else _given_zero_points(scale, static)
        codes.round_().add_(zero_point.unsqueeze(-1))
    elif activation.dtype == INT8:
        codes.round_()
    codes = from_blocks(codes.clamp_(*limits).nan_to_num_(0.0), tokens, columns, block)
    leading = (1,) * (x.dim() - 1) if activation.is_joint else x.shape[:-1]
    shape = (*leading, scale.shape[-1])
    return DynamicCodes(
        codes.to(getattr(torch, activation.dtype)).reshape(x.shape),
        scale.reshape(shape),
        None if zero_point is None else zero_point.to(torch.int8).reshape(shape),
    )


def dequantize_activation(quantized: DynamicCodes, activation: Activation) -> Tensor:
    """Codes -> what they stand for, float32 [..., K]."""
    if activation.blocks is not None:
        return _dequantize_blocks(quantized, activation)
    shape = quantized.codes.shape
    tokens, columns = activation.tokens(shape)
    block = (1, activation.width(columns))
    scale = quantized.scale.reshape(tokens, block_counts(tokens, columns, block)[1], 1)
    distance = to_blocks(steps(quantized, activation).reshape(tokens, columns), block)
    return from_blocks(distance * scale, tokens, columns, block).reshape(shape)


def fake_quantize(x: Tensor, activation: Activation, static: StaticScale | None = None) -> Tensor:
    """x float [..., K] -> what its codes stand for, rounded to x's dtype."""
    tokens, columns = activation.tokens(x.shape)
    rows = x.reshape(tokens, columns)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    fake = _faker(rows, activation, static)
    # Some tokens at a time, so that what lies between x and the result does not leave the cache.
    step = max(_CHUNK_ELEMENTS // max(columns, 1), 1)
    for start in range(0, tokens, step):
        out[start : start + step] = fake(rows[start : start + step])
    return out.reshape(x.shape)


def _faker(rows: Tensor, activation: Activation, static: StaticScale | None) -> Callable[[Tensor], Tensor]:
    """What rounds some of these rows, [T, K] -> float32 [T, K]."""
    if activation.blocks is None:
        return partial(_fake_quantize, activation=activation, static=static)
    spec, shared = _block_rule(rows, activation)
    return partial(blockfloat.fake_quantize_rows, spec=spec, shared=shared)


def _block_rule(rows: Tensor, activation: Activation) -> tuple[QuantSpec, Tensor | None]:
    """What block floats mean for rows [T, K], and the float32 scale of them all where they share one."""
    assert activation.blocks is not None
    spec = blockfloat.block_spec(activation.blocks, activation.scale_rule, rows.shape[1])
    return spec, blockfloat.tensor_scales(rows, spec, together=True) if activation.is_joint else None


def _quantize_blocks(x: Tensor, activation: Activation) -> DynamicCodes:
    rows = x.reshape(activation.tokens(x.shape))
    codes, scale, tensor_scale = blockfloat.quantize_rows(rows, *_block_rule(rows, activation))
    leading = (1,) * (x.dim() - 1) if activation.is_joint else x.shape[:-1]
    return DynamicCodes(
        codes.reshape(x.shape),
        scale.reshape(*x.shape[:-1], scale.shape[-1]),
        tensor_scale=None if tensor_scale is None else tensor_scale.reshape(*leading, 1),
    )


def _dequantize_blocks(quantized: DynamicCodes, activation: Activation) -> Tensor:
    codes, scale, _, tensor_scale = quantized
    tokens, columns = activation.tokens(codes.shape)
    assert activation.blocks is not None
    rows = blockfloat.BlockCodes(
        codes.reshape(tokens, columns),
        scale.reshape(tokens, scale.shape[-1]),
        None if tensor_scale is None else tensor_scale.reshape(-1, 1),
    )
    spec = blockfloat.block_spec(activation.blocks, activation.scale_rule, columns)
    return blockfloat.dequantize_rows(rows, spec).reshape(codes.shape)


def _fake_quantize(rows: Tensor, activation: Activation, static: StaticScale | None) -> Tensor:
    """rows [T, K] -> float32 [T, K]. Codes of float8 are never made: rounded numbers tell as much."""
    if activation.dtype != FLOAT8:
        return dequantize_activation(quantize_activation(rows, activation, static), activation)
    block = (1, activation.width(rows.shape[1]))
    groups = to_blocks(rows.float(), block)
    low, high, levels, limits = _range(groups, activation)
    scale, divisor = _scales(high, levels) if static is None else _given_scales(low, high, static)
    numbers = round_to_((groups / divisor.unsqueeze(-1)).clamp_(*limits), MINIFLOATS["e4m3fn"])
    return from_blocks(numbers.mul_(scale.unsqueeze(-1)), rows.shape[0], rows.shape[1], block)


def steps(quantized: DynamicCodes, activation: Activation) -> Tensor:
    """Codes less their zero points, float32 [..., K]: integers from -255 to 255, or float8 numbers."""
    codes = quantized.codes.float()
    if quantized.zero_point is None:
        return codes
    columns = codes.shape[-1]
    return codes - quantized.zero_point.float().repeat_interleave(activation.width(columns), -1)[..., :columns]


def _range(groups: Tensor, activation: Activation) -> tuple[Tensor, Tensor, int, tuple[int, int]]:
    """Lowest and highest value of each group [T, G], how many steps lie between them, and the limits of codes."""
    if activation.asymmetric:
        low, high = torch.aminmax(groups, dim=-1)
        return low.clamp(max=0), high.clamp(min=0), 255, (-128, 127)
    high = groups.abs().amax(-1)
    largest = 127 if activation.dtype == INT8 else 448
    return torch.zeros_like(high), high, largest, (-largest, largest)


def _scales(span: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scales [T, G] of groups whose range is `span`, and what their values are divided by."""
    scale = torch.where(span.isfinite(), span / levels, torch.nan)
    return scale, torch.where(scale == 0, 1.0, scale)


def _given_scales(low: Tensor, high: Tensor, static: StaticScale) -> tuple[Tensor, Tensor]:
    """The same where the scale is known, for tokens [T, 1] in that range."""
    scale = torch.where(low.isfinite() & high.isfinite(), static.scale.reshape(1, 1), torch.nan)
    return scale, torch.where(scale == 0, 1.0, scale)


def _given_zero_points(scale: Tensor, static: StaticScale) -> Tensor:
    """Zero points [T, 1] as float32 numbers; 0 for a token without a scale."""
    assert static.zero_point is not None
    return torch.where(scale.isnan(), 0.0, static.zero_point.reshape(1, 1).float())


def _zero_point(low_steps: Tensor) -> Tensor:
    """Zero points [T, G] as float32 numbers, from the lowest value in steps; 0 for a group without a scale."""
    return (-128 - low_steps).round_().clamp_(-128, 127).nan_to_num_(0.0)
