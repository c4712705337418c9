"""Algorithms: laws that hold for any rows."""

from __future__ import annotations

import pytest
import torch
from cases import ALL_CASES, Case, make_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmquant.algorithms import ALGORITHMS, CALIBRATED
from llmquant.algorithms.rtn import Codes, blocks_and_weights
from llmquant.algorithms.search import weighted_error
from llmquant.formats import METHODS
from llmquant.primitives.blockfloat import reach
from llmquant.primitives.blocks import from_blocks, to_blocks
from llmquant.primitives.metrics import compute_error
from llmquant.primitives.spec import QuantSpec

SEARCHED = [case for case in ALL_CASES if "search" in case.format.algorithms]


def spec_of(case: Case, rows: Tensor) -> QuantSpec:
    return case.config.spec(*rows.shape)


def handed_over(rows: Tensor, case: Case) -> Tensor:
    """Rows as algorithms get them: with a scale of their own taken off, where the format has one."""
    if not case.row_scale:
        return rows
    largest = reach(spec_of(case, rows))
    return rows * (largest / rows.abs().amax(1, keepdim=True).clamp(min=1e-30))


def values(codes: Codes, spec: QuantSpec) -> Tensor:
    """The decoded rows."""
    decoded = spec.format.numerics.decode(to_blocks(codes.codes, spec.block), codes.qparams, spec.format)
    return from_blocks(decoded, *codes.codes.shape, spec.block)


def search_weights(rows: Tensor, spec: QuantSpec) -> Tensor:
    """What search takes for the importance of an element when nobody says: |x| + sqrt(2 mean x^2) of its block."""
    found = rows.double().abs()
    for top in range(0, rows.shape[0], spec.block[0]):
        for left in range(0, rows.shape[1], spec.block[1]):
            block = slice(top, top + spec.block[0]), slice(left, left + spec.block[1])
            found[block] += (2 * rows[block].double().square().mean()).sqrt()
    return found


def errors(rows: Tensor, importance: Tensor | None, codes: Codes, spec: QuantSpec) -> Tensor:
    """Weighted squared error of each block in float64, from what would be stored."""
    weights = search_weights(rows, spec) if importance is None else importance.double()
    error = (values(codes, spec).double() - rows.double()).square() * weights
    return to_blocks(error, spec.block).sum(-1)


@st.composite
def rows_of_all_kinds(draw: st.DrawFn) -> Tensor:
    """Normal rows, with outliers, constants, zeros, tiny or one-sided values, of any length."""
    count, columns = draw(st.integers(1, 4)), draw(st.integers(1, 80))
    rows = make_weight((count, columns), seed=draw(st.integers(0, 1000)))
    for i in range(count):
        kind = draw(st.sampled_from(["normal", "outlier", "constant", "zero", "tiny", "one-sided", "large"]))
        if kind == "outlier":
            rows[i, draw(st.integers(0, columns - 1))] *= 100
        elif kind == "constant":
            rows[i] = draw(st.floats(-2, 2, width=16))
        elif kind == "zero":
            rows[i] = 0
        elif kind == "tiny":
            rows[i] *= 1e-6
        elif kind == "one-sided":
            rows[i] = rows[i].abs() + 0.5
        elif kind == "large":
            rows[i] *= 1e4
    return rows


@st.composite
def importances(draw: st.DrawFn, rows: Tensor) -> Tensor | None:
    if draw(st.booleans()):
        return None
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    weights = torch.exp(2 * torch.randn(rows.shape, generator=generator))
    return torch.where(torch.rand(rows.shape, generator=generator) < 0.2, 0, weights)


@settings(max_examples=150)
@given(st.sampled_from(SEARCHED), rows_of_all_kinds(), st.data())
def test_search_is_never_worse_than_rtn_in_any_block(case: Case, rows: Tensor, data: st.DataObject) -> None:
    importance = data.draw(importances(rows))
    spec = spec_of(case, rows)
    plain = errors(rows, importance, ALGORITHMS["rtn"](rows, importance, spec), spec)
    found = errors(rows, importance, ALGORITHMS["search"](rows, importance, spec), spec)
    assert torch.all(found <= plain * (1 + 1e-4) + 1e-30)


