"""Files of a checkpoint: folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from llmquant.errors import NoSpaceError, OutputExistsError


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
