"""The one table of number formats. Packing, tensors, save, load, inspect and the tests loop over it.

A new format is one row (`register_format`) and one numerics module; nothing else changes.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from llmquant.errors import ConfigError

if TYPE_CHECKING:
    from llmquant.packing.spec import Packing
    from llmquant.primitives.spec import Numerics


SCALE_CODES = {8: torch.int8}
"""What scales of so many bits are stored as: signed codes, multiples of a float32 scale of their row."""


@dataclass(frozen=True)
class Format:
    """One row of the table.

    Attributes:
        name: the scheme's stem, as users write it (`int4`, `float8-e5m2`).
        bits: bits of one code, 1 to 8: what it takes in memory and on disk, unless the packing leaves codes out.
        storage: the kind of tensor that holds it, a key of `llmquant.tensor.STORAGE`.
        numerics_module: dotted name of the module with its `Numerics` (see `primitives.spec`).
        dtype: torch's name for one value, where it has one.
        granularities: which of `group`, `row`, `tensor`, `block` may share a scale.
        group_size: the default group; None means one scale per row.
        asymmetric: whether weights may carry a zero point.
        midpoint: the code (not always an integer) that stands for 0.0 when there is no zero point.
        algorithms: how its codes and scales can be chosen; the first is the default.
        element: what one code is, where it is a small float: a key of `primitives.minifloat.MINIFLOATS`.
        fixed_group: whether groups have the default size and no other.
        scale_dtypes: how scales may be stored, the first by default; empty means 16 or 32 bits, as the config says.
        scale_rules: named rules for scales, the first by default; empty where there is only one.
        tensor_scale: whether each matrix also has one float32 scale, by which its block scales are multiplied.
        row_scale: whether each row has one, whatever the config says.
        scale_bits: the widths of signed codes, keys of `SCALE_CODES`, that scales of groups may be stored as.
        packing_module: dotted name of the module with its `Packing` (see `packing.spec`).
    """

    name: str
    bits: int
    storage: str
    numerics_module: str
    dtype: torch.dtype | None = None
    granularities: tuple[str, ...] = ("group", "row", "tensor")
    group_size: int | None = None
    asymmetric: bool = False
    midpoint: float = 0.0
    algorithms: tuple[str, ...] = ("rtn",)
    element: str = ""
    fixed_group: bool = False
    scale_dtypes: tuple[torch.dtype, ...] = ()
    scale_rules: tuple[str, ...] = ()
    tensor_scale: bool = False
    row_scale: bool = False
    scale_bits: tuple[int, ...] = ()
    packing_module: str = "llmquant.packing.bits"

    @property
    def numerics(self) -> Numerics:
        """The functions that turn values into codes and back, imported when first needed."""
        return cast("Numerics", importlib.import_module(self.numerics_module))

    @property
    def packing(self) -> Packing:
        """The functions that turn codes into bytes and back, imported when first needed."""
        return cast("Packing", importlib.import_module(self.packing_module))

    @property
    def top_code(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def has_row_scale(self, scale_dtype: torch.dtype) -> bool:
        """Whether weights whose scales are stored so have a float32 scale a row beside them."""
        return self.row_scale or scale_dtype in SCALE_CODES.values()

    def allows_scales(self, scale_dtype: torch.dtype) -> bool:
        """Whether scales may be stored so."""
        if scale_dtype in SCALE_CODES.values():
            return scale_dtype in (SCALE_CODES[bits] for bits in self.scale_bits)
        return not self.scale_dtypes or scale_dtype in self.scale_dtypes

    def row_bytes(self, columns: int) -> int:
        """Bytes of one packed row of `columns` codes; every row starts on a byte."""
        return self.packing.row_bytes(columns, self.bits)


@dataclass(frozen=True)
class Method:
    """A way to choose codes and scales: one row of the table of algorithms.

    Attributes:
        summary: what it does, in the words of a help page.
        needs: what it needs beside the weight: nothing, `hessian` (of `InputStats`), or `model` (a driver that runs the
            model and hands over finished codes).
        within_rows: whether a scale must not reach over several rows.
    """

    summary: str
    needs: str = ""
    within_rows: bool = False


METHODS: dict[str, Method] = {
    "search": Method("least-squares scales"),
    "rtn": Method("round to nearest"),
    "hqq": Method("scales and zero points by half-quadratic splitting, which lets a few errors be large"),
    "gptq": Method("rounds column by column, later columns make up for earlier errors", "hessian", within_rows=True),
    "signround": Method("rounding learned by signed gradients of each block's error", "model", within_rows=True),
}


FORMATS: dict[str, Format] = {}


def register_format(row: Format) -> Format:
    """Adds a row to the table. Raises `ConfigError` if the name is taken by another row."""
    if FORMATS.get(row.name, row) != row:
        raise ConfigError(f"a format named {row.name!r} exists already", hint="choose another name")
    FORMATS[row.name] = row
    return row


def get_format(name: str) -> Format:
    """The row of that name. Raises `ConfigError` with near names."""
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=3) or list(FORMATS)
        raise ConfigError(f"unknown format {name!r}", hint="one of " + ", ".join(near))
    return FORMATS[name]


def _integer(bits: int) -> Format:
    return Format(
        name=f"int{bits}",
        bits=bits,
        storage="affine",
        numerics_module="llmquant.primitives.affine",
        dtype=getattr(torch, f"int{bits}"),
        group_size=128 if bits == 4 else None,
        asymmetric=True,
        # One bit is a sign: its two codes lie around zero.
        midpoint=0.5 if bits == 1 else float(2 ** (bits - 1)),
        algorithms=("search", "rtn", "hqq", "gptq", "signround"),
        # Where groups are small and their scales a notable part of the bytes.
        scale_bits=(8,) if 2 <= bits <= 6 else (),
    )


def _float8(name: str, dtype: torch.dtype) -> Format:
    return Format(
        name=name,
        bits=8,
        storage="scaled",
        numerics_module="llmquant.primitives.lowfloat",
        dtype=dtype,
        granularities=("row", "tensor", "block"),
        algorithms=("rtn", "gptq"),
        element=str(dtype).removeprefix("torch.float8_"),
    )


def _mx(name: str, bits: int, element: str) -> Format:
    return Format(
        name=name,
        bits=bits,
        storage="scaled",
        numerics_module="llmquant.primitives.mx",
        granularities=("group",),
        group_size=32,
        algorithms=("search", "rtn", "gptq"),
        element=element,
        fixed_group=True,
        scale_dtypes=(torch.float8_e8m0fnu,),
        scale_rules=("floor", "ceil", "even", "rceil"),
    )


def _nf4(name: str, double_quant: bool) -> Format:
    return Format(
        name=name,
        bits=4,
        storage="scaled",
        numerics_module="llmquant.primitives.nf4",
        granularities=("group",),
        group_size=64,
        midpoint=7.0,
        algorithms=("search", "rtn", "gptq"),
        scale_dtypes=(torch.uint8,) if double_quant else (),
        row_scale=double_quant,
    )


for _bits in range(1, 9):
    register_format(_integer(_bits))
register_format(_float8("float8", torch.float8_e4m3fn))
register_format(_float8("float8-e5m2", torch.float8_e5m2))
register_format(_mx("mxfp4", 4, "e2m1"))
register_format(_mx("mxfp6-e2m3", 6, "e2m3"))
register_format(_mx("mxfp6-e3m2", 6, "e3m2"))
register_format(_mx("mxfp8", 8, "e4m3fn"))
register_format(_mx("mxfp8-e5m2", 8, "e5m2"))
register_format(
    Format(
        name="nvfp4",
        bits=4,
        storage="scaled",
        numerics_module="llmquant.primitives.nvfp4",
        granularities=("group",),
        group_size=16,
        algorithms=("search", "rtn", "gptq"),
        element="e2m1",
        fixed_group=True,
        scale_dtypes=(torch.float8_e4m3fn,),
        tensor_scale=True,
    )
)
register_format(_nf4("nf4", double_quant=True))
register_format(_nf4("nf4-single", double_quant=False))
register_format(
    Format(
        name="float8-2x4",
        bits=8,
        storage="semisparse",
        numerics_module="llmquant.primitives.semisparse",
        granularities=("row",),
        element="e4m3fn",
        packing_module="llmquant.packing.sparse24",
    )
)
