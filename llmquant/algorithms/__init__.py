"""Algorithms choose codes and scales. They are pure functions on arrays and have never seen a module.

Every algorithm has the signature of `rtn`: rows [R, K] float32, their importance [R, K] (0 = ignore)
and a spec -> `Codes`. Rows are independent, so a caller may hand over any whole blocks of rows. Calibrated ones become
such a function when they are given the statistics of a matrix's inputs.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from llmquant.algorithms.gptq import gptq
from llmquant.algorithms.hqq import hqq
from llmquant.algorithms.rtn import Codes, rtn
from llmquant.algorithms.search import search
from llmquant.primitives.spec import QuantSpec
from llmquant.primitives.stats import InputStats

Algorithm = Callable[[Tensor, "Tensor | None", QuantSpec], Codes]
Note = Callable[[str], None]
"""Told in words what did not go as asked, for the report."""

ALGORITHMS: dict[str, Algorithm] = {"rtn": rtn, "search": search, "hqq": hqq}
CALIBRATED: dict[str, Callable[[InputStats, Note], Algorithm]] = {"gptq": gptq}

__all__ = ["ALGORITHMS", "CALIBRATED", "Algorithm", "Codes", "Note"]
