"""Indexes of shards: files lie in the folder, are there, and hold what they are said to hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Folders, Shape, copy, edit_json, load, rewrite
from safetensors.torch import save_file

from llmquant.checkpoint.index import INDEX, check_shards, read_index
from llmquant.checkpoint.inspect import inspect_checkpoint
from llmquant.checkpoint.source import extras, open_source, weight_files
from llmquant.errors import IndexFileError, UnsafePathError


@pytest.fixture
def folder(folders: Folders, tmp_path: Path) -> Path:
    return Shape.sharded.make(folders("llama"), tmp_path / "m")


def names(folder: Path) -> list[str]:
    return [path.name for path in weight_files(folder)]


def point(folder: Path, name: str) -> None:
    """Has the index of a folder name another file for a tensor."""
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": name}))


def test_an_index_names_a_file_for_each_tensor(folder: Path) -> None:
    found = read_index(folder / INDEX)
    assert sorted(set(found.values())) == names(folder) and len(names(folder)) > 2
    for path, header in check_shards(folder, weight_files(folder)).items():
        assert all(found[key] == path.name for key in header.tensors)


OUTSIDE = [
    "../x.safetensors",
    "/etc/passwd",
    "a/../../x",
    "..",
    ".",
    "",
    "a//b",
    "a\\..\\..\\b",
    "C:\\x",
    "x\0",
    "x\n",
    "x" * 1001,
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leaves_the_folder(name: str, folder: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(1)}, folder.parent / "x.safetensors")
    point(folder, name)
    for function in (weight_files, open_source, inspect_checkpoint):
        with pytest.raises(UnsafePathError, match="folder"):
            function(folder)


@pytest.mark.parametrize("single", [False, True])
def test_a_link_that_leaves_the_folder(single: bool, folder: Path, folders: Folders, tmp_path: Path) -> None:
    folder = copy(folders("llama"), tmp_path / "single") if single else folder
    path = weight_files(folder)[0]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    for function in (weight_files, open_source, inspect_checkpoint):
        with pytest.raises(UnsafePathError, match="elsewhere"):
            function(folder)


def test_links_that_stay_are_followed(folder: Path) -> None:
    path = weight_files(folder)[0]
    (folder / "sub").mkdir()
    path.rename(folder / "sub" / "kept")
    path.symlink_to(folder / "sub" / "kept")
    assert path in weight_files(folder) and list(open_source(folder).parameters())


def test_the_hubs_cache_is_made_of_links(folders: Folders, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x--y" / "snapshots" / "0123abc", tmp_path / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(copy(folders("llama"), tmp_path / "m").iterdir()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert list(open_source(snapshot).parameters()) and extras(snapshot)


def test_what_is_copied_beside_the_weights_is_no_link_to_elsewhere(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafePathError, match="secret"):
        extras(folder)


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no map": (lambda i: i.pop("weight_map"), "weight_map"),
    "an empty map": (lambda i: i["weight_map"].clear(), "weight_map"),
    "a number for a file": (lambda i: i["weight_map"].update(x=3), "weight_map"),
    "a size below zero": (lambda i: i.update(metadata={"total_size": -1}), "total_size"),
    "a size beyond 63 bits": (lambda i: i.update(metadata={"total_size": 2**63}), "total_size"),
    "a size that is a text": (lambda i: i.update(metadata={"total_size": "1"}), "total_size"),
    "a size that is true": (lambda i: i.update(metadata={"total_size": True}), "total_size"),
    "metadata that are a list": (lambda i: i.update(metadata=[]), "total_size"),
    "a name too long for a file": (lambda i: i["weight_map"].update(x="x" * 300), "missing"),
    "a shard that is not there": (lambda i: i["weight_map"].update(x="lost.safetensors"), r"lost\.safetensors"),
    "too many files": (lambda i: i["weight_map"].update({str(n): str(n) for n in range(10_001)}), "10,000"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_index_that_says_something_impossible(kind: str, folder: Path) -> None:
    change, words = HOSTILE[kind]
    edit_json(folder / INDEX, change)
    for function in (weight_files, open_source, inspect_checkpoint):
        with pytest.raises(IndexFileError, match=words) as error:
            function(folder)
        assert str(folder) in str(error.value)


@pytest.mark.parametrize("metadata", [None, {}, {"total_size": 1.5e9}, {"total_size": 0}])
def test_sizes_of_other_programs_do_not_matter(metadata: Any, folder: Path) -> None:
    edit_json(folder / INDEX, lambda index: index.update(metadata=metadata))
    assert len(weight_files(folder)) > 2


def test_a_key_twice(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"weight_map": {', '"weight_map": {"lm_head.weight": "x",', 1))
    with pytest.raises(IndexFileError, match="twice"):
        weight_files(folder)


def test_a_tensor_that_is_not_where_the_index_says(folder: Path) -> None:
    found = read_index(folder / INDEX)
    point(folder, next(name for name in found.values() if name != found["lm_head.weight"]))
    for function in (open_source, inspect_checkpoint):
        with pytest.raises(IndexFileError, match=r"lm_head\.weight"):
            function(folder)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_tensor_in_two_shards(quantized: bool, folder: Path, folders: Folders, tmp_path: Path) -> None:
    if quantized:
        folder = tmp_path / "q"
        load(folders.quantized("llama")).save_pretrained(folder, max_shard_size="10KB")
    key, name = next(iter(json.loads((folder / INDEX).read_text())["weight_map"].items()))
    other = next(path for path in weight_files(folder) if path.name != name)
    rewrite(other, lambda tensors: tensors.update({key: torch.zeros(1)}))
    with pytest.raises(IndexFileError, match=r"and in|does not hold") as error:
        inspect_checkpoint(folder) if quantized else open_source(folder)
    assert key in str(error.value) and name in str(error.value) and other.name in str(error.value)
