"""One table of cases: every format x every way to share a scale x mapping, and an independent reader of packed weights.

The tables are built from `FORMATS`: a new row of it is tested without an edit here, as long as its storage is known
to `VALUES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from llmquant.config.base import WeightOnlyConfig
from llmquant.config.schemes import parse_scheme
from llmquant.formats import FORMATS, Format
from llmquant.primitives.stats import InputStats
from llmquant.quantize import quantize_weight
from llmquant.tensor import QuantizedTensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Whole groups, a tail group, odd lengths whose rows do not fill their last byte, one element, one long row.
SHAPES = ((4, 64), (7, 70), (3, 33), (1, 1), (1, 257))


@dataclass(frozen=True)
class Case:
    """A format with one granularity and mapping."""

    scheme: str

    @property
    def config(self) -> WeightOnlyConfig:
        config = parse_scheme(self.scheme)
        assert config is not None
        return config

    @property
    def format(self) -> Format:
        return FORMATS[self.config.format]

    @property
    def row_scale(self) -> bool:
        """Whether rows have a float32 scale outside those of their blocks."""
        assert self.config.scale_dtype is not None
        return self.format.has_row_scale(self.config.scale_dtype)

    @property
    def asymmetric(self) -> bool:
        return self.scheme.endswith("-asym")

    def quantize(self, weight: Tensor, transposed: bool = False) -> QuantizedTensor:
        return quantize_weight(weight, self.config, input_stats(weight), transposed=transposed)

    def __str__(self) -> str:
        return self.scheme


def _suffix(row: Format, shared: str) -> str:
    if shared == "block":
        return "-b3x32"
    return f"-g{row.group_size if row.fixed_group else 32}" if shared == "group" else f"-{shared}"


def _cases(row: Format) -> list[Case]:
    mappings = ("", "-asym") if row.asymmetric else ("",)
    shared = [_suffix(row, g) for g in row.granularities] + [f"-g32-s{bits}" for bits in row.scale_bits]
    return [Case(row.name + s + m) for s, m in product(shared, mappings)]


CASES = [case for row in FORMATS.values() for case in _cases(row)]
"""Every format in every way."""

# Groups of 24 end inside a byte for most widths.
ODD_GROUPS = [Case(f"{row.name}-g24-asym") for row in FORMATS.values() if row.asymmetric]
ALL_CASES = CASES + ODD_GROUPS

ONE_PER_FORMAT = [
    Case(f"{row.name}-g32-asym") if row.asymmetric else Case(row.name + _suffix(row, row.granularities[0]))
    for row in FORMATS.values()
] + [Case("int3-g32-s8-asym")]
"""Every format once, in its most demanding way, and scales of scales."""


STATIC = [
    Case("s8-asym-int4-g32-asym"),
    Case("s8-int3-g32"),
    Case("sf8-float8"),
    Case("s8-nf4-g32"),
    Case("sf8-float8-2x4"),
]
"""Weights that bring along the scales of their inputs."""


def input_stats(weight: Tensor) -> InputStats:
    """Some range of inputs for each matrix of a weight, another for another weight."""
    largest = weight.float().abs().flatten(-2).amax(-1) * 50
    return InputStats(low=-largest, high=largest * 1.5)


def make_weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal weights of the size that models have."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


# ---------------------------------------------------------------------------------- the independent reader


def read_codes(packed: Tensor, bits: int, length: int) -> np.ndarray:
    """uint8 [..., bytes] -> codes [..., length], each row read as one big integer, little end first."""
    rows = packed.reshape(-1, packed.shape[-1]).tolist()
    numbers = [int.from_bytes(bytes(row), "little") for row in rows]
    codes = [[number >> (i * bits) & (2**bits - 1) for i in range(length)] for number in numbers]
    return np.array(codes, dtype=np.int64).reshape(*packed.shape[:-1], length)


def read_sparse_codes(packed: Tensor, length: int) -> np.ndarray:
    """uint8 [..., bytes] of 2:4 sparse codes -> codes [..., length], byte by byte."""
    rows = packed.reshape(-1, packed.shape[-1]).tolist()
    codes = np.zeros((len(rows), -(-length // 4) * 4), dtype=np.int64)
    for row, data in enumerate(rows):
        for four in range(codes.shape[1] // 4):
            at, half = divmod(four, 2)
            places = data[5 * at] >> 4 * half
            for i in range(2):
                codes[row, 4 * four + (places >> 2 * i) % 4] = data[5 * at + 1 + 2 * half + i]
    return codes[:, :length].reshape(*packed.shape[:-1], length)


def read_elements(qdata: Tensor, fmt: Format, columns: int) -> np.ndarray:
    """The codes of a weight's elements, [..., columns], however the format packs them."""
    return read_sparse_codes(qdata, columns) if fmt.storage == "semisparse" else read_codes(qdata, fmt.bits, columns)


