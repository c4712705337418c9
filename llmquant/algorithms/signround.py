"""Signround: what is added to a weight before it is rounded, and its scale, learned by signed gradient descent.

Cheng et al., 2023 (arXiv:2309.05516), known as AutoRound: W^ = s * (clip(round(W / s + V) + z) - z) with V in
[-1/2, 1/2]. The gradient of a loss by W^ comes from whoever runs the model; rounding passes it on as if it were not
there. Here V is a shift of the weight itself, V * s, so that the format's own rounding is what is learned through.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmquant.algorithms.rtn import Codes, encode_rows
from llmquant.primitives.affine import stored
from llmquant.primitives.blocks import from_blocks, to_blocks
from llmquant.primitives.spec import QParams, QuantSpec

WIDEST = 0.5
"""How far the factor of a scale may go from 1."""

_CHUNK_ELEMENTS = 2**16  # worked on at a time, so that temporaries stay in the cache
_MARGIN = 0.4  # steps between a code and a weight that was moved to be rounded to it


class Rounding:
    """The rounding of one matrix while it is learned; as it starts, its codes are the given ones.

    Args:
        rows: float [R, K], the matrix; kept, never written to.
        start: its codes and parameters: those of `search`, or of an algorithm that rounds to farther codes too.
        spec: integers, with scales within rows.
    """

    def __init__(self, rows: Tensor, start: Codes, spec: QuantSpec) -> None:
        assert spec.block[0] == 1
        self.spec, self._start = spec, start.qparams
        self._rows = reaching(rows, start, spec)
        self._shift = torch.zeros(rows.shape, device=rows.device)  # V [R, K], in steps
        self._factor = torch.ones(start.qparams.scale.shape, device=rows.device)  # of each scale, [R, G]

    def value(self, dtype: torch.dtype) -> Tensor:
        """The matrix as it is rounded now, [R, K]."""
        found = torch.empty_like(self._shift, dtype=dtype)
        for part in self._parts():
            qparams = self._qparams(part)
            found[part] = self._matrix(self._round(self._shifted(part, qparams), qparams))
        return found

    def codes(self) -> Codes:
        """What would be stored now: codes [R, K] uint8 and their parameters."""
        codes = torch.empty_like(self._shift, dtype=torch.uint8)
        for part in self._parts():
            qparams = self._qparams(part)
            blocks = self.spec.format.numerics.encode(self._shifted(part, qparams), qparams, self.spec.format)
            codes[part] = self._matrix(blocks)
        return Codes(codes, self._qparams(slice(None)))

    def step(self, gradient: Tensor, rate: float, scale_rate: float) -> None:
        """Moves every shift by `rate` and every factor by `scale_rate` against the sign of its own gradient.

        Args:
            gradient: of the loss by `value`, [R, K].
            rate: in steps between codes.
            scale_rate: as a share of the scale.
        """
        for part in self._parts():
            qparams = self._qparams(part)
            shifted = self._shifted(part, qparams)
            decoded = self._round(shifted, qparams)
            slope = self._blocks(gradient[part])
            scale = qparams.scale.float().unsqueeze(-1)
            # Clipped codes do not follow their weights. (Floats, for products with booleans are slow.)
            inside = (shifted.sub_(decoded).abs_() <= scale.abs() * 0.501).float()
            by_scale = decoded.sub_(self._blocks(self._rows[part]).mul_(inside)).mul_(slope).sum(-1)
            self._factor[part].sub_(by_scale.sign_(), alpha=scale_rate).clamp_(1 - WIDEST, 1 + WIDEST)
            move = inside.mul_(slope).mul_(scale).sign_()
            self._shift[part].sub_(self._matrix(move), alpha=rate).clamp_(-0.5, 0.5)

    def _parts(self) -> Iterator[slice]:
        """Some rows at a time."""
        rows, columns = self._shift.shape
        step = max(_CHUNK_ELEMENTS // columns, 1)
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def _qparams(self, part: slice) -> QParams:
        """The parameters of some rows, as they would be stored now."""
        scale, zero_point = self._start.scale[part], self._start.zero_point
        learned = stored(scale.float() * self._factor[part], self.spec.scale_dtype)
        return QParams(learned, None if zero_point is None else zero_point[part])

    def _shifted(self, part: slice, qparams: QParams) -> Tensor:
        """Some rows with their shifts, as new blocks [B, G, n]."""
        shift = self._blocks(self._shift[part])
        return shift.mul_(qparams.scale.float().unsqueeze(-1)).add_(self._blocks(self._rows[part]))

    def _blocks(self, rows: Tensor) -> Tensor:
        """Rows [B, K] of any float as new float32 blocks [B, G, n]."""
        return to_blocks(rows.to(torch.float32, copy=True, memory_format=torch.contiguous_format), self.spec.block)

    def _matrix(self, blocks: Tensor) -> Tensor:
        return from_blocks(blocks, blocks.shape[0], self._shift.shape[1], self.spec.block)

    def _round(self, blocks: Tensor, qparams: QParams) -> Tensor:
        """The values of the nearest codes."""
        numerics, form = self.spec.format.numerics, self.spec.format
        return numerics.decode(numerics.encode(blocks, qparams, form), qparams, form)


def reaching(rows: Tensor, start: Codes, spec: QuantSpec) -> Tensor:
    """Rows [R, K] moved no farther than it takes to be rounded to the given codes: themselves where they are already.

    Algorithms that let one column make up for another choose codes that are not the nearest.
    """
    nearest = encode_rows(rows.float(), start.qparams, spec).codes
    if torch.equal(nearest, start.codes):
        return rows
    count, columns = rows.shape
    blocks = spec.format.numerics.decode(to_blocks(start.codes, spec.block), start.qparams, spec.format)
    wanted = from_blocks(blocks, count, columns, spec.block)
    reach = start.qparams.scale.float().abs().repeat_interleave(spec.block[1], dim=1)[:, :columns] * _MARGIN
    return torch.where(nearest == start.codes, rows.float(), (rows - wanted).clamp(-reach, reach).add_(wanted))