@pytest.mark.parametrize(
    "case", [c for c in SEARCHED if c.scheme not in ("int1-g32", "int1-row", "int1-tensor")], ids=str
)
def test_search_is_better_than_rtn_on_normal_weights(case: Case) -> None:
    rows = handed_over(make_weight((8, 192)), case)
    spec = spec_of(case, rows)
    plain, found = (
        errors(rows, None, ALGORITHMS[name](rows, None, spec), spec).sum().item() for name in ("rtn", "search")
    )
    assert 0.3 * plain < found < plain


@settings(max_examples=100)
@given(st.sampled_from(ALL_CASES), rows_of_all_kinds())
def test_shapes_dtypes_and_code_range(case: Case, rows: Tensor) -> None:
    spec = spec_of(case, rows)
    blocks = to_blocks(rows, spec.block)
    for name in ALGORITHMS.keys() & set(case.format.algorithms):
        codes, qparams = ALGORITHMS[name](rows, None, spec)
        assert codes.dtype == torch.uint8 and codes.shape == rows.shape
        assert int(codes.max()) <= spec.format.top_code
        assert qparams.scale.shape == blocks.shape[:2] and qparams.scale.dtype == spec.scale_dtype
        assert qparams.scale.isfinite().all()
        assert (qparams.zero_point is not None) == case.asymmetric
        assert values(Codes(codes, qparams), spec).isfinite().all()


ROWS_APART = [c for c in ALL_CASES if "-tensor" not in c.scheme and "-b3x32" not in c.scheme]


@pytest.mark.parametrize("case", ROWS_APART, ids=str)
def test_rows_are_independent(case: Case) -> None:
    rows = make_weight((9, 70), seed=1)
    importance = torch.rand(9, 70, generator=torch.Generator().manual_seed(1))
    spec = spec_of(case, rows)
    for name in ALGORITHMS.keys() & set(case.format.algorithms):
        whole = ALGORITHMS[name](rows, importance, spec)
        for part in (slice(0, 4), slice(4, 9), slice(8, 9)):
            found = ALGORITHMS[name](rows[part], importance[part], spec)
            assert torch.equal(found.codes, whole.codes[part])
            for a, b in zip(found.qparams, whole.qparams, strict=True):
                assert (a is None and b is None) or torch.equal(a, b[part])


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_inputs_stay_as_they_are(case: Case) -> None:
    rows, importance = make_weight((3, 70)), torch.rand(3, 70)
    before = rows.clone(), importance.clone()
    for name in ALGORITHMS.keys() & set(case.format.algorithms):
        ALGORITHMS[name](rows, importance, spec_of(case, rows))
    assert torch.equal(rows, before[0]) and torch.equal(importance, before[1])


@pytest.mark.parametrize("case", [c for c in SEARCHED if "-g" in c.scheme and c.format.bits in (2, 3, 4)], ids=str)
def test_search_serves_the_columns_that_matter(case: Case) -> None:
    rows = handed_over(make_weight((16, 96), seed=2), case)
    heavy = torch.arange(96) % 8 == 0
    importance = torch.where(heavy, 100.0, 1.0).expand_as(rows).contiguous()
    spec = spec_of(case, rows)
    plain = values(ALGORITHMS["search"](rows, None, spec), spec)
    weighted = values(ALGORITHMS["search"](rows, importance, spec), spec)
    assert (weighted - rows)[:, heavy].square().sum() < 0.98 * (plain - rows)[:, heavy].square().sum()
    assert (weighted - rows)[:, ~heavy].square().sum() > (plain - rows)[:, ~heavy].square().sum()


