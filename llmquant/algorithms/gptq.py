"""GPTQ: columns are rounded one after the other, and those not yet rounded make up for the error of each.

Frantar et al., 2022 (arXiv:2210.17323), with the static order of activations: scales are chosen first, by `search`;
columns are visited from the largest mean square of their inputs to the smallest, and lie in their own order on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llmquant.algorithms.rtn import Codes, rtn
from llmquant.algorithms.search import search
from llmquant.primitives.spec import QParams, QuantSpec
from llmquant.primitives.stats import InputStats

DAMPING = 0.01
"""What is added to the diagonal of the Hessian, as a share of its mean."""

_MORE_DAMPING = (1, 10, 100)
_LAZY_COLUMNS = 128  # so many columns are corrected one by one; the rest waits for one product with all of them


class Factor(NamedTuple):
    """What GPTQ needs of the inputs of one matrix.

    order: int64 [K], the columns as they are visited.
    upper: float32 [K, K], U of inverse(H) = U^T U for the columns in that order.
    """

    order: Tensor
    upper: Tensor


def gptq(stats: InputStats, note: Callable[[str], None]) -> Callable[[Tensor, Tensor | None, QuantSpec], Codes]:
    """The algorithm for a matrix with these inputs; `search` where they do not carry it, which is noted.

    Args:
        stats: of one matrix; `hessian` [K, K] is needed.
        note: told in words what did not go as asked.
    """
    assert stats.hessian is not None
    factor = factorize(stats.hessian, note)
    if factor is None:
        note("its Hessian cannot be inverted: scales from search instead of gptq")
        return _scales

    def choose(rows: Tensor, importance: Tensor | None, spec: QuantSpec) -> Codes:
        qparams = _scales(rows, importance, spec).qparams
        return Codes(round_columns(rows, qparams, factor, spec), qparams)

    return choose


def factorize(hessian: Tensor, note: Callable[[str], None] = lambda _: None) -> Factor | None:
    """Hessian [K, K], the mean of x x^T -> what GPTQ needs of it; None if no damping makes it positive definite.

    Columns whose inputs are always zero do not matter: with the mean on the diagonal, nothing moves to them.
    """
    hessian = hessian.double()
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if not (mean.isfinite() and mean > 0):
        return None
    dead = torch.where(diagonal == 0, mean, 0)
    order = torch.argsort(diagonal, descending=True, stable=True)
    ordered = (hessian + torch.diag(dead))[order][:, order]
    for more in _MORE_DAMPING:
        damped = ordered + torch.eye(len(order), dtype=ordered.dtype) * (DAMPING * more * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed:
            if more > 1:
                note(f"its Hessian needed {DAMPING * more:.0%} of damping instead of {DAMPING:.0%}")
            return Factor(order, upper.float())
    return None


def round_columns(rows: Tensor, qparams: QParams, factor: Factor, spec: QuantSpec) -> Tensor:
    """Codes [R, K] uint8 of rows [R, K] float32 under given parameters, visited and corrected as the factor says."""
    count, columns = rows.shape
    left = rows[:, factor.order]  # what is still to be rounded, corrected so far
    codes = torch.empty_like(rows, dtype=torch.uint8)
    groups = factor.order // spec.block[1]
    for start in range(0, columns, _LAZY_COLUMNS):
        stop = min(start + _LAZY_COLUMNS, columns)
        errors = rows.new_empty(count, stop - start)
        upper = factor.upper[start:stop]
        block = left[:, start:stop].contiguous()
        for i in range(stop - start):
            column = block[:, i]
            group = int(groups[start + i])
            own = QParams(*(None if q is None else q[:, group : group + 1] for q in qparams))  # type: ignore[arg-type]
            code = spec.format.numerics.encode(column[:, None, None].clone(), own, spec.format)
            codes[:, factor.order[start + i]] = code[:, 0, 0]
            value = spec.format.numerics.decode(code, own, spec.format)[:, 0, 0]
            errors[:, i] = (column - value) / upper[i, start + i]
            block[:, i + 1 :].addr_(errors[:, i], upper[i, start + i + 1 : stop], alpha=-1)
        left[:, stop:] -= errors @ upper[:, stop:]
    return codes


def _scales(rows: Tensor, importance: Tensor | None, spec: QuantSpec) -> Codes:
    """The best that is known without correction: search, where the format has it."""
    choose = search if "search" in spec.format.algorithms else rtn
    return choose(rows, importance, spec)
