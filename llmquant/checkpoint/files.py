"""Files of a checkpoint: shards, and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from llmquant.checkpoint.checksums import checksum
from llmquant.checkpoint.header import DTYPES, Header, read_header
from llmquant.errors import NoSpaceError, OutputExistsError

__all__ = ["DTYPES", "Header", "read_header"]  # they lay here before


class ShardWriter:
    """Writes tensors into shards of a folder as they come, and the index at the end.

    Args:
        folder: an existing folder.
        metadata: goes into the header of each shard.
        max_shard_bytes: a shard is closed before it grows past this; it is also the memory that is held.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, str], max_shard_bytes: int) -> None:
        self.folder, self.metadata, self.max_shard_bytes = folder, dict(metadata), max_shard_bytes
        self._held: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self.total_bytes = 0
        self.checksums: dict[str, str] = {}

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Adds tensors that belong together; they land in one shard."""
        size = sum(t.nbytes for t in tensors.values())
        if self._held and sum(t.nbytes for t in self._held.values()) + size > self.max_shard_bytes:
            self._flush()
        self._held.update({key: t.contiguous() for key, t in tensors.items()})
        self.checksums.update({key: checksum(t) for key, t in tensors.items()})
        self.total_bytes += size

    def close(self) -> None:
        """Writes the last shard, gives all their final names and writes the index if there are several."""
        self._flush()
        count, weight_map = len(self._shards), {}
        for number, keys in enumerate(self._shards, 1):
            name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            os.replace(self.folder / f"shard-{number}.tmp", self.folder / name)
            weight_map.update(dict.fromkeys(keys, name))
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))

    def _flush(self) -> None:
        if not self._held:
            return
        self._shards.append(list(self._held))
        with no_space_errors(self.folder):
            path = self.folder / f"shard-{len(self._shards)}.tmp"
            save_file(self._held, path, metadata=self.metadata)
            make_readable(path)
        self._held = {}


@contextlib.contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A sibling folder to fill, which takes the name `target` when the block ends well and vanishes when it does not.

    Raises:
        OutputExistsError: if `target` exists and may not be replaced.
    """
    target = target.resolve()  # of a link, the folder behind it is replaced
    check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    draft, old = (target.with_name(f".{target.name}.{kind}-{mark}") for kind in ("draft", "old"))
    draft.mkdir()
    try:
        with no_space_errors(draft):
            yield draft
        check_target(target, overwrite)  # it may have appeared meanwhile
        if target.exists():
            os.replace(target, old)
        os.replace(draft, target)
    finally:
        if old.exists() and not target.exists():
            os.replace(old, target)
        for rest in (draft, old):
            shutil.rmtree(rest, ignore_errors=True)


def check_target(target: Path, overwrite: bool) -> None:
    """Raises `OutputExistsError` for a target that exists and may not be replaced, or is no folder."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() and not (overwrite and target.is_dir()):
        raise OutputExistsError(
            "the output exists already",
            where=str(target),
            hint="choose another -o, or --overwrite to replace the folder",
        )


def check_space(folder: Path, needed: int) -> None:
    """Raises `NoSpaceError` if the disk below `folder` (which need not exist yet) lacks `needed` bytes."""
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise NoSpaceError(
            f"the result needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free",
            where=str(folder),
            hint="free some room, or choose an output on another disk",
        )


@contextlib.contextmanager
def no_space_errors(folder: Path) -> Iterator[None]:
    """Turns the system's 'no space left' into `NoSpaceError`."""
    try:
        yield
    except Exception as error:
        # safetensors reports the system's error inside an exception of its own.
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise NoSpaceError("the disk is full", where=str(folder), hint="free some room and run it again") from error
        raise


def make_readable(path: Path) -> None:
    """Gives a file the permissions of any new file: safetensors makes ones that only their owner can read."""
    mask = os.umask(0o022)  # it can only be read by setting it
    os.umask(mask)
    path.chmod(0o666 & ~mask)
