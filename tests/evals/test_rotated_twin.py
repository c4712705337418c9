"""The rotated twin: the logits of its model, none of its weights."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path

import models
import pytest
import torch

from llmquant.errors import OutputExistsError

FOLDER = Path(__file__).parents[2] / "evals" / "quality"


@pytest.fixture
def write_twin(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("rotated_twin").write_twin


@pytest.mark.parametrize("family", ["llama-tied", "qwen3"])
def test_the_twin_says_the_same(write_twin: Callable[..., Path], tmp_path: Path, family: str) -> None:
    plain = models.save(family, tmp_path / "plain")
    (plain / "LICENSE").write_text("free")
    twin = write_twin(plain, tmp_path / "twin")
    first, second = models.logits(models.load(plain)), models.logits(models.load(twin))
    assert 0 < (first - second).norm() / first.norm() < 1e-4
    own, other = models.disk(plain), models.disk(twin)
    assert other.keys() == own.keys() | {"lm_head.weight"} and (twin / "LICENSE").exists()
    assert not [key for key in own if own[key] == other[key] and "q_norm" not in key and "k_norm" not in key]


def test_it_is_made_once_for_a_seed(write_twin: Callable[..., Path], tmp_path: Path) -> None:
    plain = models.save("llama", tmp_path / "plain")
    twin = write_twin(plain, tmp_path / "twin")
    before = models.disk(twin)
    (twin / "model.safetensors").touch()
    stamp = (twin / "model.safetensors").stat().st_mtime_ns
    write_twin(plain, twin)
    assert (twin / "model.safetensors").stat().st_mtime_ns == stamp
    write_twin(plain, twin, seed=1)
    assert models.disk(twin) != before


def test_another_folder_is_not_replaced(write_twin: Callable[..., Path], tmp_path: Path) -> None:
    plain = models.save("llama", tmp_path / "plain")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(OutputExistsError):
        write_twin(plain, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_the_real_twin(write_twin: Callable[..., Path], tmp_path: Path) -> None:
    """SmolLM2 as `make demo` leaves it, or wherever LLMQUANT_TEST_MODEL says."""
    plain = Path(os.environ.get("LLMQUANT_TEST_MODEL", FOLDER.parents[1] / "demo" / "SmolLM2-135M"))
    if not (plain / "model.safetensors").is_file():
        pytest.skip("SmolLM2 is not here: make demo")
    twin = write_twin(plain, tmp_path / "twin")
    ids = torch.randint(0, 49152, (1, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = (models.load(p, dtype=torch.float32)(ids).logits for p in (plain, twin))
    assert (first - second).norm() / first.norm() < 1e-4
