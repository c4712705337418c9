"""What changed between two results: verdicts by standard errors, and none where figures do not compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from results import failed, make, parse, reference, usual

from llmquant.report.compare import Cell, Comparison, compare


def compared(folder: Path, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Comparison:
    return compare(parse(folder / "a", before), parse(folder / "b", after))


def cell(folder: Path, before: dict[str, Any], after: dict[str, Any]) -> Cell:
    (only,) = compared(folder, [before], [after]).cells
    return only


def test_equal_results_are_equal(tmp_path: Path) -> None:
    found = compared(tmp_path, usual(), usual())
    assert {c.verdict for c in found.cells} == {"equal"} and len(found.cells) == len(usual())
    assert not found.protocol and not found.versions and not found.failing()


def test_new_and_gone_cells(tmp_path: Path) -> None:
    found = compared(tmp_path, [reference(), make("old")], [reference(), make("new")])
    assert [(c.label, c.verdict) for c in found.cells] == [("16 bits", "equal"), ("old", "gone"), ("new", "new")]
    assert found.failing() == ["old on wikitext2: gone"]


@pytest.mark.parametrize(
    ("kl", "verdict"),
    [(0.1, "equal"), (0.1055, "within error"), (0.0945, "within error"), (0.107, "worse"), (0.094, "better")],
)
def test_two_standard_errors_of_the_difference(tmp_path: Path, kl: float, verdict: str) -> None:
    """Errors of 0.002 on both sides make 0.00283, and two of these 0.00566."""
    after = make("x", 0.1)
    after["kl"]["mean"] = kl
    found = cell(tmp_path, make("x", 0.1), after)
    change = next(change for change in found.changes if change.figure == "KL")
    assert found.verdict == verdict
    assert (change.before, change.after) == (0.1, kl) and change.stderr == pytest.approx(0.002 * 2**0.5)


@pytest.mark.parametrize(
    ("fields", "verdict", "figure"),
    [
        ({"change": 0.03}, "worse", "perplexity change"),
        ({"change": 0.01}, "better", "perplexity change"),
        ({"top1": 0.90}, "better", "top-1"),
        ({"top1": 0.85}, "worse", "top-1"),
        ({"top1": 0.88}, "within error", None),
        ({"nonfinite": {"logits": 1, "tokens": 1}}, "worse", "not finite"),
        ({"size": 49_000_000}, "better", "bytes"),
        ({"size": 50_010_000}, "within error", None),
    ],
)
def test_every_figure_has_its_direction(
    tmp_path: Path, fields: dict[str, Any], verdict: str, figure: str | None
) -> None:
    found = cell(tmp_path, make("x"), make("x", **fields))
    assert found.verdict == verdict
    assert [change.figure for change in found.changes if change.better is not None] == ([figure] if figure else [])


def test_better_and_worse_are_mixed(tmp_path: Path) -> None:
    found = compared(tmp_path, [make("x")], [make("x", size=40_000_000, change=0.5)])
    assert found.cells[0].verdict == "mixed" and found.failing()


@pytest.mark.parametrize(
    ("metric", "verdict"), [("acc", "better"), ("word_perplexity", "worse"), ("bits_per_byte", "worse")]
)
def test_tasks_know_what_is_better(tmp_path: Path, metric: str, verdict: str) -> None:
    def row(value: float, version: int = 1) -> dict[str, Any]:
        return make("x", tasks={"t": {"version": version, "metrics": {metric: {"value": value, "stderr": 0.01}}}})

    assert cell(tmp_path, row(0.5), row(0.6)).verdict == verdict
    assert cell(tmp_path, row(0.5), row(0.501)).verdict == "within error"
    assert cell(tmp_path, row(0.5), row(0.9, version=2)).verdict == "equal"


def test_another_protocol_gives_no_verdict(tmp_path: Path) -> None:
    after = make("x", 9.0)
    after["protocol"] = after["protocol"] | {"context": 64, "backend": "native"}
    found = compared(tmp_path, [make("x")], [after])
    assert found.cells[0].verdict == "not comparable" and "context" in found.cells[0].notes[0]
    assert found.protocol == (("context", "512", "64"),) and ("backend", "torch", "native") in found.versions
    assert found.failing() == ["x on wikitext2: not comparable"]


def test_another_model_under_the_name_gives_no_verdict(tmp_path: Path) -> None:
    found = cell(tmp_path, make("x"), make("x", 9.0, keys={"model": "bb"}))
    assert found.verdict == "not comparable" and found.notes == ("another 16-bit model",)


def test_other_versions_are_told_and_compared(tmp_path: Path) -> None:
    found = compared(tmp_path, [make("x")], [make("x", versions={"torch": "2.14.0", "llmquant": "1"})])
    assert found.versions == (("torch", "2.13.0", "2.14.0"), ("llmquant", "not recorded", "1"))
    assert found.cells[0].verdict == "equal"


def test_failures_on_either_side(tmp_path: Path) -> None:
    good, bad = make("x"), failed("x")
    assert cell(tmp_path, good, bad).verdict == "worse" and "a weight is NaN" in cell(tmp_path, good, bad).notes[0]
    assert cell(tmp_path, bad, good).verdict == "better"
    assert cell(tmp_path, bad, bad).verdict == "equal"


def test_two_single_results_are_matched_whatever_their_names(tmp_path: Path) -> None:
    found = cell(tmp_path, make("main/int4", model="a"), make("branch/int4", change=0.5, model="b"))
    assert found.verdict == "worse"


def test_the_comparison_is_json(tmp_path: Path) -> None:
    content = compared(tmp_path, usual(), [make("int8"), *usual()[:3]]).to_dict()
    assert json.loads(json.dumps(content, allow_nan=False))["schema"] == 1
