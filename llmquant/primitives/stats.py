"""What a calibration run saw of the inputs of one weight: values, which algorithms get without the model."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor


@dataclass(frozen=True, eq=False)
class InputStats:
    """Statistics of the inputs that a weight [..., out, in] meets. None where nobody asked for them.

    Those of a stack of experts have one more dimension in front, [experts]; `mean_square` need not.

    Attributes:
        mean_square: float32 [in], the mean square of the input that each column meets.
        hessian: float32 [in, in], the mean of x x^T over all inputs x; its diagonal is `mean_square`.
        low: float32 [], the lowest input of all columns.
        high: float32 [], the highest.
        tokens: int64 [], how many inputs were seen.
    """

    mean_square: Tensor | None = None
    hessian: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    tokens: Tensor | None = None

    def of_expert(self, index: int) -> InputStats:
        """Those of one matrix of a stack."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        shared = ("mean_square",) if self.mean_square is not None and self.mean_square.dim() == 1 else ()
        return InputStats(**{n: t if t is None or n in shared or not t.dim() else t[index] for n, t in found.items()})
