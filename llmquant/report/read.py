"""Reads `results.jsonl`, or the JSON of one evaluation, into rows; every damage has a name, a file and a line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from llmquant.errors import ReportError
from llmquant.report.rows import SCHEMA, Row

RESULTS = "results.jsonl"
_NO_TEXT = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff\\ufffe\\uffff]")
_RECORD_SCHEMA = 2  # of `llmquant eval --json`


def read_rows(path: Path) -> list[Row]:
    """The rows of a folder with `results.jsonl`, of such a file, or of one record of `llmquant eval --json`.

    Raises:
        ReportError: nothing there, a damaged line, a newer schema, or two rows for one cell.
    """
    file = path / RESULTS if path.is_dir() else path
    text = _text(file)
    record = _record(text)
    rows = [_row_of_record(record, file)] if record is not None else _rows_of_lines(text, file)
    _check_unique(rows, file)
    return rows


def _text(file: Path) -> str:
    hint = "a folder that `llmquant sweep` wrote, its results.jsonl, or the file of `llmquant eval --json`"
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ReportError("no results here", where=str(file), hint=hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"the results cannot be read: {error}", where=str(file), hint=hint) from error
    if not text.strip():
        raise ReportError("the file of results is empty", where=str(file), hint=hint)
    return text


def _record(text: str) -> dict[str, Any] | None:
    """The record that is the whole text, if it is one: a record has a protocol and, unlike a row, no label."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_record = isinstance(content, dict) and "protocol" in content and "label" not in content
    return content if is_record else None


def _row_of_record(record: dict[str, Any], file: Path) -> Row:
    """The row of one evaluation: its label is the model's name, for there is nothing to tell it from."""
    _check_schema(record, _RECORD_SCHEMA, str(file))
    protocol = record.get("protocol") or {}
    seconds = {"evaluate": record.get("seconds")}
    named = {"label": str(record.get("model")), "text": str(protocol.get("text")), "seconds": seconds}
    return _validated({**record, "kind": "candidate", "status": "done", **named}, str(file))


def _rows_of_lines(text: str, file: Path) -> list[Row]:
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    return [_row_of_line(line, f"{file}, line {number}") for number, line in lines]


def _row_of_line(line: str, where: str) -> Row:
    try:
        content = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        hint = "`llmquant sweep` again: finished cells are kept, and the file is written anew"
        raise ReportError(f"a damaged line of results: {error}", where=where, hint=hint) from error
    if not isinstance(content, dict):
        raise ReportError("a line of results is not an object", where=where)
    _check_schema(content, SCHEMA, where)
    return _validated(content, where)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _check_schema(content: dict[str, Any], known: int, where: str) -> None:
    schema = content.get("schema")
    if not isinstance(schema, int) or schema < 1:
        raise ReportError(f"results without a schema: {schema!r}", where=where)
    if schema > known:
        what = f"results of schema {schema}; this version reads up to {known}"
        raise ReportError(what, where=where, hint="a newer llmquant")


def _validated(content: dict[str, Any], where: str) -> Row:
    try:
        return Row.model_validate(_clean(content))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ReportError(f"results with a bad field {field}: {first['msg']}", where=where) from error


def _clean(value: Any) -> Any:
    """JSON's lists as tuples, which strict fields want, and its texts without what is no text.

    Control characters (but line ends and tabs) and halves of surrogate pairs would act on terminals, or break XML.
    """
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    if isinstance(value, str):
        return _NO_TEXT.sub("\N{REPLACEMENT CHARACTER}", value)
    return tuple(_clean(item) for item in value) if isinstance(value, list) else value


def _check_unique(rows: list[Row], file: Path) -> None:
    seen = set()
    for row in rows:
        if row.key in seen:
            raise ReportError("two results for one cell", where=f"{file}: {' / '.join(row.key)}")
        seen.add(row.key)
