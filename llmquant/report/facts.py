"""Protocol, versions and machine: what all rows share is said once, and what differs between them is said to differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmquant.report.rows import Row

# Fields of a protocol that must be equal for figures to be comparable; the others (kernels) may differ by candidate.
COMPARED = ("text", "text_sha256", "context", "stride", "windows", "bos", "tokens_scored", "dtype")


def facts(rows: Sequence[Row], part: str) -> list[tuple[str, str]]:
    """Name and value of each field of `protocol`, `versions` or `machine`; different values are joined by `; `."""
    contents: list[Mapping[str, Any]] = [content for row in rows if (content := getattr(row, part))]
    names = dict.fromkeys(name for content in contents for name in content)
    return [(name, "; ".join(_values(name, contents))) for name in names]


def _values(name: str, contents: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(written(content[name]) for content in contents if name in content))


def written(value: Any) -> str:
    """A value of JSON for people."""
    if value is None:
        return "none"
    if isinstance(value, bool) or not isinstance(value, int):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"{value:,}"


def mixed(rows: Sequence[Row]) -> list[str]:
    """Fields of the protocol in which rows differ though they should not: their figures do not compare."""
    contents = [row.protocol for row in rows if row.protocol]
    return [name for name in COMPARED if len(_values(name, contents)) > 1]
