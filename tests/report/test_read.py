"""Reading results: every damage has a name and a place; what is not known is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from results import PROTOCOL, failed, make, parse, usual, write

from llmquant.errors import ReportError
from llmquant.report.read import read_rows


def test_rows_keep_their_figures(tmp_path: Path) -> None:
    rows = parse(tmp_path, usual())
    assert [row.label for row in rows] == [row["label"] for row in usual()]
    first, last = rows[1], rows[-1]
    assert first.kl and first.kl.mean == 2.5 and first.kl.by_confidence[1].low == 0.25
    assert first.bytes and first.bytes.disk == 20_000_000 and len(first.layers) == 9
    assert last.status == "failed" and last.error and last.error.kind == "BadWeightError" and last.kl is None


def test_a_file_does_as_well_as_its_folder(tmp_path: Path) -> None:
    folder = write(tmp_path, usual())
    assert read_rows(folder) == read_rows(folder / "results.jsonl")


def test_unknown_fields_are_left_out_and_empty_lines_too(tmp_path: Path) -> None:
    write(tmp_path, [make("a", colour="blue")])
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write("\n")
    assert [row.label for row in read_rows(tmp_path)] == ["a"]


def test_control_characters_are_shown_as_such(tmp_path: Path) -> None:
    (row,) = parse(tmp_path, [make("a\x00b\x1b[31m\x7f\ud800", machine={"\x01": ["\x02 \n"]})])
    assert row.label == "a�b�[31m��" and row.machine == {"�": ("� \n",)}


GOOD = json.dumps(make("a"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "empty"),
        (GOOD + "\n" + GOOD[:200], "line 2"),
        (GOOD + "\n[1, 2]\n", "not an object"),
        (GOOD.replace('"top1": 0.873', '"top1": NaN'), "NaN is no JSON"),
        (GOOD.replace('"top1": 0.873', '"top1": 1e999'), "top1"),
        (GOOD.replace('"top1": 0.873', '"top1": "0.873"'), "top1"),
        (GOOD.replace('"kind": "candidate"', '"kind": "other"'), "kind"),
        (GOOD.replace('"schema": 1', '"schema": 2'), "schema 2"),
        (GOOD.replace('"schema": 1', '"schema": null'), "without a schema"),
        (GOOD + "\n" + GOOD, "two results for one cell"),
    ],
)
def test_damage_is_named(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "results.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(ReportError, match=told) as caught:
        read_rows(tmp_path)
    assert "results.jsonl" in str(caught.value.where)


@pytest.mark.parametrize("name", ["missing", "binary"])
def test_what_is_no_text_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ReportError, match=r"no results here|cannot be read"):
        read_rows(tmp_path / name)


def record(**fields: Any) -> dict[str, Any]:
    """As `llmquant eval --json` writes it."""
    row = make("x")
    names = ("protocol", "perplexity", "kl", "top1", "delta_p_rms", "bytes", "versions", "machine")
    return {
        "schema": 2,
        "model": "out/int4",
        "baseline": "m",
        **{name: row[name] for name in names},
        "seconds": 3.0,
    } | fields


@pytest.mark.parametrize("schema", [1, 2])
def test_a_record_of_eval_is_one_row(tmp_path: Path, schema: int) -> None:
    (tmp_path / "x.json").write_text(json.dumps(record(schema=schema), indent=2))
    (row,) = read_rows(tmp_path / "x.json")
    assert (row.label, row.text, row.kind, row.status) == ("out/int4", PROTOCOL["text"], "candidate", "done")
    assert row.kl and row.kl.mean == 0.1 and row.seconds and row.seconds.evaluate == 3.0


def test_a_newer_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(record(schema=3)))
    with pytest.raises(ReportError, match="schema 3; this version reads up to 2"):
        read_rows(tmp_path / "x.json")


def test_a_failed_row_may_have_figures(tmp_path: Path) -> None:
    (row,) = parse(tmp_path, [failed() | {"kl": make("a")["kl"]}])
    assert row.status == "failed" and row.kl is not None
