"""How often each value was seen, at the resolution of bfloat16: what quantiles and errors of rounding follow from.

bfloat16 has 65,280 finite values, 128 an octave, so a table of them needs no range to be known before: counts are exact
and do not depend on how inputs were cut into batches. Inputs of a bfloat16 model are counted as they are, others
rounded to nearest, a relative error of at most 2^-8.
"""

from __future__ import annotations

import torch
from torch import Tensor

_KEYS = 2**16


class ValueCounts:
    """Counts of all values seen, 0.5 MB from the first on, and their exact extremes.

    Attributes:
        ends: float32 [2], the lowest and the highest value; NaN if any was.
    """

    def __init__(self) -> None:
        self.ends = torch.tensor([torch.inf, -torch.inf])
        self._counts: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Counts values [...] of any float dtype."""
        if not x.numel():
            return
        x = x.detach()
        low, high = (end.float().cpu() for end in torch.aminmax(x))
        self.ends = torch.stack([torch.minimum(self.ends[0], low), torch.maximum(self.ends[1], high)])
        keys = x.to(torch.bfloat16).contiguous().view(torch.int16).flatten().int() + _KEYS // 2
        found = torch.bincount(keys, minlength=_KEYS).cpu()
        self._counts = found if self._counts is None else self._counts.add_(found)

    def table(self) -> tuple[Tensor, Tensor]:
        """The distinct finite values, ascending, float32 [V], none beyond the extremes; their counts, int64 [V]."""
        if self._counts is None:
            return torch.empty(0), torch.empty(0, dtype=torch.int64)
        keys = self._counts.nonzero().squeeze(-1)
        values = (keys - _KEYS // 2).to(torch.int16).view(torch.bfloat16).float()
        values, counts = values.clamp(*self.ends.tolist()), self._counts[keys]
        order = values.argsort(stable=True)
        return values[order], counts[order]
