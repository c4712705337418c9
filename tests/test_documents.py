"""JSON and YAML of unknown origin: plain data is read as always; whatever could cost or mean more is refused."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llmquant import documents
from llmquant.documents import DEEPEST, parse_json, parse_yaml, read_bytes, read_json, read_yaml
from llmquant.errors import DocumentError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(VALUES)
def test_whatever_json_can_say_is_read(value: Any) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value
    assert parse_json(json.dumps(value, indent=2).encode()) == value


@given(VALUES)
def test_whatever_yaml_says_in_plain_values_is_read(value: Any) -> None:
    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    text = yaml.dump(value, Dumper=Dumper, allow_unicode=True)
    if "!!" not in text:  # dates among keys, and the like
        assert parse_yaml(text.encode()) == yaml.safe_load(text)


JSON: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "no JSON"),
    "cut": (b'{"a": 1', "no JSON"),
    "no UTF-8": (b'"\xff"', "utf-8"),
    "a key twice": (b'{"a": 1, "b": 2, "a": 1}', "'a' stands twice"),
    "a key twice, deep inside": (b'[{"x": {"a": 1, "\\u0061": 2}}]', "stands twice"),
    "too deep": (b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1), "deeper"),
    "a million deep": (b"[" * 10**6, "too many|deeper"),
    "a million objects deep": (b'{"a":' * 10**6, "too many|deeper"),
    "many lists": (b"[" + b"[]," * 3_000_000 + b"0]", "too many"),
    "many objects": (b"[" + b"{}," * 2_000_000 + b"0]", "too many"),
    "a number of 5000 digits": (b"1" * 5000, "no JSON"),
}


@pytest.mark.parametrize("kind", JSON)
def test_json_that_is_refused(kind: str) -> None:
    with pytest.raises(DocumentError, match=JSON[kind][1]):
        parse_json(JSON[kind][0])


def test_nesting_counts_brackets_outside_of_texts() -> None:
    text = json.dumps(["[" * 1000 + '\\"{' * 50, *[[]] * 100])
    assert parse_json(text.encode()) == json.loads(text)
    just = "[" * DEEPEST + "]" * DEEPEST
    assert parse_json(just.encode()) == json.loads(just)


YAML: dict[str, tuple[bytes, str]] = {
    "a billion laughs": (b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "anchors"),
    "a list that holds itself": (b"&a [*a]", "anchors"),
    "an anchor alone": (b"a: &a 1", "anchors"),
    "a tag of Python": (b"!!python/object/apply:os.system ['true']", "tags"),
    "a tag of YAML": (b"a: !!binary aGFsbG8=", "tags"),
    "a key twice": (b"a: 1\na: 2", "twice"),
    "a key twice, inside": (b"x: {a: 1, 'a': 2}", "twice"),
    "too deep": (b"[" * 65 + b"]" * 65, "deeper"),
    "mappings too deep": (b"{a: " * 100_000, "deeper"),
    "dashes too deep": (b"- " * 100_000, "deeper"),
    "too many values": (b"[" + b"0," * 50_000 + b"0]", "too many"),
    "two documents": (b"a: 1\n---\nb: 2", "single document"),
    "a date that is none": (b"a: 2001-99-99", "month"),
    "a number of 5000 digits": (b"a: " + b"1" * 5000, "digits"),
    "a key that is a list": (b"? [a]\n: b", "mapping"),
    "no UTF-8": (b"a: \xff", "utf-8"),
    "a control character": (b"a: \x00", "control"),
    "tabs": (b"a:\n\tb: 1", "no YAML"),
    "a hexadecimal number without digits": (b"a: 0x_", "no YAML"),
}


@pytest.mark.parametrize("kind", YAML)
def test_yaml_that_is_refused(kind: str) -> None:
    with pytest.raises(DocumentError, match=YAML[kind][1]):
        parse_yaml(YAML[kind][0])


HEAVY: dict[str, tuple[Callable[[bytes], Any], Callable[[], bytes]]] = {
    "lists": (parse_json, lambda: b"[" + b"[]," * 330_000 + b"0]"),
    "objects": (parse_json, lambda: b"[" + b"{}," * 170_000 + b"0]"),
    "objects of one": (parse_json, lambda: b"[" + b'{"":0},' * 115_000 + b"0]"),
    "numbers": (parse_json, lambda: b"[" + b"999," * 740_000 + b"0]"),
    "keys": (parse_json, lambda: ("{" + ",".join(f'"{i}":"{i}"' for i in range(200_000)) + "}").encode()),
    "wide letters": (parse_json, lambda: ('["' + "\U0001f600" * 2_000_000 + '"]').encode()),
    "one wide letter": (parse_json, lambda: ('["' + "a" * 8_000_000 + '\U0001f600"]').encode()),
    "one text": (parse_json, lambda: b'["' + b"a" * 50_000_000 + b'"]'),
    "values of YAML": (parse_yaml, lambda: b"[" + b"[]," * 19_000 + b"0]"),
    "a mapping of YAML": (parse_yaml, lambda: b"".join(b"a%d: b\n" % i for i in range(19_000))),
}


@pytest.mark.parametrize("kind", HEAVY)
def test_what_is_read_takes_no_more_than_its_size_and_64_mb(kind: str) -> None:
    """Each is near its limit: half as much again, or twice, is refused."""
    parse, make = HEAVY[kind]
    raw = make()
    tracemalloc.start()
    parse(raw)
    peak = tracemalloc.get_traced_memory()[1]  # without the bytes, which are given back where they come from a file
    tracemalloc.stop()
    assert peak < len(raw) + 64e6
    if parse is parse_json:
        with pytest.raises(DocumentError, match="too many"):
            parse(b"[" + raw + b"," + raw + b"," + raw + b"]")


def test_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"[1]" + b" " * 97)
    assert read_json(tmp_path / "x", 100) == read_yaml(tmp_path / "x", 100) == [1]
    for read in (read_json, read_yaml, read_bytes):
        with pytest.raises(DocumentError, match="100 bytes, where 99"):
            read(tmp_path / "x", 99)


def test_reading_a_small_file_sets_little_aside(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"[1]")
    tracemalloc.start()
    read_json(tmp_path / "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6 < documents.LARGEST_JSON


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(DocumentError, match="regular"):
            read_json(path)
    with pytest.raises(DocumentError, match="No such file"):
        read_json(tmp_path / "nowhere")
