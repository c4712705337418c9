"""`llmquant report` and `llmquant compare-reports` as people run them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from test_commands import run

sys.path.append(str(Path(__file__).parent.parent / "report"))
from results import make, reference, usual, write

needs_pictures = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


@needs_pictures
def test_report_writes_and_says_where(tmp_path: Path) -> None:
    folder = write(tmp_path / "study", [reference(layers=[]), make("x", layers=[], speed=None)])
    status, out, err = run("report", folder)
    assert (status, out.strip()) == (0, f"report: {folder / 'report.html'}"), err
    assert (folder / "report.md").exists()


def test_report_of_nothing_is_explained(tmp_path: Path) -> None:
    status, _, err = run("report", tmp_path)
    assert status == 2 and "no results here" in err and "results.jsonl" in err


def test_what_changed_is_shown(tmp_path: Path) -> None:
    a = write(tmp_path / "a", usual())
    b = write(tmp_path / "b", [make("int8", 0.5, 53_000_000, 0.004, top1=0.99), *usual()[:4]])
    status, out, err = run("compare-reports", a, b)
    assert status == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert ["int8", "(wikitext2)", "worse"] in [line[:3] for line in lines]
    assert ["broken", "(wikitext2)", "gone"] in [line[:3] for line in lines]
    assert "4 cells equal" in out and "KL 0.0005 -> 0.5, worse" in " ".join(out.split())


def test_the_gate_closes_with_a_reason(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", [make("x")]), write(tmp_path / "b", [make("x", 0.5)])
    status, _, err = run("compare-reports", a, b, "--fail-on-worse")
    assert status == 1 and "x on wikitext2: worse" in err
    assert run("compare-reports", b, a, "--fail-on-worse")[0] == 0
    assert run("compare-reports", a, b)[0] == 0


def test_protocols_come_first(tmp_path: Path) -> None:
    other = make("x")
    other["protocol"] = other["protocol"] | {"context": 64}
    a, b = write(tmp_path / "a", [make("x")]), write(tmp_path / "b", [other])
    status, out, _ = run("compare-reports", a, b)
    assert status == 0 and out.startswith("Different protocols") and "context: 512 -> 64" in out


def test_json_to_a_file_and_alone(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", [make("x")]), write(tmp_path / "b", [make("x", 0.5)])
    status, out, _ = run("compare-reports", a / "results.jsonl", b, "--json", "-")
    assert status == 0 and json.loads(out)["cells"][0]["verdict"] == "worse"
    run("compare-reports", a, b, "--json", tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text()) == json.loads(out)


def test_names_are_not_markup(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", [make("[bold]x")]), write(tmp_path / "b", [make("[bold]x", 0.5)])
    assert "[bold]x" in run("compare-reports", a, b)[1]
