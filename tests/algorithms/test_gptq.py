"""GPTQ against a slow reference that eliminates one column at a time, and the laws of what it gains."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import ALL_CASES, Case, make_weight
from torch import Tensor

from llmquant.algorithms import ALGORITHMS, Codes
from llmquant.algorithms.gptq import DAMPING, factorize, gptq, round_columns
from llmquant.algorithms.search import search
from llmquant.config.base import WeightOnlyConfig
from llmquant.errors import BadWeightError, CalibrationError
from llmquant.primitives.blockfloat import reach
from llmquant.primitives.blocks import from_blocks, to_blocks
from llmquant.primitives.granularity import PerGroup
from llmquant.primitives.spec import QParams, QuantSpec
from llmquant.primitives.stats import InputStats
from llmquant.quantize import quantize_weight

CASES = [case for case in ALL_CASES if "gptq" in case.format.algorithms and case.config._has("gptq")]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def correlated(columns: int, tokens: int = 400, seed: int = 0) -> Tensor:
    """Inputs [tokens, columns] whose columns go together and differ in size, as those of language models."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return (mixed / columns**0.5 + torch.randn(tokens, columns, generator=generator) * 0.3) * torch.rand(
        columns, generator=generator
    ).exp()


def stats_of(x: Tensor) -> InputStats:
    hessian = x.T @ x / len(x)
    return InputStats(mean_square=hessian.diagonal(), hessian=hessian, tokens=torch.tensor(len(x)))


def refuse(text: str) -> None:
    raise AssertionError(text)


def values(codes: Codes, spec: QuantSpec) -> Tensor:
    decoded = spec.format.numerics.decode(to_blocks(codes.codes, spec.block), codes.qparams, spec.format)
    return from_blocks(decoded, *codes.codes.shape, spec.block)


def one_by_one(rows: Tensor, qparams: QParams, hessian: Tensor, spec: QuantSpec) -> Tensor:
    """Decoded values: each column in turn is rounded, and the others move to where the output's error is least.

    Optimal brain surgery from its definition: the inverse of the Hessian of the columns that are left is computed anew
    after each.
    """
    left, found = rows.double().clone(), torch.empty_like(rows)
    damped = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    for i, column in enumerate(order):
        rest = order[i:]
        inverse = torch.linalg.inv(damped[rest][:, rest])
        group = column // spec.block[1]
        own = QParams(*(None if q is None else q[:, group : group + 1] for q in qparams))  # type: ignore[arg-type]
        x = left[:, column].float()[:, None, None]
        found[:, column] = spec.format.numerics.decode(
            spec.format.numerics.encode(x, own, spec.format), own, spec.format
        )[:, 0, 0]
        error = (left[:, column] - found[:, column].double()) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0]
    return found


@pytest.mark.parametrize("columns", [40, 150])
@pytest.mark.parametrize("scheme", ["int4-g32", "int3-g16-asym", "int8-row", "mxfp4", "nvfp4"])
def test_it_does_what_elimination_column_by_column_does(scheme: str, columns: int) -> None:
    case, x = Case(scheme), correlated(columns)
    rows = make_weight((6, columns)) * 0.02
    spec, stats = case.config.spec(6, columns), stats_of(x)
    chosen = gptq(stats, refuse)(rows, None, spec)
    wanted = one_by_one(rows, chosen.qparams, x.T @ x / len(x), spec)
    found = values(chosen, spec)
    # A value may lie within rounding of the middle between two codes; then all that follow may differ.
    same = ((found - wanted).abs().amax(1) <= 1e-5 * wanted.abs().max()).sum()
    assert same >= 5
    assert not torch.equal(found, values(Codes(search(rows, None, spec).codes, chosen.qparams), spec))


@every_case
def test_its_output_error_is_lower_and_its_weight_error_higher_than_those_of_plain_rounding(case: Case) -> None:
    x, rows = correlated(192), make_weight((12, 192)) * 0.02
    spec = case.config.spec(*rows.shape)
    if spec.row_scale:
        rows *= reach(spec) / rows.abs().amax(1, keepdim=True)  # as algorithms get them
    chosen = gptq(stats_of(x), refuse)(rows, None, spec)
    plain = Codes(spec.format.numerics.encode(to_blocks(rows, spec.block), chosen.qparams, spec.format), chosen.qparams)
    plain = plain._replace(codes=from_blocks(plain.codes, *rows.shape, spec.block))
    corrected, rounded = (values(codes, spec) - rows for codes in (chosen, plain))
    assert (corrected @ x.T).square().sum() < 0.95 * (rounded @ x.T).square().sum()
    assert corrected.square().sum() > rounded.square().sum()


def test_columns_are_visited_from_the_loudest_to_the_quietest() -> None:
    x = correlated(64)
    factor = factorize(x.T @ x / len(x))
    assert factor is not None
    loud = x.square().mean(0)[factor.order]
    assert torch.all(loud[:-1] >= loud[1:]) and torch.equal(factor.order.sort().values, torch.arange(64))


