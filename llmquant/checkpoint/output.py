"""A checkpoint that is being written: OUT.partial until it is complete, then OUT, by one rename.

OUT.partial holds `run.jsonl`, the journal, and `draft`, the folder to be. Shards have their full size from the start;
tensors are written to their places in any order. A run that was interrupted, by whatever, is gone on with: what the
journal calls finished is read again and compared with its checksum, and only what agrees is not done again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llmquant.checkpoint.files import check_target, no_space_errors, put_in_place
from llmquant.checkpoint.journal import Journal
from llmquant.checkpoint.shards import Component, InFile, Layout, ShardWriter, Spec
from llmquant.errors import LlmQuantError, NoSpaceError, OutputExistsError, UnfinishedRunError

COMMIT_SECONDS = 1.0
"""How much work may be lost, in seconds: what is finished is brought to the disk no more often than this."""

_JOURNAL, _DRAFT = "run.jsonl", "draft"


def partial_folder(target: Path) -> Path:
    """Where the work of an unfinished run lies."""
    target = target.resolve()
    return target.with_name(target.name + ".partial")


class Output:
    """The shards of a checkpoint on their way to the disk.

    Args:
        folder: to fill.
        layouts: where every tensor is to lie.
        journal: of the run.
    """

    def __init__(self, folder: Path, layouts: Iterable[Layout], journal: Journal) -> None:
        self.folder, self.journal = folder, journal
        self.writer = ShardWriter(folder, list(layouts))
        self._pending: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._committed = time.monotonic()
        for name in [n for n in journal.finished if not self._intact(n)]:
            journal.forget(name)

    def has(self, name: str) -> bool:
        """Whether something is finished, by an earlier run or this one."""
        return name in self.journal.finished or name in self._pending

    def component(self, key: str) -> Component:
        """A tensor that is to be written."""
        return self.writer.component(key)

    def write(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Writes whole tensors; gives the sha256 of each by key."""
        digests = {}
        for key, tensor in tensors.items():
            component = self.component(key)
            component.write(tensor)
            digests[key] = component.finish()
        return digests

    def finish(self, name: str, digests: Mapping[str, str], note: Any = None) -> None:
        """Notes that tensors are written, with the sha256 of each by key, and what else is to be known of them."""
        with self._lock:
            self._pending[name] = {"sha256": dict(digests), "note": note}
            if time.monotonic() - self._committed >= COMMIT_SECONDS:
                self._commit()

    def commit(self) -> None:
        """Returns when all that was finished so far is on the disk."""
        with self._lock:
            self._commit()

    def digests(self) -> dict[str, str]:
        """Key -> sha256 of every tensor that is finished."""
        return {key: found for each in self.journal.finished.values() for key, found in each["sha256"].items()}

    def note(self, name: str) -> Any:
        """What was noted of something that is finished."""
        return (self._pending.get(name) or self.journal.finished[name])["note"]

    def read(self, key: str, spec: Spec) -> Tensor:
        """A tensor that is written."""
        place = self.writer.places[key]
        return InFile(self.folder / place.file, key, *spec, place.begin).read()

    def _commit(self) -> None:
        if self._pending:
            keys = (key for each in self._pending.values() for key in each["sha256"])
            self.writer.sync(self.writer.places[key].file for key in keys)
            self.journal.add(self._pending)
            self._pending = {}
        self._committed = time.monotonic()

    def _intact(self, name: str) -> bool:
        noted, places = self.journal.finished[name], self.writer.places
        digests = noted.get("sha256") if isinstance(noted, dict) else None
        if not isinstance(digests, dict) or "note" not in noted:
            return False
        return all(key in places and self.writer.digest(key) == found for key, found in digests.items())


@contextlib.contextmanager
def unfinished(target: Path, key: str, layouts: Iterable[Layout], overwrite: bool = False) -> Iterator[Output]:
    """The output to fill; when the block ends well it takes the name `target`, complete.

    When it does not, what is finished stays in OUT.partial for the next run with the same key: unless the error says
    that no run with this key can end well.

    Raises:
        OutputExistsError: if `target` exists and may not be replaced.
        UnfinishedRunError: if OUT.partial is of another run, or another process is at it.
    """
    target = target.resolve()  # of a link, the folder behind it is replaced
    check_target(target, overwrite)
    partial = partial_folder(target)
    journal = _opened(partial, key)
    try:
        with no_space_errors(partial):
            (partial / _DRAFT).mkdir(exist_ok=True)
            output = Output(partial / _DRAFT, layouts, journal)
            with _committed(output):
                yield output
            output.writer.finish()
            _sync_folder(output.folder)
        put_in_place(output.folder, target, overwrite)
        journal.finished.clear()
    except LlmQuantError as error:
        if not isinstance(error, (NoSpaceError, OutputExistsError)):
            journal.finished.clear()
        raise
    finally:
        journal.close()
        if not journal.finished:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _committed(output: Output) -> Iterator[None]:
    """Brings what is finished to the disk when the block ends, however it does."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # the first error says more
            output.commit()
        raise
    output.commit()


def _opened(partial: Path, key: str) -> Journal:
    if partial.exists() and not (partial.is_dir() and ((partial / _JOURNAL).exists() or not any(partial.iterdir()))):
        raise UnfinishedRunError(
            "what lies here is not the unfinished work of a run",
            where=str(partial),
            hint="move it away, or choose another output",
        )
    with no_space_errors(partial):
        partial.mkdir(parents=True, exist_ok=True)
        return Journal(partial / _JOURNAL, key)


def _sync_folder(folder: Path) -> None:
    """Returns when the small files of a folder, and the names of all, are on the disk."""
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            with path.open("rb") as file:
                os.fsync(file.fileno())
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
