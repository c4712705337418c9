"""A study's folder: what is finished, each thing under its content key, whole or not there at all.

references/KEY       logits of a 16-bit model (`measure.reference`)
models/KEY/          quantized checkpoints, while they are needed
cells/KEY.json       what was found, with a checksum
failures/KEY.json    why something could not be found
logs/KEY.log         what a worker printed
journal.jsonl        a line for everything that was computed, in the order it was
digests.json         hashes of files by path, size and time
results.jsonl        the results, for `llmquant.report`
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmquant.checkpoint.files import no_space_errors
from llmquant.errors import LlmQuantError, StudyLockedError
from llmquant.study.keys import Digests

_DRAFT = re.compile(r"\.[0-9a-f]{32}\..+")
_FOLDERS = ("references", "models", "cells", "failures", "logs")


class Store:
    """A study's folder.

    Args:
        folder: made if it is missing.

    Attributes:
        damaged: what was there and could not be trusted, a sentence each.
        digests: hashes of files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        self.damaged: list[str] = []
        self.digests = Digests(_read_json(self.folder / "digests.json"))

    @contextmanager
    def opened(self) -> Iterator[Store]:
        """The folder for this process alone; drafts that a killed sweep left are removed.

        Raises:
            StudyLockedError: if another process has it. The lock goes with the process that holds it.
        """
        for name in _FOLDERS:
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("a+") as file:
            _lock(file, self.folder)
            self.remove_drafts()
            yield self
            self.remove_drafts()

    def read(self, key: str) -> dict[str, Any] | None:
        """What was found under a key; None if it is not there, or not whole (see `damaged`)."""
        path = self._path("cells", key)
        if not path.exists():
            return None
        found = _read_json(path)
        content = found.get("content")
        if found.get("key") != key or not isinstance(content, dict) or found.get("check") != _check(content):
            self.damaged.append(f"{path}: damaged, and not trusted; it is computed again")
            return None
        return content

    def write(self, key: str, kind: str, content: Mapping[str, Any], title: str = "") -> None:
        """Keeps what was found, and forgets an earlier failure. Raises `NoSpaceError`."""
        entry = {"key": key, "kind": kind, "check": _check(content), "content": content}
        write_text(self._path("cells", key), json.dumps(entry, indent=1, allow_nan=False))
        self._path("failures", key).unlink(missing_ok=True)
        self._note({"kind": kind, "key": key, "title": title})

    def read_failure(self, key: str) -> dict[str, Any] | None:
        """Why something failed: what, where, hint and kind."""
        return _read_json(self._path("failures", key)) or None

    def write_failure(self, key: str, kind: str, error: Mapping[str, Any], title: str = "") -> None:
        """Keeps why something failed."""
        write_text(self._path("failures", key), json.dumps(dict(error), indent=1))
        self._note({"kind": kind, "key": key, "title": title, "failed": error["what"]})

    def reference(self, key: str) -> Path:
        """Where a reference's logits lie."""
        return self.folder / "references" / key

    def model(self, key: str) -> Path:
        """Where a quantized model lies."""
        return self.folder / "models" / key

    def log(self, key: str) -> Path:
        """Where a worker's output goes."""
        return self.folder / "logs" / f"{key}.log"

    def distrust_model(self, key: str, why: str) -> None:
        """Removes a quantized model that is not what was written."""
        self.damaged.append(f"{self.model(key)}: {why}; it is made again")
        shutil.rmtree(self.model(key), ignore_errors=True)

    def distrust_reference(self, key: str, why: str) -> None:
        """Removes logits that are not what was written."""
        self.damaged.append(f"{self.reference(key)}: {why}; it is computed again")
        self.reference(key).unlink(missing_ok=True)

    def keep_model(self, key: str) -> None:
        """Marks a quantized model as one to stay."""
        self.model(key).with_suffix(".kept").touch()

    def drop_model(self, key: str) -> None:
        """Removes a quantized model that nobody needs any more, unless it is to stay."""
        if not self.model(key).with_suffix(".kept").exists():
            shutil.rmtree(self.model(key), ignore_errors=True)

    def journal(self) -> list[dict[str, Any]]:
        """Everything that was computed in this folder. A last line that was cut is not counted."""
        path = self.folder / "journal.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [found for line in lines if (found := _parse(line))]

    def save_digests(self) -> None:
        """Keeps the hashes of files for the next time."""
        write_text(self.folder / "digests.json", json.dumps(self.digests.known, indent=0, sort_keys=True))

    def write_results(self, lines: Iterable[Mapping[str, Any]]) -> Path:
        """Writes results.jsonl whole."""
        path = self.folder / "results.jsonl"
        write_text(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
        return path

    def remove_drafts(self) -> None:
        """Removes what was being written when a process was killed; finished blocks of an algorithm stay.

        Only names that drafts of a store have go: the folder may be one in which a user keeps other things.
        """
        found = [path for name in _FOLDERS for path in (self.folder / name).iterdir() if _DRAFT.fullmatch(path.name)]
        found += [path for name in ("results.jsonl", "digests.json") for path in self.folder.glob(f".{name}.*.draft")]
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _note(self, line: dict[str, Any]) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        path = self.folder / "journal.jsonl"
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        with no_space_errors(self.folder), path.open("a", encoding="utf-8") as file:
            file.write("\n" * torn + json.dumps({"time": stamp, **line}) + "\n")

    def _path(self, folder: str, key: str) -> Path:
        return self.folder / folder / f"{key}.json"


def write_text(path: Path, text: str) -> None:
    """Writes a file beside its place and renames it. Raises `NoSpaceError`."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    with no_space_errors(path.parent):
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)


def _lock(file: Any, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "an unknown process"
        raise StudyLockedError(
            f"another sweep works in this folder: {holder}", where=str(folder), hint="wait for it, or another --out"
        ) from error
    except OSError as error:
        raise LlmQuantError(f"the folder cannot be locked: {error.strerror}", where=str(folder)) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()


def _check(content: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    """The mapping in a file; an empty one where there is none."""
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}


def _parse(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
