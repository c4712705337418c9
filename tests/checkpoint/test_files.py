"""Shards, and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmquant.checkpoint import files
from llmquant.checkpoint.files import (
    check_space,
    check_target,
    new_folder,
    no_space_errors,
)
from llmquant.checkpoint.shards import write_shards
from llmquant.errors import LlmQuantError, NoSpaceError, OutputExistsError

# ---------------------------------------------------------------------------------- folders


class Stop(BaseException):
    """Stands for whatever may end a program."""


def fill(folder: Path, name: str) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / name).write_text(name)
    (folder / name).write_text(name)


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_a_new_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with new_folder(target) as draft:
        fill(draft, "new")
        assert not target.exists() and draft.parent == target.parent
    assert names(target) == ["new", "sub", "sub/new"]
    assert os.listdir(target.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit, GeneratorExit, Stop])
@pytest.mark.parametrize("old", [False, True])
def test_whatever_ends_the_block_leaves_what_was_there(old: bool, error: type[BaseException], tmp_path: Path) -> None:
    target = tmp_path / "out"
    if old:
        target.mkdir()
        fill(target, "old")
    with pytest.raises(error), new_folder(target, overwrite=True) as draft:
        fill(draft, "new")
        raise error
    assert os.listdir(tmp_path) == (["out"] if old else [])
    assert not old or names(target) == ["old", "sub", "sub/old"]


def test_overwriting_replaces_the_whole_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    fill(target, "old")
    with new_folder(target, overwrite=True) as draft:
        fill(draft, "new")
        assert names(target) == ["old", "sub", "sub/old"]
    assert names(target) == ["new", "sub", "sub/new"] and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("step", [0, 1])
def test_a_failing_rename_leaves_the_old_folder(
    step: int, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, calls, replace = tmp_path / "out", [], os.replace
    target.mkdir()
    fill(target, "old")

    def failing(source: Path, to: Path) -> None:
        calls.append(source)
        if len(calls) == step + 1:
            raise error("no")
        replace(source, to)

    with pytest.raises(error), new_folder(target, overwrite=True) as draft:
        fill(draft, "new")
        monkeypatch.setattr(files.os, "replace", failing)
    assert os.listdir(tmp_path) == ["out"] and names(target) == ["old", "sub", "sub/old"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with new_folder(target) as draft:
        fill(draft, "new")
    assert names(target) == ["new", "sub", "sub/new"] and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder", "link to a folder"])
def test_what_exists_is_not_replaced_unasked(kind: str, overwrite: bool, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if kind == "file":
        target.write_text("mine")
    else:
        folder = target if kind == "folder" else tmp_path / "elsewhere"
        folder.mkdir()
        (folder / "mine").write_text("mine")
        if folder is not target:
            target.symlink_to(folder)
    if kind != "file" and overwrite:
        check_target(target, overwrite)
        return
    before = names(tmp_path)
    with pytest.raises(OutputExistsError, match="out"), new_folder(target, overwrite):
        pytest.fail("the block must not run")
    assert names(tmp_path) == before


def test_of_a_link_the_folder_behind_it_is_replaced(tmp_path: Path) -> None:
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    real.mkdir(parents=True)
    fill(real, "old")
    link.symlink_to(real)
    with new_folder(link, overwrite=True) as draft:
        fill(draft, "new")
    assert link.is_symlink() and names(real) == ["new", "sub", "sub/new"]
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"] and os.listdir(tmp_path / "disk") == ["real"]


def test_a_relative_target_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with new_folder(Path("out")) as draft:
        fill(draft, "new")
    assert names(tmp_path / "out") == ["new", "sub", "sub/new"]


def test_two_writers_of_one_target_do_not_meet(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OutputExistsError), new_folder(target) as one:
        fill(one, "one")
        with new_folder(target) as two:
            assert one != two
            fill(two, "two")
    assert names(target) == ["sub", "sub/two", "two"] and os.listdir(tmp_path) == ["out"]


# ---------------------------------------------------------------------------------- room


def test_a_small_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path)
    room = free.f_bavail * free.f_frsize
    check_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(NoSpaceError, match="GB free") as error:
        check_space(tmp_path / "not" / "yet", 2 * room + 10**12)
    assert error.value.where == str(tmp_path / "not" / "yet") and error.value.hint


needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")


@needs_full
def test_the_systems_error_becomes_ours(tmp_path: Path) -> None:
    """A device that is really full."""
    with pytest.raises(NoSpaceError, match="full") as error, no_space_errors(tmp_path):
        Path("/dev/full").write_text("x" * 10_000)
    assert error.value.where == str(tmp_path)
    with pytest.raises(NoSpaceError), new_folder(tmp_path / "out") as draft:
        fill(draft, "new")
        Path("/dev/full").write_bytes(b"x" * 10_000)
    assert os.listdir(tmp_path) == []


@needs_full
def test_a_full_disk_met_by_safetensors_becomes_ours(tmp_path: Path) -> None:
    """safetensors reports the system's error as one of its own, without an errno."""
    with pytest.raises(NoSpaceError), no_space_errors(tmp_path):
        try:
            Path("/dev/full").write_text("x" * 10_000)
        except OSError as error:
            raise RuntimeError(f"Error while serializing: I/O error: {error}") from None


