"""Weights on CUDA devices through aten's own products, for the inputs and shapes that these take; others go to Triton.

What surrounds the products is tested on the CPU, where aten has them too; none was timed on a card.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from llmquant.kernels import reference
from llmquant.kernels.packed import Packed
from llmquant.kernels.triton import TRITON, Triton, missing_card
from llmquant.primitives.dynamic import Activation, StaticScale, quantize_activation

_GROUPS = (32, 64, 128, 256)
_MOST_INT4 = 32  # tokens; `_weight_int4pack_mm` decodes the weight anew for every 16
_FEW = 16  # tokens; `_int_mm` takes more
_LARGEST_SUM = 2**31 // (255 * 128)  # columns whose products of int8 codes fit into 32 bits


class Product(NamedTuple):
    """One of aten's products.

    name: the operator.
    inputs: which ones it takes, in words.
    capability: of the card.
    misfit: block, columns -> why it does not take such a weight, or None.
    """

    name: str
    inputs: str
    capability: tuple[int, int]
    misfit: Callable[[tuple[int, int], int], str | None]


def _not_grouped(block: tuple[int, int], columns: int) -> str | None:
    if block[1] in _GROUPS and columns > 0 and columns % block[1] == 0:
        return None
    return f"rows of {columns} are not made of groups of 32, 64, 128 or 256"


def _not_whole_rows(multiple: int, most: int) -> Callable[[tuple[int, int], int], str | None]:
    def misfit(block: tuple[int, int], columns: int) -> str | None:
        if block[1] < columns:
            return "its rows have several scales"
        if columns % multiple or not 0 < columns <= most:
            return f"{columns} columns are not a multiple of {multiple} up to {most}"
        return None

    return misfit


PRODUCTS: dict[str, Product] = {
    "int4": Product("_weight_int4pack_mm", "a few bfloat16 inputs", (8, 0), _not_grouped),
    "int8": Product(
        "_int_mm",
        "inputs in int8 codes with one scale a token",
        (8, 0),
        _not_whole_rows(8, _LARGEST_SUM),
    ),
    "float8": Product(
        "_scaled_mm",
        "bfloat16 inputs in float8 codes with one scale a token or for all",
        (8, 9),
        _not_whole_rows(16, 2**31 - 1),
    ),
}
"""By format."""


def missing(capability: tuple[int, int] = (8, 0)) -> str | None:
    """Why no product that needs a card of such a capability can run in this process, or None."""
    return "its products are CUDA's" if torch.version.hip else missing_card(capability)


def refusal(format_name: str, block: tuple[int, int], columns: int, device: str) -> str | None:
    """Why none of aten's products takes such a weight here, or None."""
    if device != "cuda":
        return f"the weight lies on {device}"
    product = PRODUCTS.get(format_name)
    if product is None:
        return f"aten has no product for {format_name}"
    return missing(product.capability) or product.misfit(block, columns)


def merit(format_name: str) -> str:
    """What aten does for a weight of that format, in words."""
    product = PRODUCTS[format_name]
    return f"{product.name} for {product.inputs}; for others triton where it runs, else the reference"


def linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """x [..., K] -> x @ weight.T + bias, [..., N] in x's dtype.

    Few bfloat16 inputs of int4 weights by `_weight_int4pack_mm`, which rounds scales, scaled zero points, weights, and
    the product before its bias to bfloat16. It reads a second copy of the codes, half a byte each, in its own order;
    one that would live for a single call is not made.
    """
    fits = weight.format == "int4" and x.dtype == torch.bfloat16 and _has_rows(weight, 8)
    count = x.shape[:-1].numel()
    if not (fits and 0 < count <= _MOST_INT4) or weight.is_passing:
        return _other(weight).linear(x, weight, bias)
    codes, scales_and_zeros = _int4_copy(weight)
    with torch.cuda.device_of(x):
        out = multiply_int4(_flat(x), codes, weight.block[1], scales_and_zeros)
    return (out if bias is None else out.add_(bias)).reshape(*x.shape[:-1], weight.rows)


def linear_int8(
    x: Tensor, weight: Packed, activation: Activation, bias: Tensor | None, static: StaticScale | None = None
) -> Tensor:
    """The same with x in int8 codes: exact integer products by `_int_mm` of symmetric int8 weights, scaled in float32.

    The weight's codes are brought around zero anew for every call: many tokens are worth it, and it costs no memory.
    """
    many = x.shape[:-1].numel() > _FEW and _has_rows(weight, 8)
    one_scale = activation.width(weight.columns) == weight.columns
    if not (weight.format == "int8" and weight.zero_point is None and many and one_scale):
        return _other(weight).linear_int8(x, weight, activation, bias, static)
    given = quantize_activation(_flat(x), activation, static)
    codes = (weight.qdata ^ 128).view(torch.int8)  # code - 128 [N, K]
    sums = torch._int_mm(given.codes, codes.T)
    if given.zero_point is not None:
        sums -= given.zero_point.int() * codes.sum(1, dtype=torch.int32)
    out = sums.float().mul_(given.scale).mul_(_row_scales(weight))
    if bias is not None:
        out += bias
    return out.to(x.dtype).reshape(*x.shape[:-1], weight.rows)


