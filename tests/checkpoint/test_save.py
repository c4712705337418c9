"""`llmquant.save` writes what `save_pretrained` writes, all or nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from models import CONFIGS, Folders, assert_same, disk, load, logits, manifest

import llmquant
from llmquant.checkpoint.manifest import verify
from llmquant.errors import NoSpaceError, OutputExistsError


@pytest.mark.parametrize("family", CONFIGS)
def test_saves_what_save_pretrained_saves(family: str, folders: Folders, tmp_path: Path) -> None:
    model = load(folders.quantized(family))
    assert llmquant.save(model, tmp_path / "a") == tmp_path / "a"
    model.save_pretrained(tmp_path / "b")
    assert_same(disk(tmp_path / "a"), disk(tmp_path / "b"))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(p.name for p in (tmp_path / "b").iterdir())
    assert torch.equal(logits(load(tmp_path / "a")), logits(model))


def test_saves_a_plain_model_too(folders: Folders, tmp_path: Path) -> None:
    llmquant.save(load(folders("llama")), tmp_path / "a")
    assert_same(disk(tmp_path / "a"), disk(folders("llama")))


def test_options_go_to_save_pretrained(folders: Folders, tmp_path: Path) -> None:
    llmquant.save(load(folders.quantized("llama")), tmp_path / "a", max_shard_size="10KB")
    shards = sorted((tmp_path / "a").glob("*.safetensors"))
    assert len(shards) > 3
    verify(manifest(tmp_path / "a"), shards)


def test_replaces_a_folder_only_when_asked(folders: Folders, tmp_path: Path) -> None:
    model = load(folders.quantized("llama"))
    llmquant.save(model, tmp_path / "a", max_shard_size="10KB")
    before = manifest(tmp_path / "a")
    with pytest.raises(OutputExistsError):
        llmquant.save(model, tmp_path / "a")
    assert manifest(tmp_path / "a") == before
    llmquant.save(model, tmp_path / "a", overwrite=True)
    assert manifest(tmp_path / "a")["save_id"] != before["save_id"]
    assert [p.name for p in (tmp_path / "a").glob("*.safetensors")] == ["model.safetensors"]  # no old shard stays
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_save_that_fails_leaves_what_was_there(
    error: type[BaseException], folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.modeling_utils

    model = load(folders.quantized("llama"))
    llmquant.save(model, tmp_path / "a")
    before = disk(tmp_path / "a")
    write, calls = transformers.modeling_utils.safe_save_file, []

    def failing(*args: object, **kwargs: object) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise error("stop")
        write(*args, **kwargs)

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", failing)
    with pytest.raises(error):
        llmquant.save(model, tmp_path / "a", overwrite=True, max_shard_size="10KB")
    monkeypatch.undo()
    assert_same(disk(tmp_path / "a"), before)
    assert os.listdir(tmp_path) == ["a"]
    assert torch.equal(logits(load(tmp_path / "a")), logits(model))


def test_a_disk_without_room_is_refused(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, usage = load(folders.quantized("llama")), shutil.disk_usage(tmp_path)
    needed = sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(NoSpaceError):
        llmquant.save(model, tmp_path / "a")
    assert os.listdir(tmp_path) == []