def test_the_factor_is_that_of_the_inverse() -> None:
    x = correlated(48).double()
    hessian = x.T @ x / len(x)
    factor = factorize(hessian.float())
    assert factor is not None and torch.equal(factor.upper, factor.upper.triu())
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(48)
    inverse = torch.linalg.inv(damped[factor.order][:, factor.order])
    upper = factor.upper.double()
    torch.testing.assert_close(upper.T @ upper, inverse, rtol=1e-3, atol=1e-4 * float(inverse.abs().max()))


def test_inputs_that_are_independent_change_nothing() -> None:
    spec, rows = Case("int4-g32").config.spec(5, 96), make_weight((5, 96)) * 0.02
    stats = InputStats(hessian=torch.diag(torch.rand(96) + 0.5))
    start = search(rows, None, spec)
    assert torch.equal(gptq(stats, refuse)(rows, None, spec).codes, start.codes)


def test_columns_that_are_always_zero_take_nothing_from_others() -> None:
    """They cost nothing at the output, so errors could hide in them; they are rounded as they are."""
    x = correlated(64)
    x[:, 5] = 0
    spec, rows = Case("int4-g32").config.spec(5, 64), make_weight((5, 64)) * 0.02
    found = gptq(stats_of(x), refuse)(rows, None, spec)
    assert torch.equal(found.codes[:, 5], search(rows, None, spec).codes[:, 5])


def test_rows_do_not_depend_on_each_other() -> None:
    x, rows = correlated(200), make_weight((9, 200)) * 0.02
    spec, choose = Case("int4-g32").config.spec(9, 200), gptq(stats_of(x), refuse)
    whole = choose(rows, None, spec)
    for part in (slice(0, 4), slice(4, 9)):
        assert torch.equal(choose(rows[part], None, spec).codes, whole.codes[part])


# --- what cannot be done, and what is done then -------------------------------------------------------------


def test_more_damping_and_then_search_are_noted() -> None:
    rows, spec = make_weight((5, 64)) * 0.02, Case("int4-g32").config.spec(5, 64)
    indefinite = torch.eye(64) - 0.03 * torch.ones(64, 64)  # its lowest eigenvalue is 1 - 0.03 * 64
    notes: list[str] = []
    gptq(InputStats(hessian=indefinite + torch.eye(64) * 0.9), notes.append)(rows, None, spec)
    assert len(notes) == 1 and "10% of damping" in notes[0]
    notes.clear()
    found = gptq(InputStats(hessian=indefinite - torch.eye(64) * 2), notes.append)(rows, None, spec)
    assert len(notes) == 1 and "search" in notes[0]
    assert torch.equal(found.codes, search(rows, None, spec).codes)


def test_it_needs_a_hessian_of_the_right_width() -> None:
    config = WeightOnlyConfig("int4", PerGroup(32), algorithm="gptq")
    weight, stats = make_weight((8, 64)), stats_of(correlated(64))
    with pytest.raises(CalibrationError, match="gptq needs a calibration run"):
        quantize_weight(weight, config)
    with pytest.raises(CalibrationError, match="gptq"):
        quantize_weight(weight, config, replace(stats, hessian=None))
    with pytest.raises(BadWeightError, match="hessian"):
        quantize_weight(weight, config, replace(stats, hessian=torch.eye(32)))


def test_a_weight_gets_the_codes_that_the_algorithm_chose() -> None:
    """Through formats whose rows or matrices have an outer scale too."""
    x, weight = correlated(128), make_weight((300, 128)).bfloat16()
    for scheme in ("int4-g32", "int3-g32-asym", "nvfp4", "nf4"):
        config = Case(scheme).config
        plain, chosen = (
            quantize_weight(weight, config.with_algorithm(name), stats_of(x)).dequantize() - weight
            for name in (config.algorithm or "", "gptq")
        )
        assert (chosen.float() @ x.T).square().sum() < 0.9 * (plain.float() @ x.T).square().sum()


def test_a_stack_of_experts_has_a_hessian_each() -> None:
    xs = [correlated(64, seed=seed) for seed in range(3)]
    weight, config = make_weight((3, 8, 64)), WeightOnlyConfig("int4", PerGroup(32), algorithm="gptq")
    own = [stats_of(x) for x in xs]
    stacked = InputStats(hessian=torch.stack([s.hessian for s in own if s.hessian is not None]))
    whole = quantize_weight(weight, config, stacked)
    for index in range(3):
        assert torch.equal(whole[index], quantize_weight(weight[index], config, InputStats(hessian=own[index].hessian)))


def test_plain_algorithms_do_not_know_of_calibration() -> None:
    assert "gptq" not in ALGORITHMS and callable(round_columns)
