"""Finished parts of a long run, on disk, so that a run that was interrupted goes on behind them with the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmquant.checkpoint.files import no_space_errors
from llmquant.checkpoint.header import read_header
from llmquant.checkpoint.journal import Journal
from llmquant.checkpoint.manifest import check_component
from llmquant.checkpoint.state import assemble, components, describe, expected
from llmquant.documents import parse_json
from llmquant.errors import CheckpointError, DocumentError
from llmquant.tensor import QuantizedTensor

_VERSION = 2
_MARK = "llmquant_journal"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}


class Part(NamedTuple):
    """What is kept of a part: its quantized weights by FQN, and warnings."""

    weights: dict[str, QuantizedTensor]
    warnings: list[str]


def fingerprint(words: Any, tensors: Iterable[Tensor]) -> str:
    """A hash of plain JSON and of tensors' bytes: what two runs must share for one to go on where the other ended."""
    digest = hashlib.sha256(json.dumps([torch.__version__, words], sort_keys=True).encode())
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(str((plain.dtype, tuple(plain.shape))).encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Parts(Protocol):
    """Keeps what is finished of a model, by block."""

    def load(self, part: str) -> Part | None:
        """What was kept of a part; None if it is not finished."""

    def save(self, part: str, weights: Mapping[str, QuantizedTensor], warnings: Sequence[str]) -> None:
        """Keeps the quantized weights of a part, by FQN, and what was warned of meanwhile.

        Raises:
            NoSpaceError: for a full disk; what was kept before stays.
        """


class Nothing:
    """Keeps nothing."""

    def load(self, part: str) -> Part | None:
        """None."""
        return None

    def save(self, part: str, weights: Mapping[str, QuantizedTensor], warnings: Sequence[str]) -> None:
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

    def load(self, part: str) -> Part | None:
        """What was kept of a part; None if it is not finished, or its file was changed since."""
        noted, path = self._journal.finished.get(part), self._path(part)
        if noted is None or not path.is_file() or _hash(path) != noted:
            return None
        return read_part(path)

    def save(self, part: str, weights: Mapping[str, QuantizedTensor], warnings: Sequence[str]) -> None:
        """Keeps a part; when it returns, the disk has it."""
        path = self._path(part)
        with no_space_errors(self._folder):
            write_part(path, Part(dict(weights), list(warnings)))
            with path.open("rb") as file:
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
        return self._folder / f"{part or 'rest'}.safetensors"


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_part(path: Path, part: Part) -> None:
    """Writes a part as a safetensors file: components as in a checkpoint, entries and warnings in its metadata."""
    tensors = {key: t.contiguous() for fqn, w in part.weights.items() for key, t in components(fqn, w).items()}
    entries = {fqn: [describe(w), str(w.dtype).removeprefix("torch.")] for fqn, w in part.weights.items()}
    save_file(tensors, path, metadata={_MARK: json.dumps([_VERSION, entries, part.warnings])})


def read_part(path: Path) -> Part:
    """What `write_part` wrote. Raises `CheckpointError` for anything else."""
    header = read_header(path)
    try:
        content = parse_json(header.metadata.get(_MARK, "").encode())
        version, entries, warnings = content
        dtypes = {fqn: _DTYPES[name] for fqn, (_, name) in entries.items()}
        entries = {fqn: described for fqn, (described, _) in entries.items()}
        if version != _VERSION or not all(isinstance(text, str) for text in warnings):
            raise ValueError(f"its version is {version!r:.100}, not {_VERSION}, or it warns of no texts")
    except (DocumentError, ValueError, TypeError, KeyError, AttributeError) as error:
        hint = "delete the folder, and begin anew"
        raise CheckpointError(f"no finished part of a run: {error}", where=str(path), hint=hint) from error
    for fqn, described in entries.items():
        for key, promised in expected(fqn, described).items():
            check_component(key, promised, header.tensors, [path])
    tensors = load_file(path)
    return Part({fqn: assemble(fqn, described, tensors, dtypes[fqn]) for fqn, described in entries.items()}, warnings)
