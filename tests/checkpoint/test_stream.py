"""Quantizing from disk to disk gives the checkpoint that loading, `quantize_` and saving give, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    CONFIGS,
    Folders,
    Shape,
    assert_same,
    build,
    copy,
    disk,
    edit_json,
    load,
    logits,
    manifest,
    rewrite,
    rtn,
    save,
    state,
)

from llmquant import quantize_
from llmquant.checkpoint import steps
from llmquant.checkpoint.checksums import read_checksums
from llmquant.checkpoint.inspect import inspect_checkpoint
from llmquant.checkpoint.stream import quantize_checkpoint
from llmquant.errors import (
    BadWeightError,
    CheckpointError,
    ConfigError,
    LlmQuantError,
    NoSpaceError,
    NothingToQuantizeError,
    OutputExistsError,
    UnfinishedRunError,
)
from llmquant.quantize import quantize_weight

BFLOAT16 = torch.bfloat16


def both(source: Path, root: Path, config: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> tuple[Path, Path]:
    """The checkpoint made from disk to disk, and the one made in memory; their reports must agree too."""
    streamed, memory = root / "streamed", root / "memory"
    report = quantize_checkpoint(source, streamed, config, dtype=dtype, **kwargs)
    model = load(source, **({} if dtype is None else {"dtype": dtype}))
    wanted = quantize_(model, config)
    model.save_pretrained(memory)
    assert report.quantized == wanted.quantized
    assert report.skipped == wanted.skipped and report.warnings == wanted.warnings
    assert report.bytes_before == wanted.bytes_before
    return streamed, memory


def assert_equal(streamed: Path, memory: Path) -> None:
    """Tensors, manifest but for the save id, dtype, and what the loaded models say."""
    assert_same(disk(streamed), disk(memory))
    own = {"save_id": "", "checksums": {}}  # of the checksums only the place differs
    assert {**manifest(streamed), **own} == {**manifest(memory), **own}
    sums = read_checksums(streamed, manifest(streamed))
    assert sums == read_checksums(memory, manifest(memory)) and sums is not None and set(sums) == set(disk(streamed))
    assert list(manifest(streamed)["weights"]) == list(manifest(memory)["weights"])
    one, two = load(streamed), load(memory)
    assert one.dtype == two.dtype and type(one) is type(two)
    assert_same(state(one), state(two))
    assert torch.equal(logits(one), logits(two))


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_equals_quantizing_in_memory(family: str, dtype: torch.dtype, folders: Folders, tmp_path: Path) -> None:
    assert_equal(*both(folders(family, dtype), tmp_path, CONFIGS[family]))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "mixtral"])
@pytest.mark.parametrize("shape", [Shape.sharded])
def test_equals_it_however_the_source_lies(family: str, shape: Shape, folders: Folders, tmp_path: Path) -> None:
    source = shape.make(folders(family), tmp_path / "source")
    assert_equal(*both(source, tmp_path, CONFIGS[family]))


def test_equals_it_where_the_file_lacks_the_models_prefix(folders: Folders, tmp_path: Path) -> None:
    """As the hub's gpt2, which was saved from the model without its head."""
    source = copy(folders("gpt2"), tmp_path / "source")
    rewrite(
        source / "model.safetensors",
        lambda t: [t.update({key.removeprefix("transformer."): t.pop(key)}) for key in list(t)],
    )
    assert "wte.weight" in disk(source)
    streamed, memory = both(source, tmp_path, CONFIGS["gpt2"])
    assert_equal(streamed, memory)
    assert_same(disk(streamed), disk(folders.quantized("gpt2")))


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_equals_it_where_the_file_has_the_models_own_names(family: str, folders: Folders, tmp_path: Path) -> None:
    load(folders(family)).save_pretrained(tmp_path / "source", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in disk(tmp_path / "source")
    streamed, memory = both(tmp_path / "source", tmp_path, CONFIGS[family])
    assert_equal(streamed, memory)
    assert_same(disk(streamed), disk(folders.quantized(family)))


A8 = rtn(
    {
        "_head": "a8-asym-int8",
        "_embedding": "a8-asym-int8",
        "?re:.*q_proj": "a8-token-float8",
        "_default": "a8-int4-g32",
    }
)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt-oss"])
def test_equals_it_with_quantized_activations(family: str, folders: Folders, tmp_path: Path) -> None:
    streamed, memory = both(folders(family), tmp_path, A8)
    assert_equal(streamed, memory)
    assert all("activation" in entry for entry in manifest(streamed)["weights"].values())


def test_equals_it_with_the_default_algorithm(tmp_path: Path) -> None:
    source = save("llama", tmp_path / "source", num_hidden_layers=1)
    assert_equal(*both(source, tmp_path, {"_default": "int4-g32", "_embedding": "int2-row-asym"}))


@pytest.mark.parametrize("family", ["llama-tied", "gpt-oss"])
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_equals_it_where_the_config_names_another_dtype_than_the_file_has(
    family: str, name: str, folders: Folders, tmp_path: Path
) -> None:
    source = copy(folders(family), tmp_path / "source")
    edit_json(source / "config.json", lambda c: c.update(dtype=name))
    streamed, memory = both(source, tmp_path, CONFIGS[family])
    assert_equal(streamed, memory)
    assert load(streamed).dtype == getattr(torch, name)


@pytest.mark.parametrize("family", ["llama-tied", "mixtral", "gpt-oss"])
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16, torch.float16], ids=str)
def test_equals_it_with_a_dtype_asked_for(family: str, dtype: torch.dtype, folders: Folders, tmp_path: Path) -> None:
    streamed, memory = both(folders(family, BFLOAT16), tmp_path, CONFIGS[family], dtype)
    assert_equal(streamed, memory)
    assert load(streamed).dtype == dtype
    assert json.loads((streamed / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_the_old_name_of_the_dtype_does_not_survive(folders: Folders, tmp_path: Path) -> None:
    source = copy(folders("llama", BFLOAT16), tmp_path / "source")
    edit_json(source / "config.json", lambda c: c.update(torch_dtype=c.pop("dtype")))
    streamed, memory = both(source, tmp_path, CONFIGS["llama"], torch.float16)
    assert_equal(streamed, memory)
    assert "torch_dtype" not in json.loads((streamed / "config.json").read_text())


# ---------------------------------------------------------------------------------- ties

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
COPIES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "under the head's name alone": lambda t: t.update({HEAD: t.pop(TABLE)}),
    "under both names": lambda t: t.update({HEAD: t[TABLE].clone()}),
}


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("quantized", [True, False])
def test_a_tied_weight_may_lie(copies: str, quantized: bool, folders: Folders, tmp_path: Path) -> None:
    source = copy(folders("llama-tied"), tmp_path / "source")
    rewrite(source / "model.safetensors", COPIES[copies])
    config = CONFIGS["llama-tied"] if quantized else rtn("int4-g32")
    streamed, memory = both(source, tmp_path, config)
    assert_equal(streamed, memory)
    assert TABLE in disk(streamed) and HEAD not in disk(streamed)


@pytest.mark.parametrize("quantized", [True, False])
def test_two_different_copies_of_a_tied_weight_are_refused(quantized: bool, folders: Folders, tmp_path: Path) -> None:
    source = copy(folders("llama-tied"), tmp_path / "source")
    rewrite(source / "model.safetensors", lambda t: t.update({HEAD: t[TABLE] + 1}))
    with pytest.raises(CheckpointError, match="ties") as error:
        quantize_checkpoint(source, tmp_path / "out", CONFIGS["llama-tied"] if quantized else rtn("int4-g32"))
    assert TABLE in str(error.value) and HEAD in str(error.value) and "tie_word_embeddings" in str(error.value)
    assert os.listdir(tmp_path) == ["source"]


# ---------------------------------------------------------------------------------- what may go wrong


def poison(key: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        found = next(k for k in tensors if key in k)
        tensors[found].flatten()[3] = value

    return change


BAD = {
    "llama": ("layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj.weight"),
    "gpt2": ("h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc.weight"),
    "mixtral": ("layers.1.block_sparse_moe.experts.2.w3", "model.layers.1.mlp.experts.gate_up_proj"),
    "gpt-oss": ("layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.down_proj"),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("family", BAD)
def test_a_bad_weight_is_named_and_leaves_no_folder(
    family: str, value: float, folders: Folders, tmp_path: Path
) -> None:
    source = copy(folders(family), tmp_path / "source")
    key, fqn = BAD[family]
    rewrite(source / "model.safetensors", poison(key, value))
    with pytest.raises(BadWeightError, match="NaN or infinite") as error:
        quantize_checkpoint(source, tmp_path / "out", rtn("int4-g32"))
    assert error.value.where == fqn and error.value.hint
    assert os.listdir(tmp_path) == ["source"]


def test_a_bad_weight_that_stays_in_float_is_nobodys_business(folders: Folders, tmp_path: Path) -> None:
    source = copy(folders("llama"), tmp_path / "source")
    rewrite(source / "model.safetensors", poison("layers.1.mlp.up_proj", float("nan")))
    config = rtn({"re:.*1.mlp.up_proj": "none", "_default": "int4-g32"})
    streamed, memory = tmp_path / "streamed", tmp_path / "memory"
    quantize_checkpoint(source, streamed, config)
    model = load(source)
    quantize_(model, config)
    model.save_pretrained(memory)
    assert_same(disk(streamed), disk(memory))


REFUSED: dict[str, tuple[Any, type[LlmQuantError]]] = {
    "nothing to quantize": ({"_experts": "int4"}, NothingToQuantizeError),
    "a key that hits nothing": ({"model.layer.0": "int4"}, ConfigError),
    "a scheme that does not exist": ("int9", ConfigError),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_done_is_refused_before_anything_is_written(kind: str, folders: Folders, tmp_path: Path) -> None:
    config, error = REFUSED[kind]
    with pytest.raises(error):
        quantize_checkpoint(folders("llama"), tmp_path / "out", config)
    assert os.listdir(tmp_path) == []


def test_a_disk_without_room_is_refused_before_anything_is_written(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(len(data) for _, _, data in disk(folders.quantized("llama-tied")).values())
    usage = shutil.disk_usage(tmp_path)
    config = CONFIGS["llama-tied"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(NoSpaceError, match="free") as error:
        quantize_checkpoint(folders("llama-tied"), tmp_path / "out", config)
    assert error.value.hint and os.listdir(tmp_path) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    quantize_checkpoint(folders("llama-tied"), tmp_path / "out", config)  # exactly the bytes that it takes


class Boom(BaseException):
    """Raised from the progress callback, in the middle of the work."""


class Interrupting:
    """A progress that raises an error behind a part of the work."""

    def __init__(self, error: type[BaseException], share: float = 0.5) -> None:
        self.error, self.share = error, share

    def __call__(self, done: int, total: int, name: str) -> None:
        if done > total * self.share:
            raise self.error("stop")


def everything(folder: Path) -> dict[str, bytes]:
    """The bytes of every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, OSError, SystemExit, NoSpaceError])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("jobs", [1, 3])
def test_an_interruption_leaves_what_was_there_and_can_be_gone_on_with(
    jobs: int, old: bool, error: type[BaseException], folders: Folders, tmp_path: Path
) -> None:
    out, options = tmp_path / "out", {"overwrite": True, "max_shard_bytes": 20_000, "jobs": jobs}
    if old:
        quantize_checkpoint(folders("llama"), out, rtn("int8"))
    before = disk(out) if old else {}
    with pytest.raises(error):
        quantize_checkpoint(folders("llama"), out, rtn("int4-g32"), progress=Interrupting(error), **options)
    assert sorted(os.listdir(tmp_path)) == (["out", "out.partial"] if old else ["out.partial"])
    if old:
        assert_same(disk(out), before)
        assert inspect_checkpoint(out).rows
    quantize_checkpoint(folders("llama"), out, rtn("int4-g32"), **options)
    assert os.listdir(tmp_path) == ["out"]
    quantize_checkpoint(folders("llama"), tmp_path / "straight", rtn("int4-g32"), max_shard_bytes=20_000)
    assert everything(out) == everything(tmp_path / "straight")


def test_an_interruption_before_anything_is_finished_leaves_nothing(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(folders("llama"), tmp_path / "out", "int8", progress=Interrupting(KeyboardInterrupt, -1))
    assert os.listdir(tmp_path) == []


def interrupted(source: Path, out: Path, config: Any = "int8", **options: Any) -> None:
    """Leaves unfinished work."""
    with pytest.raises(Boom):
        quantize_checkpoint(source, out, config, progress=Interrupting(Boom), **options)


def test_what_is_finished_is_not_done_again(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(steps, "quantize_weight", lambda *a, **k: (done.append(a), quantize_weight(*a, **k))[1])
    interrupted(folders("llama"), tmp_path / "out", "int8")
    first = len(done)
    calls: list[int] = []
    quantize_checkpoint(folders("llama"), tmp_path / "out", "int8", progress=lambda d, t, n: calls.append(d))
    assert 2 < first < len(done) == 16 and calls[0] > 0 and calls == sorted(calls)


def test_finished_work_that_was_damaged_is_done_again(folders: Folders, tmp_path: Path) -> None:
    """As where a disk lost power and kept the journal, but not what it speaks of."""
    interrupted(folders("llama"), tmp_path / "out", max_shard_bytes=20_000)
    for shard in (tmp_path / "out.partial" / "draft").glob("*.safetensors"):
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    quantize_checkpoint(folders("llama"), tmp_path / "out", "int8", max_shard_bytes=20_000)
    quantize_checkpoint(folders("llama"), tmp_path / "straight", "int8", max_shard_bytes=20_000)
    assert everything(tmp_path / "out") == everything(tmp_path / "straight")


OTHERS: dict[str, Any] = {
    "recipe": {"config": "int6"},
    "dtype": {"dtype": torch.bfloat16},
    "shards": {"max_shard_bytes": 20_000},
    "model": {"family": "llama-tied"},
    "algorithm": {"config": rtn("int8")},
}


@pytest.mark.parametrize("other", OTHERS)
def test_unfinished_work_of_another_run_is_refused_and_kept(other: str, folders: Folders, tmp_path: Path) -> None:
    interrupted(folders("llama"), tmp_path / "out", "int8-g32")
    options = {"config": "int8-g32"} | OTHERS[other]
    before = everything(tmp_path / "out.partial" / "draft")
    with pytest.raises(UnfinishedRunError, match="another") as error:
        quantize_checkpoint(folders(options.pop("family", "llama")), tmp_path / "out", overwrite=True, **options)
    assert error.value.where == str(tmp_path / "out.partial") and error.value.hint
    assert everything(tmp_path / "out.partial" / "draft") == before and os.listdir(tmp_path) == ["out.partial"]
    quantize_checkpoint(folders("llama"), tmp_path / "out", "int8-g32")


def test_a_source_that_changed_meanwhile_is_another(folders: Folders, tmp_path: Path) -> None:
    source = copy(folders("llama"), tmp_path / "source")
    interrupted(source, tmp_path / "out")
    rewrite(source / "model.safetensors", lambda t: t[TABLE].add_(1))
    with pytest.raises(UnfinishedRunError):
        quantize_checkpoint(source, tmp_path / "out", "int8")


def test_a_folder_of_that_name_that_is_the_users_own_is_left_alone(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "letter.txt").write_text("mine")
    with pytest.raises(UnfinishedRunError, match="not the unfinished work"):
        quantize_checkpoint(folders("llama"), tmp_path / "out", "int8")
    assert (tmp_path / "out.partial" / "letter.txt").read_text() == "mine" and os.listdir(tmp_path) == ["out.partial"]


# ---------------------------------------------------------------------------------- several at a time


@pytest.mark.parametrize("family", ["llama-tied", "mixtral", "gpt2"])
@pytest.mark.parametrize("options", [{"jobs": 2}, {"jobs": 5}, {"max_memory": 10**12}, {"jobs": 1}], ids=str)
def test_files_are_equal_however_many_tensors_are_at_work(
    options: dict[str, int], family: str, folders: Folders, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    for name, given in (("one", {}), ("many", options)):
        quantize_checkpoint(folders(family), tmp_path / name, CONFIGS[family], max_shard_bytes=20_000, **given)
    assert everything(tmp_path / "one") == everything(tmp_path / "many")
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("options", "text"), [({"jobs": 0}, "at least one"), ({"max_memory": 10**6}, "too little")])
def test_a_crew_that_cannot_be_is_refused(options: dict[str, int], text: str, folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        quantize_checkpoint(folders("llama"), tmp_path / "out", "int8", **options)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_of_a_weight_ends_all(jobs: int, folders: Folders, tmp_path: Path) -> None:
    source = copy(folders("llama"), tmp_path / "source")
    rewrite(source / "model.safetensors", poison("layers.1.mlp.up_proj", float("nan")))
    with pytest.raises(BadWeightError, match="NaN"):
        quantize_checkpoint(source, tmp_path / "out", "int8", jobs=jobs)
    assert os.listdir(tmp_path) == ["source"]  # the run could not be finished: nothing to go on with


def test_an_output_is_replaced_only_when_asked(folders: Folders, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_checkpoint(folders("llama"), out, rtn("int8"))
    before = disk(out)
    with pytest.raises(OutputExistsError):
        quantize_checkpoint(folders("llama"), out, rtn("int4-g32"))
    assert_same(disk(out), before)
    quantize_checkpoint(folders("llama"), out, rtn("int4-g32"), overwrite=True, max_shard_bytes=20_000)
    assert {entry["format"] for entry in manifest(out)["weights"].values()} == {"int4"}
    assert not (out / "model.safetensors").exists() and os.listdir(tmp_path) == ["out"]


def test_a_source_is_never_its_own_output(folders: Folders, tmp_path: Path) -> None:
    """With overwrite it is replaced, but only by a complete result."""
    source = copy(folders("llama"), tmp_path / "source")
    with pytest.raises(OutputExistsError):
        quantize_checkpoint(source, source, rtn("int4-g32"))
    quantize_checkpoint(source, source, rtn("int4-g32"), overwrite=True)
    quantize_checkpoint(folders("llama"), tmp_path / "wanted", rtn("int4-g32"))
    assert_same(disk(source), disk(tmp_path / "wanted"))


# ---------------------------------------------------------------------------------- the folder


def test_shards_hold_what_one_file_would(folders: Folders, tmp_path: Path) -> None:
    quantize_checkpoint(folders("mixtral"), tmp_path / "one", CONFIGS["mixtral"])
    quantize_checkpoint(folders("mixtral"), tmp_path / "many", CONFIGS["mixtral"], max_shard_bytes=10_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 4
    assert_same(disk(tmp_path / "one"), disk(tmp_path / "many"))
    assert_same(state(load(tmp_path / "one")), state(load(tmp_path / "many")))


def test_what_lies_beside_the_weights_comes_along(folders: Folders, tmp_path: Path) -> None:
    source = copy(folders("llama"), tmp_path / "source")
    for name in ("tokenizer.json", "LICENSE", "old.gguf", "pytorch_model.bin.index.json"):
        (source / name).write_text(name)
    quantize_checkpoint(source, tmp_path / "out", rtn("int8"))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "LICENSE",
        "llmquant_checksums.json",
    }
    assert (tmp_path / "out" / "LICENSE").read_text() == "LICENSE"


def test_the_config_is_the_sources_with_a_manifest(folders: Folders, tmp_path: Path) -> None:
    quantize_checkpoint(folders("llama"), tmp_path / "out", rtn("int8"))
    before, after = (json.loads((f / "config.json").read_text()) for f in (folders("llama"), tmp_path / "out"))
    assert after.pop("quantization_config")["quant_method"] == "llmquant"
    assert after == before


@pytest.mark.parametrize("family", CONFIGS)
def test_progress_grows_to_the_end(family: str, folders: Folders, tmp_path: Path) -> None:
    calls: list[tuple[int, int, Any]] = []
    report = quantize_checkpoint(
        folders(family), tmp_path / "out", CONFIGS[family], progress=lambda *call: calls.append(call)
    )
    done, totals, names = zip(*calls, strict=True)
    assert list(done) == sorted(done) and done[0] == 0
    assert set(totals) == {done[-1]} == {report.bytes_before}
    assert [name.tensors_done for name in names] == sorted(name.tensors_done for name in names)
    assert {name.tensors for name in names} == {names[-1].tensors_done}
    assert set(names) >= set(report.quantized)


def test_the_report_counts_the_bytes_that_are_written(folders: Folders, tmp_path: Path) -> None:
    report = quantize_checkpoint(folders("llama-tied"), tmp_path / "out", CONFIGS["llama-tied"])
    assert report.bytes_after == sum(len(data) for _, _, data in disk(tmp_path / "out").values())
    assert report.bytes_before == sum(p.nbytes for p in build("llama-tied").parameters())
    assert report.seconds > 0
