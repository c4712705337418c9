"""Algorithms choose codes and scales. They are pure functions on arrays and have never seen a module.

Every algorithm has the signature of `rtn`: rows [R, K] float32, their importance [R, K] (0 = ignore)
and a spec -> `Codes`. Rows are independent, so a caller may hand over any whole blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from llmquant.algorithms.rtn import Codes, rtn
from llmquant.algorithms.search import search
from llmquant.primitives.spec import QuantSpec

Algorithm = Callable[[Tensor, "Tensor | None", QuantSpec], Codes]

ALGORITHMS: dict[str, Algorithm] = {"rtn": rtn, "search": search}

__all__ = ["ALGORITHMS", "Algorithm", "Codes"]
