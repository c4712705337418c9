"""What a calibration run saw of the inputs of one weight: values, which algorithms get without the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class InputStats:
    """Statistics of the inputs that a weight [..., out, in] meets. None where nobody asked for them.

    Attributes:
        mean_square: float32 [in], the mean square of the input that each column meets.
        low: float32, the lowest input of all columns: [], or of a stack of experts [experts].
        high: the highest, likewise.
    """

    mean_square: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
