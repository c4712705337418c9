import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmquant.errors import MissingDependencyError, TextError
from llmquant.measure.text import load_text


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load: object) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))


def test_builtin_is_the_default_the_same_twice_and_long_enough_for_windows() -> None:
    text = load_text()
    assert text == load_text("builtin") and text.name == "builtin"
    assert 300_000 < len(text.content) < 3_000_000


def test_builtin_joins_every_topic_in_order_of_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pydoc_data.topics.topics", {"b": "second\n", "a": "first\n", "c": "third"})
    assert load_text().content == "first\n\nsecond\n\nthird"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip))
def test_a_file_is_read_byte_for_byte(tmp_path: Path, content: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content.encode())
    text = load_text(str(path))
    assert text.content == content
    assert text.name == str(path)
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("content", ["one\r\ntwo\rthree\n\n", "\ufeffwith a mark", "  leading"])
def test_newlines_marks_and_spaces_stay(tmp_path: Path, content: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content.encode())
    assert load_text(str(path)).content == content


@pytest.mark.parametrize(
    ("content", "what"), [(b"", "empty"), (b" \n\t\n", "empty"), (b"ok \xff", "byte 3"), (None, "No such file")]
)
def test_what_cannot_be_read_says_what_where_and_what_to_try(tmp_path: Path, content: bytes | None, what: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TextError, match=what) as caught:
        load_text(str(path))
    assert caught.value.where == str(path) and caught.value.hint


@pytest.mark.parametrize("path", ["", "a\0b", "."])
def test_a_path_that_is_no_file_is_a_text_error(path: str) -> None:
    with pytest.raises(TextError):
        load_text(path)


def test_rows_of_wikitext_are_joined_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, calls = ["", " = Title = \n", "a line\n"], []

    def load(*names: str, split: str) -> dict[str, list[str]]:
        calls.append((*names, split))
        return {"text": rows}

    fake_datasets(monkeypatch, load)
    text = load_text("wikitext2")
    assert (text.name, text.content) == ("wikitext2", " = Title = \na line\n")
    assert [call[0].endswith("wikitext") and call[1:] for call in calls] == [("wikitext-2-raw-v1", "test")]


def test_wikitext_without_datasets_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"pip install llmquant\[wikitext\]"):
        load_text("wikitext2")


@pytest.mark.parametrize("failure", [ConnectionError("offline"), ValueError("no cache"), RuntimeError("hub")])
def test_a_failing_hub_suggests_the_builtin_text(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    def load(*names: str, split: str) -> None:
        raise failure

    fake_datasets(monkeypatch, load)
    with pytest.raises(TextError, match=str(failure)) as caught:
        load_text("wikitext2")
    assert "builtin" in str(caught.value.hint) and "path" in str(caught.value.hint)
