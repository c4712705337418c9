"""Tokens in the block floats of the table of formats: Microscaling (MX) and NVFP4. All arithmetic is float32.

The rule is that of weights that are rounded plainly, without a search (`primitives.mx`, `primitives.nvfp4`): where each
token has a scale of its own, its codes are those of `quantize_weight(token, ..., algorithm="rtn")`. A block that holds
NaN or infinity gets the scale NaN and codes 0; a float32 scale that is no number makes all blocks under it so.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmquant.formats import Format
from llmquant.primitives.affine import inverse
from llmquant.primitives.blocks import from_blocks, to_blocks
from llmquant.primitives.granularity import MappingType
from llmquant.primitives.lowfloat import round_to_
from llmquant.primitives.minifloat import MINIFLOATS
from llmquant.primitives.spec import QParams, QuantSpec

_NAN = 0xFF  # in e8m0 and in e4m3


class BlockCodes(NamedTuple):
    """Rows in block floats.

    codes: uint8 [T, K], one a byte.
    scale: [T, G] in the dtype of the format, G = ceil(K / group).
    tensor_scale: float32 [T, 1], or [1, 1] where all rows share it, by which scales are multiplied; or None.
    """

    codes: Tensor
    scale: Tensor
    tensor_scale: Tensor | None


def block_spec(fmt: Format, scale_rule: str, columns: int) -> QuantSpec:
    """What a format means for rows of `columns` elements."""
    assert fmt.group_size is not None
    block = (1, max(min(fmt.group_size, columns), 1))
    return QuantSpec(fmt, block, MappingType.SYMMETRIC, fmt.scale_dtypes[0], scale_rule or None)


def reach(spec: QuantSpec) -> float:
    """The largest magnitude under the largest scale that can be stored."""
    limits = torch.finfo if spec.scale_dtype.is_floating_point else torch.iinfo
    return limits(spec.scale_dtype).max * spec.format.numerics.largest_scaled(spec.format)


def tensor_scale(largest: Tensor, spec: QuantSpec) -> Tensor:
    """Largest magnitudes, float32 -> the scales with which the block that holds one gets the largest block scale.

    Never zero, and NaN where a magnitude is not finite.
    """
    scale = (largest / reach(spec)).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(largest.isfinite(), scale, torch.nan)


def tensor_scales(rows: Tensor, spec: QuantSpec, together: bool) -> Tensor | None:
    """The float32 scale of each row [T, K], [T, 1], or of all, [1, 1]; None where the format has none."""
    if not spec.format.tensor_scale:
        return None
    if rows.numel() == 0:
        return rows.new_ones(1 if together else rows.shape[0], 1, dtype=torch.float32)
    largest = rows.abs().amax().reshape(1, 1) if together else rows.abs().amax(-1, keepdim=True)
    return tensor_scale(largest.float(), spec)


def quantize_rows(rows: Tensor, spec: QuantSpec, shared: Tensor | None = None) -> BlockCodes:
    """rows [T, K] -> codes. `shared` [1, 1] is the float32 scale of all; without it each row has its own, if any."""
    scales = tensor_scales(rows, spec, together=False) if shared is None else shared
    groups, scale = _scaled(rows, spec, scales)
    codes = spec.format.numerics.encode(groups, QParams(scale), spec.format)
    codes = codes.masked_fill(scale.float().isnan().unsqueeze(-1), 0)
    return BlockCodes(from_blocks(codes, len(rows), rows.shape[1], spec.block), scale, scales)


def dequantize_rows(quantized: BlockCodes, spec: QuantSpec) -> Tensor:
    """Codes -> what they stand for, float32 [T, K]."""
    scale = _meant(quantized.scale, quantized.tensor_scale)
    groups = to_blocks(quantized.codes, spec.block)
    values = spec.format.numerics.decode(groups, QParams(scale), spec.format)
    tokens, columns = quantized.codes.shape
    return from_blocks(values, tokens, columns, spec.block)


def fake_quantize_rows(rows: Tensor, spec: QuantSpec, shared: Tensor | None = None) -> Tensor:
    """rows [T, K] -> what the codes of `quantize_rows` stand for, float32 [T, K], without making them.

    What is beyond the largest number of the rows' dtype, because a scale was rounded up, becomes that number.
    """
    scales = tensor_scales(rows, spec, together=False) if shared is None else shared
    groups, scale = _scaled(rows, spec, scales)
    kind = MINIFLOATS[spec.format.element]
    numbers = round_to_((groups * inverse(scale).unsqueeze(-1)).clamp_(-kind.largest, kind.largest), kind)
    limit = min(torch.finfo(rows.dtype).max, torch.finfo(torch.float32).max)
    values = numbers.mul_(_meant(scale, scales).unsqueeze(-1)).clamp_(-limit, limit)
    return from_blocks(values, len(rows), rows.shape[1], spec.block)


def _scaled(rows: Tensor, spec: QuantSpec, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """Blocks [T, G, n] float32 under the scale of their row, and their own scales [T, G] as stored."""
    wide = rows.float() if scales is None else rows.float() / scales
    groups = to_blocks(wide, spec.block)
    largest = groups.abs().amax(-1, keepdim=True)  # which is all that the rules look at
    scale = spec.format.numerics.choose_qparams(largest, largest, spec).scale
    scale.view(torch.uint8).masked_fill_(~largest.squeeze(-1).isfinite(), _NAN)
    return groups, scale


def _meant(scale: Tensor, scales: Tensor | None) -> Tensor:
    """The scale of each block, float32 [T, G]."""
    return scale.float() if scales is None else scale.float() * scales
