"""Shards by position hold what safetensors would write, and give back what lies in them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import assert_same, disk, raw
from safetensors.torch import save_file
from torch import Tensor

from llmquant.checkpoint import shards
from llmquant.checkpoint.header import DTYPES, read_header
from llmquant.checkpoint.shards import Layout, ShardWriter, index_json, lay_out, stored_in, write_shards
from llmquant.errors import CheckpointError


def some_tensors() -> dict[str, Tensor]:
    """One of every dtype, and odd shapes."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, dtype in DTYPES.items():
        raw_bytes = torch.randint(0, 2 if dtype is torch.bool else 100, (24,), generator=generator, dtype=torch.uint8)
        found[f"of.{name}"] = raw_bytes.view(dtype).reshape(-1, 3 if dtype.itemsize < 8 else 1)
    return found | {"empty": torch.empty(0, 3), "one": torch.tensor(1.5), "stack": torch.randn(3, 4, 5)}


def write(folder: Path, tensors: dict[str, Tensor], limit: int = 10**9) -> list[Layout]:
    """All of them, the last first."""
    folder.mkdir()
    layouts = lay_out([{k: (t.dtype, tuple(t.shape))} for k, t in tensors.items()], {"format": "pt", "a": "b"}, limit)
    writer = ShardWriter(folder, layouts)
    for key, tensor in reversed(tensors.items()):
        component = writer.component(key)
        component.write(tensor)
        assert component.finish() == writer.digest(key) == hashlib.sha256(raw(tensor)[2]).hexdigest()
    writer.finish()
    return layouts