@pytest.mark.parametrize(
    "error", [OSError(errno.EACCES, "no"), LlmQuantError("x"), RuntimeError("x"), KeyboardInterrupt()]
)
def test_other_errors_pass_unchanged(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as found, no_space_errors(tmp_path):
        raise error
    assert found.value is error


SMALL_DISK = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
uid, gid = os.getuid(), os.getgid()
if os.geteuid() != 0 and libc.unshare(0x10000000) == 0:  # a user namespace of its own
    open("/proc/self/setgroups", "w").write("deny")
    open("/proc/self/uid_map", "w").write(f"0 {uid} 1")
    open("/proc/self/gid_map", "w").write(f"0 {gid} 1")
if libc.unshare(0x00020000) or libc.mount(None, b"/", None, 0x44000, None):  # CLONE_NEWNS, private
    sys.exit(77)
if libc.mount(b"tmpfs", sys.argv[1].encode(), b"tmpfs", 0, b"size=256k"):
    sys.exit(77)
import shutil, torch
from pathlib import Path
from llmquant.checkpoint import files
from llmquant.checkpoint.files import new_folder
from llmquant.checkpoint.shards import write_shards
from llmquant.errors import NoSpaceError
target = Path(sys.argv[1]) / "out"
try:
    with new_folder(target) as draft:
        units = [{str(i): torch.ones(40_000, dtype=torch.uint8)} for i in range(20)]
        write_shards(draft, units, {}, 50_000)
except NoSpaceError as error:
    print(error)
    assert os.listdir(sys.argv[1]) == [], os.listdir(sys.argv[1])
    sys.exit(0)
sys.exit("the disk of 256 kB took 800 kB")
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A tmpfs of 256 kB in a mount namespace of its own, where the system allows one."""
    command = [sys.executable, "-c", SMALL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode == 77:
        pytest.skip("the system allows no mount here")
    assert done.returncode == 0, done.stderr
    assert "the disk is full" in done.stdout


def limited(action: Callable[[], None], size: int) -> None:
    """Runs something while no file may grow past `size` bytes."""
    import signal

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        action()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_fails_halfway_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files: the write of a shard fails in the middle."""

    def write() -> None:
        with new_folder(tmp_path / "out") as draft:
            write_shards(draft, [{"a": torch.zeros(100_000, dtype=torch.uint8)}], {}, 10**9)

    with pytest.raises(Exception, match=r"File too large|os error 27"):
        limited(write, 20_000)
    assert os.listdir(tmp_path) == []
    write()
    assert os.listdir(tmp_path) == ["out"]