def read_float(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """The value of a small float with that many bits (and a sign), by the OCP specifications."""
    width, bias = exponent_bits + mantissa_bits, 2 ** (exponent_bits - 1) - 1
    sign = -1.0 if code >> width else 1.0
    exponent, mantissa = code % 2**width >> mantissa_bits, code % 2**mantissa_bits
    if exponent_bits == 4 and code & 0x7F == 0x7F:
        return float("nan")
    if exponent_bits == 5 and exponent == 31:
        return float("nan") if mantissa else sign * float("inf")
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


def read_float8(code: int, exponent_bits: int) -> float:
    """The value of a float8 byte with that many exponent bits."""
    return read_float(code, exponent_bits, 7 - exponent_bits)


# Exponent and mantissa bits.
ELEMENT_BITS = {
    "float8": (4, 3),
    "float8-e5m2": (5, 2),
    "mxfp4": (2, 1),
    "mxfp6-e2m3": (2, 3),
    "mxfp6-e3m2": (3, 2),
    "mxfp8": (4, 3),
    "mxfp8-e5m2": (5, 2),
    "nvfp4": (2, 1),
    "float8-2x4": (4, 3),
}

# The code book of QLoRA, as bitsandbytes publishes it (`bitsandbytes.functional.get_4bit_type`).
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
NF4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def _affine_values(codes: np.ndarray, zeros: np.ndarray | None, fmt: Format) -> np.ndarray:
    if zeros is None:
        zeros = np.full(codes.shape, 0.5 if fmt.bits == 1 else 2.0 ** (fmt.bits - 1))
    return codes - zeros


def _code_book(fmt: Format) -> np.ndarray:
    """The value of each code, float64 [2^bits]."""
    if fmt.name.startswith("nf4"):
        return np.array(NF4).astype(np.float32).astype(np.float64)
    return np.array([read_float(code, *ELEMENT_BITS[fmt.name]) for code in range(2**fmt.bits)])


def _float_values(codes: np.ndarray, zeros: np.ndarray | None, fmt: Format) -> np.ndarray:
    assert zeros is None
    return _code_book(fmt)[codes]


VALUES: dict[str, Callable[[np.ndarray, np.ndarray | None, Format], np.ndarray]] = {
    "affine": _affine_values,
    "scaled": _float_values,
    "semisparse": _float_values,
}


def read_scales(weight: QuantizedTensor) -> np.ndarray:
    """The scale of each block in float64; a product with an outer scale is rounded to float32."""
    if weight.scale_dtype == torch.float8_e8m0fnu:
        return 2.0 ** (weight.scale.numpy().astype(np.float64) - 127)
    if weight.scale_dtype not in (torch.float8_e4m3fn, torch.uint8, torch.int8):
        return weight.scale.double().numpy()
    codes = weight.scale.numpy()
    if weight.scale_dtype in (torch.uint8, torch.int8):
        assert weight.row_scale is not None
        scale, outer = codes, weight.row_scale
    else:
        scale = np.array([read_float8(code, 4) for code in range(256)])[codes]
        outer = weight.tensor_scale  # type: ignore[attr-defined]
    return (scale * outer.double().numpy()).astype(np.float32).astype(np.float64)


def read(weight: QuantizedTensor) -> np.ndarray:
    """The values of a quantized tensor as it stands, float64 rounded once to float32, element by element."""
    fmt, (block_rows, block_columns), columns = weight.format, weight.meta.block, weight.meta.columns
    codes = read_elements(weight.qdata, fmt, columns)
    rows = codes.shape[-2]
    across, along = np.arange(rows) // block_rows, np.arange(columns) // block_columns
    scale = read_scales(weight)[..., across[:, None], along[None, :]]
    zeros = None
    if weight.zero_point is not None:
        points = read_codes(weight.zero_point, fmt.bits, int(along[-1]) + 1)
        zeros = points[..., across[:, None], along[None, :]].astype(np.float64)
    values = VALUES[fmt.storage](codes, zeros, fmt) * scale
    values = values.astype(np.float32).astype(np.float64)
    return values.swapaxes(-1, -2) if weight.meta.transposed else values