def linear_float8(
    x: Tensor, weight: Packed, activation: Activation, bias: Tensor | None, static: StaticScale | None = None
) -> Tensor:
    """The same with x in float8 codes: bfloat16 results of `_scaled_mm`, whose bias is rounded to bfloat16 before."""
    fits = weight.format == "float8" and x.dtype == torch.bfloat16 and _has_rows(weight, 16) and x.numel() > 0
    one_scale = activation.group <= 0 or activation.width(weight.columns) == weight.columns
    if not (fits and one_scale):
        return _other(weight).linear_float8(x, weight, activation, bias, static)
    tokens = _flat(x)
    given = quantize_activation(tokens, activation, static)
    left, right = given.scale, _row_scales(weight)
    if weight.scale.numel() == left.numel() == 1:  # one scale on either side
        right = weight.scale.float()
    else:
        left = left.expand(len(tokens), 1).contiguous()
    out = torch._scaled_mm(
        given.codes,
        weight.qdata.view(torch.float8_e4m3fn).T,
        left,
        right,
        bias=None if bias is None else bias.to(x.dtype),
        out_dtype=x.dtype,
    )
    return out.reshape(*x.shape[:-1], weight.rows)


def matmul(x: Tensor, weight: Packed) -> Tensor:
    """x [..., N] -> x @ weight, [..., K] in x's dtype."""
    return _other(weight).matmul(x, weight)


def embedding(indices: Tensor, weight: Packed, dtype: torch.dtype) -> Tensor:
    """indices [...] int -> rows of the table, [..., K] in `dtype`."""
    return _other(weight).embedding(indices, weight, dtype)


def _other(weight: Packed) -> Triton | ModuleType:
    """The backend for what aten does not take."""
    refused = TRITON.refusal(weight.format, weight.block, weight.columns, weight.qdata.device.type)
    return reference if refused else TRITON


def _has_rows(weight: Packed, multiple: int) -> bool:
    return weight.rows > 0 and weight.rows % multiple == 0


def _flat(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()


def _row_scales(weight: Packed) -> Tensor:
    """The scale of each row, float32 [1, N]."""
    return weight.scales().float().repeat_interleave(weight.block[0], 0)[: weight.rows].T.contiguous()


# --- int4 ---------------------------------------------------------------------------------------------------


def _int4_copy(weight: Packed) -> tuple[Tensor, Tensor]:
    """The codes and scales of a weight in aten's order, made anew when its tensors were written to."""
    sources = (weight.qdata, weight.scale, weight.zero_point)
    versions = [None if t is None or t.is_inference() else t._version for t in sources]
    kept = weight.__dict__.get("aten")
    if kept is None or kept[0] != versions:
        kept = weight.__dict__["aten"] = versions, pack_int4(weight.qdata, weight.columns), scales_and_zeros(weight)
    return kept[1:]


def pack_int4(qdata: Tensor, columns: int) -> Tensor:
    """Packed codes uint8 [N, K / 2] -> those of `_weight_int4pack_mm`. Of two codes aten wants the even one on top."""
    tiles = next(count for count in (8, 4, 2) if columns % (16 * count) == 0)
    return torch.ops.aten._convert_weight_to_int4pack(swap_nibbles(qdata), tiles)


def swap_nibbles(qdata: Tensor) -> Tensor:
    """uint8 of any shape with the upper and lower four bits of each byte exchanged."""
    return (qdata << 4) | (qdata >> 4)


def scales_and_zeros(weight: Packed) -> Tensor:
    """bfloat16 [K / group, N, 2] for value = (code - 8) * scale + zero."""
    scale, zeros = weight.scales().float(), weight.zeros()
    shift = torch.zeros_like(scale) if zeros is None else (8 - zeros.float()) * scale
    pairs = torch.stack([scale, shift], -1).repeat_interleave(weight.block[0], 0)[: weight.rows]
    return pairs.transpose(0, 1).bfloat16().contiguous()


def multiply_int4(x: Tensor, codes: Tensor, group: int, scales_and_zeros: Tensor) -> Tensor:
    """x bfloat16 [M, K] -> bfloat16 [M, N]."""
    return torch.ops.aten._weight_int4pack_mm(x, codes, group, scales_and_zeros)
