"""Finished parts of a long run, on disk, so that a run that was interrupted goes on behind them with the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llmquant.checkpoint.files import no_space_errors
from llmquant.checkpoint.journal import Journal


def fingerprint(words: Any, tensors: Iterable[Tensor]) -> str:
    """A hash of plain JSON and of tensors' bytes: what two runs must share for one to go on where the other ended."""
    digest = hashlib.sha256(json.dumps([torch.__version__, words], sort_keys=True).encode())
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(str((plain.dtype, tuple(plain.shape))).encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Parts(Protocol):
    """Keeps what is finished of a model: `{"weights": FQN -> quantized tensor, "warnings": texts}` by block."""

    def load(self, part: str) -> Any:
        """What was kept of a part; None if it is not finished."""

    def save(self, part: str, content: Any) -> None:
        """Keeps it. Raises `NoSpaceError` for a full disk; what was kept before stays."""


class Nothing:
    """Keeps nothing."""

    def load(self, part: str) -> Any:
        """None."""

    def save(self, part: str, content: Any) -> None:
        """Forgets it."""


class Folder:
    """Parts of a model in memory, in a folder of their own: a file each, and a journal.

    Args:
        folder: where they lie.
        run: the run's fingerprint.

    Raises:
        UnfinishedRunError: if the folder is of another run, or another process is at it.
    """

    def __init__(self, folder: Path, run: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._journal = folder, Journal(folder / "run.jsonl", run)

    def load(self, part: str) -> Any:
        """What was kept of a part; None if it is not finished, or its file was changed since."""
        noted, path = self._journal.finished.get(part), self._path(part)
        if noted is None or not path.is_file() or _hash(path) != noted:
            return None
        return torch.load(path, weights_only=True)

    def save(self, part: str, content: Any) -> None:
        """Keeps what `torch.load(weights_only=True)` can read: tensors, quantized ones too, numbers, texts."""
        path = self._path(part)
        with no_space_errors(self._folder):
            with path.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            self._journal.add({part: _hash(path)})

    def close(self) -> None:
        """Lets other processes open it."""
        self._journal.close()

    def remove(self) -> None:
        """Forgets the run, which is over."""
        self._journal.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, part: str) -> Path:
        return self._folder / f"{part or 'rest'}.pt"


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
