"""What lies in a study's folder is whole, or named and computed again; two sweeps do not share it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmquant.errors import StudyLockedError
from llmquant.study.store import Store


def test_what_was_written_is_read(tmp_path: Path) -> None:
    with Store(tmp_path / "s").opened() as store:
        store.write("k", "quality", {"a": [1, None]}, "a title")
        store.write_failure("f", "quality", {"what": "why"}, "another")
    later = Store(tmp_path / "s")
    assert later.read("k") == {"a": [1, None]} and later.read("other") is None
    assert later.read_failure("f") == {"what": "why"} and later.read_failure("k") is None
    assert [(line["kind"], line["key"], line.get("failed")) for line in later.journal()] == [
        ("quality", "k", None),
        ("quality", "f", "why"),
    ]


def test_a_result_ends_a_failure(tmp_path: Path) -> None:
    with Store(tmp_path).opened() as store:
        store.write_failure("k", "quality", {"what": "why"})
        store.write("k", "quality", {})
        assert store.read_failure("k") is None


@pytest.mark.parametrize("damage", ["cut", "flip", "foreign", "moved", "binary"])
def test_damaged_entries_are_named_and_not_trusted(tmp_path: Path, damage: str) -> None:
    with Store(tmp_path).opened() as store:
        store.write("k", "quality", {"kl": 0.125})
        path = tmp_path / "cells" / "k.json"
        content = path.read_text()
        if damage == "binary":
            path.write_bytes(b"\xff\x00")
        elif damage == "moved":
            store.write("other", "quality", {"kl": 1})
            path.write_text((tmp_path / "cells" / "other.json").read_text())
        else:
            changed = {"cut": content[:-3], "flip": content.replace("0.125", "0.225"), "foreign": "[1]"}[damage]
            assert changed != content
            path.write_text(changed)
        assert store.read("k") is None
        assert len(store.damaged) == 1 and "k.json: damaged" in store.damaged[0]


def test_a_second_sweep_is_told_who_is_at_work(tmp_path: Path) -> None:
    with Store(tmp_path).opened():
        code = f"from llmquant.study.store import Store\nwith Store({str(tmp_path)!r}).opened(): print('in')"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode != 0 and "in" not in done.stdout.split()
        with pytest.raises(StudyLockedError, match=r"another sweep works in this folder: process \d+ on"):
            Store(tmp_path).opened().__enter__()
    with Store(tmp_path).opened():
        pass


def test_the_lock_goes_with_a_killed_holder(tmp_path: Path) -> None:
    code = (
        "import os, signal\nfrom llmquant.study.store import Store\n"
        f"with Store({str(tmp_path)!r}).opened(): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    with Store(tmp_path).opened():
        pass


def test_drafts_of_a_killed_sweep_are_removed_and_nothing_else(tmp_path: Path) -> None:
    with Store(tmp_path).opened():
        pass
    key = "0123456789abcdef" * 2
    drafts = [
        f"models/.{key}.draft-1/",
        f"models/.{key}.changed-x/",
        f"references/.{key}.1.tmp",
        f"cells/.{key}.json.1.draft",
    ]
    kept = [f"models/{key}.partial/", "models/.mine/", ".git/", ".results.jsonl", ".env", "references/.keep"]
    for name in drafts + kept:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("half")
    with Store(tmp_path).opened():
        assert not any((tmp_path / name).exists() for name in drafts)
        assert all((tmp_path / name).exists() for name in kept)


def test_models_marked_to_stay_are_not_dropped(tmp_path: Path) -> None:
    with Store(tmp_path).opened() as store:
        for key in ("a", "b"):
            store.model(key).mkdir()
        store.keep_model("a")
        store.drop_model("a")
        store.drop_model("b")
        assert store.model("a").is_dir() and not store.model("b").exists()


def test_a_torn_line_of_the_journal_costs_that_line(tmp_path: Path) -> None:
    with Store(tmp_path).opened() as store:
        store.write("a", "quality", {})
        with (tmp_path / "journal.jsonl").open("a") as file:
            file.write('{"kind": "qual')
        store.write("b", "quality", {})
        assert [line["key"] for line in store.journal()] == ["a", "b"]


def test_results_are_lines_of_json(tmp_path: Path) -> None:
    with Store(tmp_path).opened() as store:
        path = store.write_results([{"a": 1}, {"b": None}])
        assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 1}, {"b": None}]
        with pytest.raises(ValueError, match="JSON"):
            store.write_results([{"a": float("nan")}])
        assert len(path.read_text().splitlines()) == 2
