"""A checkpoint is accepted as one save wrote it, and in no other state; what is wrong is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Folders, copy, edit_json, load, manifest, rewrite
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmquant.checkpoint.inspect import inspect_checkpoint
from llmquant.checkpoint.manifest import HASH_KEY, SAVE_KEY, check_version, digest, new_manifest, shard_metadata, verify
from llmquant.errors import CheckpointError

FAMILY = "llama-tied"


@pytest.fixture(scope="session")
def sharded(folders: Folders) -> Path:
    """A quantized checkpoint in several shards."""
    target = folders.root / "sharded"
    load(folders.quantized(FAMILY)).save_pretrained(target, max_shard_size="10KB")
    assert len(list(target.glob("*.safetensors"))) >= 4
    return target


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def refuses(folder: Path, *names: str) -> CheckpointError:
    """Checked by headers alone, and loaded: both must refuse, with the same class and what is at fault."""
    with pytest.raises(CheckpointError) as error:
        verify(manifest(folder), shards(folder))
    for name in names:
        assert name in str(error.value)
    with pytest.raises(CheckpointError):
        load(folder)
    with pytest.raises(CheckpointError):
        inspect_checkpoint(folder)
    return error.value


def rebind(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A manifest that says something else, with shards that belong to it: what another writer might produce."""
    edit_json(folder / "config.json", lambda config: change(config["quantization_config"]))
    for path in shards(folder):
        save_file(load_file(path), path, metadata=shard_metadata(manifest(folder)))


def test_an_intact_checkpoint_is_accepted(sharded: Path) -> None:
    verify(manifest(sharded), shards(sharded))
    assert load(sharded) is not None


def test_every_shard_carries_hash_and_save_id(sharded: Path) -> None:
    for path in shards(sharded):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {
                "format": "pt",
                HASH_KEY: digest(manifest(sharded)),
                SAVE_KEY: manifest(sharded)["save_id"],
            }


# ---------------------------------------------------------------------------------- the hash

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=5))
def test_the_hash_does_not_depend_on_order_or_on_a_trip_through_a_file(content: dict[str, Any]) -> None:
    backwards = dict(reversed(content.items()))
    assert digest(content) == digest(backwards)
    assert digest(content) == digest(json.loads(json.dumps(content, indent=3, ensure_ascii=False)))


@given(st.dictionaries(st.text(), JSON, min_size=1, max_size=5), JSON)
def test_the_hash_covers_every_value(content: dict[str, Any], value: Any) -> None:
    key = next(iter(content))
    same = json.dumps(value, sort_keys=True) == json.dumps(content[key], sort_keys=True)
    assert (digest(content) == digest({**content, key: value})) == same


def test_two_manifests_of_the_same_weights_differ() -> None:
    a, b = new_manifest([], {}), new_manifest([], {})
    assert a["save_id"] != b["save_id"] and digest(a) != digest(b)
    assert {**a, "save_id": b["save_id"]} == b


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("number", range(4))
def test_a_missing_shard(number: int, sharded: Path, tmp_path: Path) -> None:
    folder = copy(sharded, tmp_path / "c")
    gone = shards(folder)[number]
    gone.unlink()
    with pytest.raises(CheckpointError):
        verify(manifest(folder), shards(folder))
    with pytest.raises((CheckpointError, OSError), match=gone.name):
        load(folder)
    with pytest.raises(CheckpointError, match=gone.name):
        inspect_checkpoint(folder)


