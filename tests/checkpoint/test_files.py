"""Shards, and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import disk, raw

from llmquant.checkpoint import files
from llmquant.checkpoint.files import (
    ShardWriter,
    check_space,
    check_target,
    new_folder,
    no_space_errors,
)
from llmquant.checkpoint.header import read_header
from llmquant.errors import LlmQuantError, NoSpaceError, OutputExistsError

# ---------------------------------------------------------------------------------- shards

TENSORS = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=8)


@settings(max_examples=60)
@given(sizes=TENSORS, limit=st.integers(1, 120))
def test_shards_hold_every_tensor_once_and_no_more_than_they_may(
    sizes: list[list[int]], limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    writer = ShardWriter(folder, {"format": "pt", "who": "me"}, limit)
    groups = [
        {f"{i}.{j}": torch.full((size,), i * 10 + j, dtype=torch.uint8) for j, size in enumerate(group)}
        for i, group in enumerate(sizes)
    ]
    for group in groups:
        writer.add(group)
    writer.close()
    everything = {key: raw(t) for group in groups for key, t in group.items()}
    assert disk(folder) == everything
    assert writer.total_bytes == sum(map(sum, sizes))
    found = {path.name: set(read_header(path).tensors) for path in folder.glob("*.safetensors")}
    for keys in found.values():
        together = [set(group) for group in groups if set(group) & keys]
        assert all(group <= keys for group in together)  # a weight's components stay together
        assert len(together) == 1 or sum(len(everything[key][2]) for key in keys) <= limit
    assert all(read_header(path).metadata == {"format": "pt", "who": "me"} for path in folder.glob("*.safetensors"))
    if len(found) == 1:
        assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors"]
    else:
        count = len(found)
        assert set(found) == {f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)}
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {key: name for name, keys in found.items() for key in keys}
        assert index["metadata"]["total_size"] == writer.total_bytes
        assert len(list(folder.iterdir())) == count + 1


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    writer = ShardWriter(tmp_path, {}, 10**6)
    writer.add({"t": base.t(), "part": base[:, 1:3], "base": base})
    writer.close()
    assert disk(tmp_path) == {"t": raw(base.t()), "part": raw(base[:, 1:3]), "base": raw(base)}


def test_shards_have_the_permissions_of_other_new_files(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    writer = ShardWriter(tmp_path, {}, 10**6)
    writer.add({"a": torch.zeros(1)})
    writer.close()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


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
from llmquant.checkpoint.files import ShardWriter, new_folder
from llmquant.errors import NoSpaceError
target = Path(sys.argv[1]) / "out"
try:
    with new_folder(target) as draft:
        writer = ShardWriter(draft, {}, 50_000)
        for i in range(20):
            writer.add({str(i): torch.ones(40_000, dtype=torch.uint8)})
        writer.close()
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
            writer = ShardWriter(draft, {}, 10**9)
            writer.add({"a": torch.zeros(100_000, dtype=torch.uint8)})
            writer.close()

    with pytest.raises(Exception, match=r"File too large|os error 27"):
        limited(write, 20_000)
    assert os.listdir(tmp_path) == []
    write()
    assert os.listdir(tmp_path) == ["out"]
