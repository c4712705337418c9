"""Calibrated algorithms with one block in memory: what they give in memory, and what an interruption leaves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCAB, Folders, assert_same, copy, disk, load

from llmquant.calibrate.collect import collect_stats
from llmquant.calibrate.walk import collect_by_blocks
from llmquant.checkpoint.lazy import LazyModel
from llmquant.checkpoint.source import open_source
from llmquant.config.recipe import Changes, Recipe, change_algorithm, to_recipe
from llmquant.convert.calibrated import Reading
from llmquant.convert.job import Conversion
from llmquant.convert.listener import Silent
from llmquant.errors import UnfinishedRunError
from llmquant.integrations.loading import load_tokenizer
from llmquant.tune.sequential import quantize_with_data_


def with_tokenizer(folder: Path) -> Path:
    """Adds a tokenizer of words, and a text of them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    ids = torch.randint(3, VOCAB, (4000,), generator=torch.Generator().manual_seed(0))
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in ids.tolist()))
    return folder


def conversion(source: Path, algorithm: str = "gptq", scheme: str = "int3-g32", **options: Any) -> Conversion:
    recipe: Recipe = change_algorithm(to_recipe(scheme), algorithm) if algorithm else to_recipe(scheme)
    return Conversion(recipe, Reading(str(source / "text.txt"), 1024), **options)


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Stopping(Silent):
    """Interrupts at a step of the bar of that title."""

    def __init__(self, step: int, title: str = "Quantizing") -> None:
        super().__init__()
        self.step, self.title, self.first = step, title, -1

    @contextmanager
    def bar(self, title: str) -> Iterator[Any]:
        def told(done: int, total: int, item: str = "", /) -> None:
            self.first = done if self.first < 0 else self.first
            if title == self.title and done >= self.step:
                raise KeyboardInterrupt

        yield told


@pytest.mark.parametrize("family", ["llama-tied", "qwen3", "mixtral", "gpt-oss"])
def test_gptq_by_blocks_from_the_disk_is_gptq_in_memory(family: str, folders: Folders, tmp_path: Path) -> None:
    source = with_tokenizer(copy(folders(family), tmp_path / "source"))
    report, _ = conversion(source).write(str(source), tmp_path / "out")
    model = load(source)
    config = change_algorithm(to_recipe("int3-g32"), "gptq").config
    wanted = quantize_with_data_(
        model, config, str(source / "text.txt"), tokenizer=load_tokenizer(source), tokens=1024, seed=0
    )
    model.save_pretrained(tmp_path / "memory")
    assert_same(disk(tmp_path / "out"), disk(tmp_path / "memory"))
    assert report.quantized == wanted.quantized and report.warnings == wanted.warnings
    assert (report.bytes_before, report.skipped) == (wanted.bytes_before, wanted.skipped)
    assert report.bytes_after == sum(len(data) for _, _, data in disk(tmp_path / "out").values())


@pytest.mark.parametrize("steps", [1, 3])
def test_signround_by_blocks_takes_its_steps(steps: int, folders: Folders, tmp_path: Path) -> None:
    source = with_tokenizer(copy(folders("llama-tied"), tmp_path / "source"))
    asked = replace(conversion(source, "signround"), reading=Reading(str(source / "text.txt"), 1024, steps=steps))
    asked.write(str(source), tmp_path / "out")
    model, config = load(source), change_algorithm(to_recipe("int3-g32"), "signround").config
    text, tokenizer = str(source / "text.txt"), load_tokenizer(source)
    quantize_with_data_(model, config, text, tokenizer=tokenizer, tokens=1024, steps=steps)
    model.save_pretrained(tmp_path / "memory")
    assert_same(disk(tmp_path / "out"), disk(tmp_path / "memory"))


@pytest.mark.parametrize("step", [1, 5, 8])
@pytest.mark.parametrize("rotate", [None, "hadamard"])
def test_an_interrupted_run_goes_on_and_ends_with_equal_files(
    rotate: str | None, step: int, folders: Folders, tmp_path: Path
) -> None:
    source = with_tokenizer(copy(folders("llama"), tmp_path / "source"))
    work = conversion(source)
    work = replace(work, recipe=replace(work.recipe, changes=Changes(rotate=rotate)))  # type: ignore[arg-type]
    work.write(str(source), tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        work.write(str(source), tmp_path / "out", listener=Stopping(step))
    left = {"out.partial"} if step > 1 else set()
    assert set(os.listdir(tmp_path)) == {"source", "straight"} | left
    other = conversion(source, scheme="int4-g32")
    if left:
        with pytest.raises(UnfinishedRunError, match="another"):
            other.write(str(source), tmp_path / "out")
    work.write(str(source), tmp_path / "out")
    assert everything(tmp_path / "out") == everything(tmp_path / "straight")
    assert set(os.listdir(tmp_path)) == {"source", "straight", "out"}


@pytest.mark.parametrize("scheme", ["s8-int8", "int4-g32"])
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral"])
def test_statistics_by_blocks_are_those_of_the_whole_model(scheme: str, family: str, folders: Folders) -> None:
    ids = torch.randint(3, VOCAB, (4, 24), generator=torch.Generator().manual_seed(3))
    lazy, imatrix = LazyModel(open_source(folders(family))), scheme == "int4-g32"
    config = to_recipe({"_default": scheme}).config
    wanted = collect_stats(load(folders(family)), config, ids, imatrix=imatrix)
    found = collect_by_blocks(lazy.model, config, list(ids.split(1)), lazy.held, imatrix=imatrix)
    assert list(found) == list(wanted) and (found.tokens, set(found.warnings)) == (96, set(wanted.warnings))
    for name, stats in wanted.items():
        for field in ("mean_square", "low", "high", "tokens"):
            one, two = getattr(found[name], field), getattr(stats, field)
            assert (one is None and two is None) or torch.equal(one, two), (name, field)
    assert all(p.is_meta for p in lazy.model.parameters())
