"""What a long run has finished, in a file of its own, so that a run that was interrupted is gone on with.

A journal is lines of JSON. The first says which run it is of; each further one says that something is finished. A line
counts when it is whole: what a killed process or a full disk left half-written at the end is cut off. Whoever adds a
line has what it speaks of on the disk before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from llmquant.documents import parse_json
from llmquant.errors import DocumentError, UnfinishedRunError

_VERSION = 1


def run_key(*words: Any) -> str:
    """A hash of plain JSON: what two runs must share for one to go on where the other ended."""
    return sha256(json.dumps([_VERSION, *words], sort_keys=True).encode()).hexdigest()


class Journal:
    """The journal of a run; no other process can open it meanwhile.

    Args:
        path: of the file, which is made if it is not there.
        key: the run's, as `run_key` gives it.

    Attributes:
        finished: what was finished before and is now, by name, with what was noted of it.

    Raises:
        UnfinishedRunError: for a journal of another run, and for one that another process has open.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._file = _locked(path)
        self.finished: dict[str, Any] = {}
        try:
            self._read(key)
        except BaseException:
            self.close()
            raise

    def add(self, found: Mapping[str, Any]) -> None:
        """Notes what is finished, by name; returns when that is on the disk."""
        self._write([{"done": name, "of": content} for name, content in found.items()])
        self.finished |= found

    def forget(self, name: str) -> None:
        """Something is not finished after all; it will be noted again."""
        self.finished.pop(name, None)

    def close(self) -> None:
        """Lets other processes open it."""
        self._file.close()

    def _read(self, key: str) -> None:
        lines, whole = _whole_lines(self._file.read())
        if not lines:
            self._file.truncate(0)
            self._file.seek(0)
            self._write([{"run": key}])
            return
        if lines[0].get("run") != key:
            raise UnfinishedRunError(
                "an unfinished run of another model, recipe or version lies here",
                where=str(self._path.parent),
                hint="finish it with its own options, remove the folder, or choose another output",
            )
        self.finished = {line["done"]: line["of"] for line in lines[1:]}
        self._file.truncate(whole)
        self._file.seek(whole)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        before = self._file.tell()
        try:
            self._file.write(text.encode())
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(before)  # a later line must not follow half of this one
            self._file.seek(before)
            raise


def _locked(path: Path) -> BinaryIO:
    """The file, open for reading and writing, which no other process has."""
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError as error:
        file.close()
        raise UnfinishedRunError(
            "another process is at work here", where=str(path.parent), hint="wait for it, or choose another output"
        ) from error
    return file  # type: ignore[return-value]


def _whole_lines(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The lines up to the first that is torn or no line of a journal, and how many bytes they take."""
    lines: list[dict[str, Any]] = []
    whole = 0
    for line in content.splitlines(keepends=True):
        try:
            found = parse_json(line) if line.endswith(b"\n") else None
        except DocumentError:
            found = None
        if not isinstance(found, dict) or not ("run" in found if not lines else _is_note(found)):
            break
        lines.append(found)
        whole += len(line)
    return lines, whole


def _is_note(line: dict[str, Any]) -> bool:
    return isinstance(line.get("done"), str) and "of" in line
