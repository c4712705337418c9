"""JSON and YAML of unknown origin. What they say is checked where it is used; here, what reading them may cost.

Before a parser builds anything, the file is known to be a regular one within a size, to nest no deeper than `DEEPEST`,
and to hold no more values than `ROOM` bytes of Python objects. A key that stands twice is refused: two programs could
read two things. YAML is plain data (`yaml.SafeLoader`) without tags, anchors and aliases: in a few lines these can say
a billion values.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from llmquant.errors import DocumentError

LARGEST_JSON, LARGEST_YAML = 1 << 26, 1 << 20
DEEPEST = 64
ROOM = 56 << 20
MOST_EVENTS = 40_000  # of YAML: a value is one, a mapping or list two

_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[{]|[\]}]', re.DOTALL)
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_json(path: str | Path, largest: int = LARGEST_JSON) -> Any:
    """What a JSON file says. Raises `DocumentError` for one that is missing, too large, or not plain JSON."""
    return parse_json(read_bytes(path, largest))


def parse_json(raw: bytes) -> Any:
    """What JSON in UTF-8 says. Raises `DocumentError`."""
    if _json_cost(raw) > ROOM:
        raise DocumentError(f"too many values for one file of {len(raw):,} bytes")
    if raw.count(b"[") + raw.count(b"{") > DEEPEST and _json_depth(raw) > DEEPEST:
        raise DocumentError(f"nested deeper than {DEEPEST} levels")
    try:
        text = raw.decode("utf-8")
        del raw  # the last reference, where it was read from a file
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"no JSON: {error}") from error


def read_yaml(path: str | Path, largest: int = LARGEST_YAML) -> Any:
    """What a YAML file says. Raises `DocumentError` for one that is missing, too large, or not plain data."""
    return parse_yaml(read_bytes(path, largest))


def parse_yaml(raw: bytes) -> Any:
    """What YAML in UTF-8 says. Raises `DocumentError`."""
    try:
        text = raw.decode("utf-8")
        _check_events(yaml.parse(text, Loader=_Loader))
        return yaml.load(text, Loader=_Strict)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise DocumentError(f"no YAML of plain values: {error}") from error


def read_bytes(path: str | Path, largest: int) -> bytes:
    """A regular file of at most so many bytes. Raises `DocumentError`: pipes would be waited for, devices never end."""
    try:
        check_regular(path)
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw = file.read(size) if size <= largest else b""  # a read sets aside all that it is asked for
    except OSError as error:
        raise DocumentError(f"cannot be read: {error.strerror}") from error
    if size > largest:
        raise DocumentError(f"too large: {size:,} bytes, where {largest:,} is the most")
    return raw


def check_regular(path: str | Path) -> None:
    """Raises `DocumentError` for what exists and is no regular file, `OSError` for what cannot be looked at."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise DocumentError("not a regular file")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises `ValueError` for a key that stands twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:100]!r} stands twice")
    return found


def _json_cost(raw: bytes) -> int:
    """An upper estimate of what text and values take, less the bytes of the file (commas in texts count, too).

    Letters of a text with one beyond ASCII may take four bytes each, once in the file's text and once in a value.
    """
    text = len(raw) if raw.isascii() else 7 * len(raw)
    return text + 72 * raw.count(b",") + 96 * raw.count(b"[") + 232 * raw.count(b"{") + 176 * raw.count(b":")


def _json_depth(raw: bytes) -> int:
    """How deep the brackets outside of texts go."""
    depth = deepest = 0
    for token in _TOKENS.finditer(raw):
        first = raw[token.start()]
        depth += (first in b"[{") - (first in b"]}")
        deepest = max(deepest, depth)
    return deepest


def _check_events(events: Iterator[Any]) -> None:
    depth = 0
    for count, event in enumerate(events):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST or count > MOST_EVENTS:
            raise ValueError(f"nested deeper than {DEEPEST} levels" if depth > DEEPEST else "too many values")
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise ValueError(f"anchors, aliases and tags are not read (line {event.start_mark.line + 1})")


class _Strict(_Loader):  # type: ignore[misc]
    """Refuses a key that stands twice in a mapping."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        found = super().construct_mapping(node, deep=deep)
        if len(found) != len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key stands twice in a mapping", node.start_mark)
        return found
