"""What the values of a weight's components can be. What no writer stores is damage (`docs/format.md`, 3 and 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llmquant.formats import Format
from llmquant.primitives.minifloat import MINIFLOATS

_POSITIVE = ("row_scale", "tensor_scale", "act_scale")


class Check(NamedTuple):
    """The check of a component.

    Attributes:
        wrong: some rows of it as stored, [rows, n] -> what is wrong with them, if anything.
        tail: how many of its last dimensions make a row.
    """

    wrong: Callable[[Tensor], str | None]
    tail: int = 1


def check_of(field: str, fmt: Format, scale_dtype: torch.dtype, length: int) -> Check:
    """The check of one component.

    Args:
        field: name of the component (`qdata`, `scale`, ...).
        fmt: the weight's format.
        scale_dtype: what its scales are.
        length: codes in a packed row: columns of the weight, or blocks along a row of zero points.
    """
    if field == "qdata":
        return Check(lambda rows: _packing(rows, fmt, length) or _codes(rows, fmt, length), tail=2)
    if field == "zero_point":
        return Check(lambda rows: _packing(rows, fmt, length))
    if field == "scale":
        return Check(lambda rows: _scales(rows, scale_dtype, fmt.tensor_scale))
    return Check(_positive if field in _POSITIVE else lambda rows: None)


def _packing(rows: Tensor, fmt: Format, length: int) -> str | None:
    """Unpacking and packing again gives the same bytes; of a dense stream only the end of a row can be otherwise."""
    codes, step = fmt.packing.unit(fmt.bits)
    if fmt.packing.STEP == 1:
        rows, length = rows[:, length // codes * step :], length % codes
    if not length or torch.equal(fmt.packing.pack(fmt.packing.unpack(rows, fmt.bits, length), fmt.bits), rows):
        return None
    return "bits that stand for no code are not zero"


def _codes(rows: Tensor, fmt: Format, length: int) -> str | None:
    dtype = MINIFLOATS[fmt.element].dtype if fmt.element else None
    if dtype is None:
        return None
    codes = fmt.packing.unpack(rows, fmt.bits, length).contiguous().view(dtype)
    return None if codes.float().isfinite().all() else "there are codes that are no finite number"


def _scales(rows: Tensor, dtype: torch.dtype, positive: bool) -> str | None:
    if dtype == torch.int8:
        return "there is the scale -128, which no writer stores" if (rows == -128).any() else None
    if not dtype.is_floating_point:
        return None
    values = rows.view(dtype).float()
    if not values.isfinite().all():
        return "there are scales that are not finite"
    return "there are scales below zero" if positive and (values < 0).any() else None


def _positive(rows: Tensor) -> str | None:
    return None if (rows.isfinite() & (rows > 0)).all() else "there are scales that are not positive and finite"
