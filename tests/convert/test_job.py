"""A conversion below the command line: who hears of it, and what it hands over before it cleans up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import Folders, load, logits

from llmquant.checkpoint.inspect import inspect_checkpoint
from llmquant.config.recipe import Changes, change_algorithm, to_recipe
from llmquant.convert.job import Conversion
from llmquant.convert.listener import Silent
from llmquant.errors import OutputExistsError


class Heard(Silent):
    """Remembers the titles of bars and what was said."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def bar(self, title: str) -> Any:
        self.told.append(title)
        return super().bar(title)

    def say(self, text: str) -> None:
        self.told.append(text)


def test_a_rotated_model_is_there_while_it_is_needed(folders: Folders, tmp_path: Path) -> None:
    recipe = replace(change_algorithm(to_recipe("int8"), "rtn"), changes=Changes(rotate="hadamard"))
    seen: list[Path] = []

    def on_plain(folder: str) -> None:
        seen.append(Path(folder))
        error = logits(load(seen[0])) - logits(load(folders("llama")))
        assert seen[0] != folders("llama") and 0 < error.abs().max() < 1e-4

    heard = Heard()
    report, changes = Conversion(recipe).write(str(folders("llama")), tmp_path / "q", listener=heard, on_plain=on_plain)
    assert not seen[0].exists() and sorted(path.name for path in tmp_path.iterdir()) == ["q"]
    assert set(changes) == {"rotation"} and len(report.quantized) == 16  # int8 has embedding and head, too
    assert heard.told[0] == "Rotating" and heard.told[-1] == "Quantizing" and "channels rotated" in heard.told[1]


def test_without_changes_the_model_itself_was_quantized(folders: Folders, tmp_path: Path) -> None:
    seen: list[str] = []
    Conversion(to_recipe("int4-g32")).write(str(folders("llama")), tmp_path / "q", on_plain=seen.append)
    assert seen == [str(folders("llama"))]
    assert inspect_checkpoint(tmp_path / "q").totals()["quantized_weights"] == 15


def test_what_is_there_is_replaced_only_on_demand(folders: Folders, tmp_path: Path) -> None:
    work = Conversion(to_recipe("int8"))
    work.write(str(folders("llama")), tmp_path / "q")
    with pytest.raises(OutputExistsError):
        work.write(str(folders("llama")), tmp_path / "q")
    work.write(str(folders("llama")), tmp_path / "q", overwrite=True)