def test_safetensors_reads_what_was_written_and_lies_it_out_alike(tmp_path: Path) -> None:
    tensors = some_tensors()
    write(tmp_path / "ours", tensors)
    (tmp_path / "theirs").mkdir()
    save_file(tensors, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt", "a": "b"})
    assert_same(disk(tmp_path / "ours"), disk(tmp_path / "theirs"))
    ours, theirs = ((tmp_path / f / "model.safetensors").read_bytes() for f in ("ours", "theirs"))
    assert len(ours) == len(theirs)
    length = int.from_bytes(ours[:8], "little")
    header, other = (json.loads(content[8 : 8 + length]) for content in (ours, theirs))
    assert length % 8 == 0 and header.pop("__metadata__") == other.pop("__metadata__")
    end = 0
    for key, entry in header.items():  # in a row without holes, each where its numbers may lie
        begin, end_before = entry["data_offsets"][0], end
        assert begin == end_before and begin % tensors[key].dtype.itemsize == 0
        end = entry["data_offsets"][1]
    assert 8 + length + end == len(ours)


@pytest.mark.parametrize("limit", [1, 100, 200, 10**9])
def test_shards_stay_below_the_limit_and_the_index_names_all(limit: int, tmp_path: Path) -> None:
    tensors = some_tensors()
    layouts = write(tmp_path / "m", tensors, limit)
    found = {path.name: read_header(path).tensors for path in (tmp_path / "m").glob("*.safetensors")}
    assert {name: set(header) for name, header in found.items()} == {one.name: set(one.places) for one in layouts}
    for header in found.values():
        assert len(header) == 1 or sum(shards.nbytes(spec) for spec in header.values()) <= limit  # type: ignore[arg-type]
    assert_same(disk(tmp_path / "m"), {key: raw(t) for key, t in tensors.items()})
    index = json.loads(index_json(layouts))
    assert index["weight_map"] == {key: name for name, header in found.items() for key in header}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert (tmp_path / "m" / shards.INDEX).exists() == (len(layouts) > 1)


def test_what_belongs_together_lies_in_one_file() -> None:
    spec = (torch.uint8, (60,))
    layouts = lay_out([{"a": spec}, {"b": spec, "b_scale": spec}, {"c": spec}], {}, 130)
    assert [set(layout.places) for layout in layouts] == [{"a"}, {"b", "b_scale"}, {"c"}]


@pytest.mark.parametrize("panel", [8, 2**24])
def test_tensors_are_read_whole_by_rows_and_cast(panel: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_PANEL_BYTES", panel)
    tensors = some_tensors()
    save_file(tensors, tmp_path / "x.safetensors")
    found = stored_in(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        stored = found[key]
        assert (stored.dtype, stored.shape) == (tensor.dtype, tuple(tensor.shape))
        assert raw(stored.read()) == raw(tensor)
        if tensor.dtype.is_floating_point:
            assert raw(stored.read(torch.bfloat16)) == raw(tensor.bfloat16())
        if tensor.dim() and len(tensor) > 2:
            assert raw(stored.read(rows=(1, 3))) == raw(tensor[1:3])


def test_a_tensor_may_be_written_piece_by_piece(tmp_path: Path) -> None:
    value = torch.randn(3, 4, 5)
    (layout,) = lay_out([{"w": (torch.float32, (3, 4, 5))}], {}, 10**9)
    writer = ShardWriter(tmp_path, [layout])
    component = writer.component("w")
    for part in value:
        component.write(part.mT.contiguous().mT)  # whose memory lies another way
    assert component.finish() == hashlib.sha256(raw(value)[2]).hexdigest() == writer.digest("w")
    assert disk(tmp_path)["w"] == raw(value)


@pytest.mark.parametrize("rows", [2, 4])
def test_a_component_of_another_size_is_a_bug(rows: int, tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, lay_out([{"w": (torch.float32, (3, 4))}], {}, 10**9))
    component = writer.component("w")
    with pytest.raises(AssertionError):
        component.write(torch.zeros(rows, 4))
        component.finish()


def test_shards_that_are_there_are_gone_on_with_and_others_made_anew(tmp_path: Path) -> None:
    layouts = lay_out([{"a": (torch.float32, (4,))}, {"b": (torch.float32, (4,))}], {}, 10**9)
    first = ShardWriter(tmp_path, layouts)
    first.component("a").write(torch.ones(4))
    wanted = first.digest("a")
    assert ShardWriter(tmp_path, layouts).digest("a") == wanted
    other = lay_out([{"a": (torch.float32, (4,))}, {"c": (torch.float32, (4,))}], {}, 10**9)
    assert ShardWriter(tmp_path, other).digest("a") != wanted


def test_a_file_that_ends_too_early_or_lies_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(4, 4)}, path)
    stored = stored_in(path)["w"]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="ends within w"):
        stored.read()
    save_file({"w": torch.zeros(4, 4)}, path)
    path.write_bytes(path.read_bytes().replace(b"[4,4]", b"[4,5]"))
    with pytest.raises(CheckpointError):
        stored_in(path)


def test_a_dtype_without_a_name_in_safetensors_is_refused() -> None:
    with pytest.raises(CheckpointError, match="complex128"):
        lay_out([{"w": (torch.complex128, (2,))}], {}, 10**9)


TENSORS = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=8)


@settings(max_examples=60)
@given(sizes=TENSORS, limit=st.integers(1, 120))
def test_shards_hold_every_tensor_once_and_no_more_than_they_may(
    sizes: list[list[int]], limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    groups = [
        {f"{i}.{j}": torch.full((size,), i * 10 + j, dtype=torch.uint8) for j, size in enumerate(group)}
        for i, group in enumerate(sizes)
    ]
    write_shards(folder, groups, {"format": "pt", "who": "me"}, limit)
    everything = {key: raw(t) for group in groups for key, t in group.items()}
    assert disk(folder) == everything
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
        assert index["metadata"]["total_size"] == sum(map(sum, sizes))
        assert len(list(folder.iterdir())) == count + 1


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    write_shards(tmp_path, [{"t": base.t(), "part": base[:, 1:3], "base": base}], {}, 10**6)
    assert disk(tmp_path) == {"t": raw(base.t()), "part": raw(base[:, 1:3]), "base": raw(base)}


def test_shards_have_the_permissions_of_other_new_files(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_shards(tmp_path, [{"a": torch.zeros(1)}], {}, 10**6)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
