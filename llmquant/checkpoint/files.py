"""Files of a checkpoint: headers, and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from llmquant.errors import CheckpointError, NoSpaceError, OutputExistsError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


class Header(NamedTuple):
    """A safetensors header: its metadata, and key -> (dtype, shape); dtype None if torch has none of that name."""

    metadata: dict[str, str]
    tensors: dict[str, tuple[torch.dtype | None, tuple[int, ...]]]


def read_header(path: Path) -> Header:
    """The header of a safetensors file. Raises `CheckpointError` for a file that is missing, truncated or foreign."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            (length,) = struct.unpack("<Q", start)
            if length > os.path.getsize(path):
                raise ValueError("the header is longer than the file")
            content = json.loads(file.read(length))
        metadata = dict(content.pop("__metadata__", {}))
        tensors = {k: (DTYPES.get(v["dtype"]), tuple(v["shape"])) for k, v in content.items()}
        size = 8 + length + max((v["data_offsets"][1] for v in content.values()), default=0)
    except FileNotFoundError as error:
        raise CheckpointError("a shard is missing", where=str(path), hint="copy or save the model again") from error
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if size != os.path.getsize(path):
        raise _damaged(path, f"it has {os.path.getsize(path)} bytes and should have {size}")
    return Header(metadata, tensors)


@contextlib.contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A sibling folder to fill, which takes the name `target` when the block ends well and vanishes when it does not.

    Raises:
        OutputExistsError: if `target` exists and may not be replaced.
    """
    target = target.resolve()  # of a link, the folder behind it is replaced
    check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = _sibling(target, "draft")
    draft.mkdir()
    try:
        with no_space_errors(draft):
            yield draft
        put_in_place(draft, target, overwrite)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def put_in_place(draft: Path, target: Path, overwrite: bool = False) -> None:
    """Gives a complete folder its name; one that had it before is removed afterwards.

    Raises:
        OutputExistsError: if `target` exists and may not be replaced; it may have appeared meanwhile.
    """
    check_target(target, overwrite)
    old = _sibling(target, "old")
    try:
        if target.exists():
            os.replace(target, old)
        os.replace(draft, target)
    finally:
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(old, ignore_errors=True)


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{uuid.uuid4().hex[:8]}")


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


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"the file is truncated or is no safetensors file: {why}", where=str(path), hint="copy or save the model again"
    )
