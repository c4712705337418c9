"""Finished parts of a long run, on disk, so that a run that was interrupted goes on behind them with the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoint.files import no_space_errors

_VERSION = 1


def fingerprint(words: Any, tensors: Iterable[Tensor]) -> str:
    """A hash of plain JSON and of tensors' bytes: what two runs must share for one to go on where the other ended."""
    digest = hashlib.sha256(json.dumps([_VERSION, torch.__version__, words], sort_keys=True).encode())
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(str((plain.dtype, tuple(plain.shape))).encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Journal:
    """What a run has finished, by name.

    Args:
        folder: where it lies; None keeps nothing. What another run left there is removed.
        run: the run's fingerprint.
    """

    def __init__(self, folder: Path | None, run: str) -> None:
        self._folder = folder
        if folder is None:
            return
        mark = folder / "run.txt"
        if not mark.is_file() or mark.read_text(encoding="utf-8") != run:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(run, encoding="utf-8")

    def load(self, part: str) -> Any:
        """What was kept of a part; None if it is not finished."""
        path = self._path(part)
        return torch.load(path, weights_only=True) if path is not None and path.is_file() else None

    def save(self, part: str, content: Any) -> None:
        """Keeps what `torch.load(weights_only=True)` can read: tensors, quantized ones too, numbers, texts.

        Raises:
            NoSpaceError: for a full disk; what was kept before stays.
        """
        path = self._path(part)
        if path is None:
            return
        draft = path.with_suffix(".part")
        with no_space_errors(path.parent):
            torch.save(content, draft)
            os.replace(draft, path)

    def remove(self) -> None:
        """Forgets the run, which is over."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, part: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{part or 'rest'}.pt"
