"""Checkpoints of every version of the format load with the same values for ever (see make.py)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import numpy_reader
import pytest
import torch
from models import assert_same, disk, load, manifest, weights

from llmquant.checkpoint.inspect import inspect_checkpoint
from llmquant.formats import FORMATS

HERE = Path(__file__).parent
GOLDENS = sorted(path.parent for path in HERE.glob("v*/*/expected.json"))
FORMATS_OF_V1 = {f"int{bits}" for bits in range(1, 9)} | {"float8", "float8-e5m2"}
golden = pytest.mark.parametrize("folder", GOLDENS, ids=lambda f: f"{f.parent.name}-{f.name}")


def sha256(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def expected(folder: Path) -> dict:
    return json.loads((folder / "expected.json").read_text())


@golden
def test_loads_with_the_same_values(folder: Path) -> None:
    model = load(folder)
    found = {fqn: p.detach() for fqn, p in model.named_parameters()}
    quantized = {fqn for fqn, _ in weights(model)}
    values = {fqn: (p.dequantize(torch.float32) if fqn in quantized else p).numpy() for fqn, p in found.items()}
    assert {fqn: sha256(value) for fqn, value in values.items()} == expected(folder)["sha256"]
    assert quantized >= set(manifest(folder)["weights"])


@golden
def test_says_the_same(folder: Path) -> None:
    wanted = expected(folder)
    with torch.no_grad():
        logits = load(folder)(torch.tensor(wanted["tokens"]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(logits, torch.tensor(wanted["logits"]), rtol=1e-4, atol=1e-4)
    assert logits.std() > 0.1  # a model that says nothing would pass as well


@golden
def test_the_numpy_reader_finds_the_same_values(folder: Path) -> None:
    assert {fqn: sha256(value) for fqn, value in numpy_reader.read(folder).items()} == expected(folder)["sha256"]


@golden
def test_saving_again_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path / "again")
    assert_same(disk(tmp_path / "again"), disk(folder))
    assert manifest(tmp_path / "again")["weights"] == manifest(folder)["weights"]
    assert manifest(tmp_path / "again")["save_id"] != manifest(folder)["save_id"]


@golden
def test_can_be_inspected(folder: Path) -> None:
    found = inspect_checkpoint(folder)
    assert found.totals()["quantized_weights"] == len(manifest(folder)["weights"])


def test_every_format_has_a_golden() -> None:
    """The first version's formats are there for good, and no format of today lacks a file that says how it looks."""
    entries = [entry for folder in GOLDENS for entry in manifest(folder)["weights"].values()]
    mappings = {(entry["format"], entry["asymmetric"]) for entry in entries}
    assert {name for name, _ in mappings} >= FORMATS_OF_V1
    for row in FORMATS.values():
        if row.name in FORMATS_OF_V1:
            assert {(row.name, False)} | ({(row.name, True)} if row.asymmetric else set()) <= mappings
    shapes = {(len(entry["shape"]), entry["transposed"]) for entry in entries}
    assert shapes == {(2, False), (2, True), (3, False), (3, True)}
    wide = [e for e in entries if (len(e["shape"]), e["transposed"]) == (2, False)]
    one_row = {e["block"][1] == e["shape"][1] for e in wide if e["block"][0] == 1}
    assert one_row == {True, False} and any(e["block"] == e["shape"] for e in wide)  # rows, groups, whole matrices


def test_the_goldens_are_small() -> None:
    assert sum(path.stat().st_size for path in HERE.rglob("v*/**/*") if path.is_file()) < 190_000
