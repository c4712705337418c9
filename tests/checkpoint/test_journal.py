"""A journal tells what is finished, and nothing else, whatever happened to the end of its file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from llmquant.checkpoint.journal import Journal, run_key
from llmquant.errors import UnfinishedRunError

KEY = run_key("this", 1)


def written(path: Path, *names: str) -> bytes:
    """A journal with these names in it."""
    journal = Journal(path, KEY)
    for name in names:
        journal.add({name: {"key": name * 3}})
    journal.close()
    return path.read_bytes()


def read(path: Path, key: str = KEY) -> list[str]:
    journal = Journal(path, key)
    journal.close()
    return list(journal.finished)


def test_it_tells_what_was_noted(tmp_path: Path) -> None:
    written(tmp_path / "j", "a", "b")
    journal = Journal(tmp_path / "j", KEY)
    assert journal.finished == {"a": {"key": "aaa"}, "b": {"key": "bbb"}}
    journal.forget("a")
    journal.add({"c": [1, 2]})
    assert list(journal.finished) == ["b", "c"]
    journal.close()
    assert read(tmp_path / "j") == ["a", "b", "c"]  # whoever forgot says so again


def test_cut_at_any_byte_it_tells_what_was_whole_and_can_be_gone_on_with(tmp_path: Path) -> None:
    content, path = written(tmp_path / "j", "a", "b"), tmp_path / "cut"
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        assert read(path) == ["a", "b"][: max(sum(end <= cut for end in ends) - 1, 0)]
        written(path, "c")
        assert read(path)[-1] == "c" and path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("rubbish", [b"\0" * 40, b"[]\n", b'{"done": "x"}\n', b"5\n", b'{"done": "x", "of"', b"\xff\n"])
def test_rubbish_at_the_end_is_cut_off(rubbish: bytes, tmp_path: Path) -> None:
    content = written(tmp_path / "j", "a")
    (tmp_path / "j").write_bytes(content + rubbish)
    assert read(tmp_path / "j") == ["a"]
    assert (tmp_path / "j").read_bytes() == content


def test_another_runs_journal_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    content = written(tmp_path / "j", "a")
    with pytest.raises(UnfinishedRunError, match="another model") as error:
        Journal(tmp_path / "j", run_key("that", 1))
    assert error.value.where == str(tmp_path) and error.value.hint
    assert (tmp_path / "j").read_bytes() == content
    assert read(tmp_path / "j") == ["a"]  # and it is not kept open


def test_two_at_a_time_are_refused(tmp_path: Path) -> None:
    first = Journal(tmp_path / "j", KEY)
    with pytest.raises(UnfinishedRunError, match="another process"):
        Journal(tmp_path / "j", KEY)
    first.add({"a": 1})
    first.close()
    assert read(tmp_path / "j") == ["a"]


def test_a_full_disk_leaves_the_lines_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "j", KEY)
    journal.add({"a": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            journal.add({"b": 1})
    assert list(journal.finished) == ["a"]
    journal.add({"c": 1})
    journal.close()
    assert read(tmp_path / "j") == ["a", "c"]


@pytest.mark.parametrize("words", [("this", 2), ("this",), ("this", 1, None), ("this", "1")])
def test_a_key_changes_with_every_word(words: tuple) -> None:
    assert run_key(*words) != KEY == run_key("this", 1)