def test_truncation_at_any_length(folders: Folders, tmp_path: Path) -> None:
    folder = copy(folders.quantized(FAMILY), tmp_path / "c")
    (path,) = shards(folder)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    lengths = {0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1}
    for length in sorted(lengths | set(range(0, len(whole), len(whole) // 40))):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated") as error:
            verify(manifest(folder), [path])
        assert str(path) in str(error.value)
    refuses(folder, path.name)
    path.write_bytes(whole + b"\0")
    refuses(folder, path.name)


@pytest.mark.parametrize("number", range(4))
def test_a_shard_of_another_save_of_the_same_model(number: int, sharded: Path, tmp_path: Path) -> None:
    folder, other = copy(sharded, tmp_path / "c"), tmp_path / "other"
    load(sharded).save_pretrained(other, max_shard_size="10KB")
    foreign = shards(other)[number]
    (folder / foreign.name).write_bytes(foreign.read_bytes())
    refuses(folder, foreign.name, manifest(other)["save_id"], manifest(folder)["save_id"])


def test_a_config_of_another_save(sharded: Path, tmp_path: Path) -> None:
    folder = copy(sharded, tmp_path / "c")
    load(sharded).save_pretrained(tmp_path / "other", max_shard_size="10KB")
    (folder / "config.json").write_bytes((tmp_path / "other" / "config.json").read_bytes())
    refuses(folder, shards(folder)[0].name)


def test_a_shard_that_llmquant_did_not_write(sharded: Path, tmp_path: Path) -> None:
    folder = copy(sharded, tmp_path / "c")
    path = shards(folder)[1]
    save_file(load_file(path), path)
    assert "did not write" in str(refuses(folder, path.name))


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "format": lambda m: first(m).update(format="int8"),
    "block": lambda m: first(m).update(block=[1, 64]),
    "transposed": lambda m: first(m).update(transposed=True),
    "save id": lambda m: m.update(save_id="0" * 32),
    "config": lambda m: m["config"].pop(),
    "one weight less": lambda m: m["weights"].popitem(),
    "one weight more": lambda m: m["weights"].update({"model.norm.weight": first(m)}),
    "a new field": lambda m: m.update(surprise=1),
    "no weights": lambda m: m.update(weights={}),
}


def first(content: dict[str, Any]) -> dict[str, Any]:
    return content["weights"]["model.layers.0.self_attn.q_proj.weight"]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_manifest(edit: str, sharded: Path, tmp_path: Path) -> None:
    folder = copy(sharded, tmp_path / "c")
    edit_json(folder / "config.json", lambda config: EDITS[edit](config["quantization_config"]))
    refuses(folder)


@pytest.mark.parametrize("suffix", ["", "_scale", "_zero_point"])
def test_a_missing_component(suffix: str, folders: Folders, tmp_path: Path) -> None:
    folder = copy(folders.quantized(FAMILY), tmp_path / "c")
    key = f"model.layers.1.mlp.up_proj.weight{suffix}"
    rewrite(shards(folder)[0], lambda tensors: tensors.pop(key))
    refuses(folder, key, "lacks")


WRONG: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dtype": lambda t: t.view(torch.int8) if t.dtype == torch.uint8 else t.float(),
    "shape": lambda t: t[:-1].clone(),
    "rank": lambda t: t.unsqueeze(0),
}


@pytest.mark.parametrize("suffix", ["", "_scale", "_zero_point"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_component_of_wrong_dtype_or_shape(wrong: str, suffix: str, folders: Folders, tmp_path: Path) -> None:
    folder = copy(folders.quantized(FAMILY), tmp_path / "c")
    key = f"model.layers.1.mlp.up_proj.weight{suffix}"
    rewrite(shards(folder)[0], lambda tensors: tensors.update({key: WRONG[wrong](tensors[key])}))
    refuses(folder, f"{key} is", folder.name)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_an_unknown_version(version: Any, folders: Folders, tmp_path: Path) -> None:
    folder = copy(folders.quantized(FAMILY), tmp_path / "c")
    rebind(folder, lambda m: m.update(format_version=version))
    assert "version" in str(refuses(folder))
    with pytest.raises(CheckpointError, match="here"):
        check_version(manifest(folder), "here")


def test_an_unknown_format_of_a_later_library(folders: Folders, tmp_path: Path) -> None:
    folder = copy(folders.quantized(FAMILY), tmp_path / "c")
    rebind(folder, lambda m: first(m).update(format="nvfp9"))
    refuses(folder, "nvfp9", "model.layers.0.self_attn.q_proj.weight")


BROKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "no weights": lambda m: m.pop("weights"),
    "weights are a list": lambda m: m.update(weights=[1]),
    "an entry without a block": lambda m: first(m).pop("block"),
    "an entry that is a text": lambda m: m["weights"].update({"model.norm.weight": "int4"}),
    "a scale dtype that torch lacks": lambda m: first(m).update(scale_dtype="float7"),
    "a scale dtype that is no dtype": lambda m: first(m).update(scale_dtype="nn"),
    "a shape of one dimension": lambda m: first(m).update(shape=[4]),
    "a block of texts": lambda m: first(m).update(block=["a", "b"]),
    "a block of one": lambda m: first(m).update(block=[1]),
    "a block of none": lambda m: first(m).update(block=[0, 0]),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_manifest_that_makes_no_sense(broken: str, folders: Folders, tmp_path: Path) -> None:
    folder = copy(folders.quantized(FAMILY), tmp_path / "c")
    rebind(folder, BROKEN[broken])
    refuses(folder)


# ---------------------------------------------------------------------------------- what is not refused


def test_what_a_later_library_says_for_people_does_not_matter(folders: Folders, tmp_path: Path) -> None:
    """`config` is not needed to read a checkpoint, and unknown fields are ignored: same version, same tensors."""
    folder = copy(folders.quantized(FAMILY), tmp_path / "c")
    later = [["_default", {"format": "mxfp4", "surprise": 3}]]
    rebind(folder, lambda m: m.update(config=later, llmquant_version="9.9", surprise=[1]))
    model = load(folder)
    model.save_pretrained(tmp_path / "again")
    assert manifest(tmp_path / "again")["config"] == later
    verify(manifest(tmp_path / "again"), shards(tmp_path / "again"))


def test_a_manifest_may_lack_what_people_read(folders: Folders, tmp_path: Path) -> None:
    folder = copy(folders.quantized(FAMILY), tmp_path / "c")
    rebind(folder, lambda m: [m.pop(key) for key in ("config", "llmquant_version")])
    load(folder).save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again") is not None