@pytest.mark.parametrize("case", [c for c in SEARCHED if c.scheme != "int1-g32"][:20], ids=str)
def test_what_weighs_nothing_does_not_matter(case: Case) -> None:
    """A column of outliers without weight costs the others nothing that search could avoid."""
    rows = make_weight((6, 32), seed=3)
    rows[:, 5] = rows[:, 5].sign() * 0.1
    importance = torch.ones_like(rows)
    importance[:, 5] = 0
    spec = spec_of(case, rows)
    ignored = ALGORITHMS["search"](rows, importance, spec)
    counted = ALGORITHMS["search"](rows, None, spec)
    assert errors(rows, importance, ignored, spec).sum() <= errors(rows, importance, counted, spec).sum() * 1.0001


def test_search_compares_with_the_errors_of_what_will_be_stored() -> None:
    case = Case("int3-g32-asym")
    rows = make_weight((4, 70), seed=4)
    spec = spec_of(case, rows)
    for name in ALGORITHMS.keys() & set(case.format.algorithms):
        codes = ALGORITHMS[name](rows, None, spec)
        x, weights = blocks_and_weights(rows, None, spec)
        found = weighted_error(x, weights, codes.qparams, spec).double()
        torch.testing.assert_close(found, errors(rows, torch.ones_like(rows), codes, spec))


@pytest.mark.parametrize("case", [c for c in SEARCHED if c.scheme.startswith(("int2-g32", "int4-g32"))], ids=str)
def test_search_is_close_to_the_best_of_a_fine_grid(case: Case) -> None:
    """An oracle with a hundred scales (and every zero point): search loses at most 3 % of squared error to it."""
    rows = make_weight((6, 32), seed=5)
    spec = spec_of(case, rows)
    numerics, x = spec.format.numerics, rows.unsqueeze(1)
    weights = search_weights(rows, spec).float().unsqueeze(1)
    plain = numerics.choose_qparams(x, weights, spec)
    points = range(2**spec.format.bits) if case.asymmetric else [None]
    best = torch.full(plain.scale.shape, float("inf"))
    for ratio in torch.linspace(0.4, 1.3, 100).tolist():
        for point in points:
            zeros = None if point is None else torch.full_like(plain.zero_point, point)
            trial = plain._replace(scale=(plain.scale.float() * ratio).to(spec.scale_dtype), zero_point=zeros)
            best = best.minimum(weighted_error(x, weights, trial, spec))
    found = errors(rows, None, ALGORITHMS["search"](rows, None, spec), spec).sum().item()
    assert 0.9 * best.sum().item() < found < 1.03 * best.sum().item()


def test_without_importance_search_weighs_large_weights_more() -> None:
    rows = make_weight((16, 96), seed=7)
    for case in (Case("int4-g32"), Case("int3-g32-asym"), Case("int2-row"), Case("int5-tensor")):
        spec = spec_of(case, rows)
        found = ALGORITHMS["search"](rows, None, spec)
        expected = ALGORITHMS["search"](rows, search_weights(rows, spec).float(), spec)
        assert torch.allclose(errors(rows, None, found, spec), errors(rows, None, expected, spec), rtol=1e-3)
        flat = ALGORITHMS["search"](rows, torch.ones_like(rows), spec)
        assert errors(rows, None, found, spec).sum() < errors(rows, None, flat, spec).sum()
        ones = torch.ones_like(rows)
        assert errors(rows, ones, flat, spec).sum() < errors(rows, ones, found, spec).sum()


def test_the_table_of_methods_says_what_each_algorithm_needs() -> None:
    assert {name for name, method in METHODS.items() if not method.needs} == set(ALGORITHMS)
    assert {name for name, method in METHODS.items() if method.needs == "hessian"} == set(CALIBRATED)


def test_search_gains_what_was_measured() -> None:
    """int4 symmetric g32: about half a decibel over rtn."""
    rows = make_weight((32, 512), seed=6)
    spec = spec_of(Case("int4-g32"), rows)
    gain = [float(compute_error(rows, values(ALGORITHMS[n](rows, None, spec), spec))) for n in ("rtn", "search")]
    assert 0.3 < gain[1] - gain[0] < 0.8
