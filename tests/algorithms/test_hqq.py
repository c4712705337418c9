"""HQQ: laws of its l_p norm, and what its threshold is."""

from __future__ import annotations

import pytest
import torch
from cases import ALL_CASES, Case, make_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from test_algorithms import importances, rows_of_all_kinds
from torch import Tensor

from llmquant.algorithms import ALGORITHMS
from llmquant.algorithms.hqq import P, hqq, lp_error, shrink
from llmquant.algorithms.rtn import blocks_and_weights

CASES = [case for case in ALL_CASES if "hqq" in case.format.algorithms]


def error_of(name: str, case: Case, rows: Tensor, importance: Tensor | None) -> Tensor:
    """The l_p error of each block, of what would be stored."""
    spec = case.config.spec(*rows.shape)
    x, weights = blocks_and_weights(rows, importance, spec)
    return lp_error(x, weights, ALGORITHMS[name](rows, importance, spec).qparams, spec)


@settings(max_examples=100)
@given(st.sampled_from(CASES), rows_of_all_kinds(), st.data())
def test_hqq_is_never_worse_than_rtn_in_any_block(case: Case, rows: Tensor, data: st.DataObject) -> None:
    importance = data.draw(importances(rows))
    plain, found = (error_of(name, case, rows, importance) for name in ("rtn", "hqq"))
    assert torch.all(found <= plain * (1 + 1e-4) + 1e-30)


@pytest.mark.parametrize("scheme", ["int2-g32", "int2-g32-asym", "int3-g24-asym", "int4-g64", "int4-g64-asym"])
def test_hqq_is_better_than_rtn_on_normal_weights(scheme: str) -> None:
    case, rows = Case(scheme), make_weight((16, 192))
    plain, found = (error_of(name, case, rows, None).sum() for name in ("rtn", "hqq"))
    assert 0.5 * plain < found < 0.98 * plain


def test_a_symmetric_scale_lies_between_the_plain_one_and_the_best_of_a_fine_grid() -> None:
    """It stays near the plain scale: the least l_p error is that of scales that clip far too much (see `hqq`)."""
    case, rows = Case("int3-g64"), make_weight((16, 64))
    spec = case.config.spec(*rows.shape)
    x, weights = blocks_and_weights(rows, None, spec)
    plain = spec.format.numerics.choose_qparams(x, weights, spec)
    trials = [plain._replace(scale=plain.scale * ratio) for ratio in torch.linspace(0.4, 1.3, 100).tolist()]
    best = torch.stack([lp_error(x, weights, trial, spec) for trial in trials]).amin(0)
    assert 1.02 * best.sum() < lp_error(x, weights, hqq(rows, None, spec).qparams, spec).sum() < 1.15 * best.sum()


def test_the_norm_lets_a_few_errors_be_large() -> None:
    """Of rows with outliers, hqq clips more, and rounds the rest better, than least squares do."""
    rows = make_weight((32, 64), seed=1)
    rows[:, 7] *= 12
    spec = Case("int4-g64-asym").config.spec(*rows.shape)
    ones = torch.ones_like(rows)
    x, _ = blocks_and_weights(rows, None, spec)
    found = {}
    for name in ("hqq", "search"):
        codes = ALGORITHMS[name](rows, ones, spec)
        decoded = spec.format.numerics.decode(codes.codes.view(x.shape), codes.qparams, spec.format)
        found[name] = (decoded - x).abs()
    assert found["hqq"].median() < 0.95 * found["search"].median()
    assert found["hqq"].square().sum() > found["search"].square().sum()


@pytest.mark.parametrize("residual", [0.01, 0.1, 0.3, 0.5, 2.0])
def test_shrinking_solves_its_own_problem(residual: float) -> None:
    """It is one step towards the minimum of |e|^p / p + beta / 2 (e - r)^2: never beyond r, never of the other sign."""
    beta = 10.0
    grid = torch.linspace(0, residual, 20001, dtype=torch.float64)
    exact = grid[(grid.pow(P) / P + beta / 2 * (grid - residual) ** 2).argmin()]
    found = shrink(torch.tensor([residual, -residual], dtype=torch.float64), beta)
    assert found[0] == -found[1] and exact - 1e-3 <= found[0] <= residual
    assert (found[0] == 0) == (residual ** (2 - P) <= 1 / beta)
