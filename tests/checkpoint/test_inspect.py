"""An inspection says what is in the files, no more and no less."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import CONFIGS, Folders, Shape, copy, disk, edit_json, load, manifest, weights

from llmquant.checkpoint.inspect import inspect_checkpoint
from llmquant.errors import CheckpointError, ModelNotFoundError
from llmquant.kernels import registry


@pytest.mark.parametrize("family", CONFIGS)
def test_bytes_and_elements_are_those_of_files_and_model(family: str, folders: Folders) -> None:
    folder = folders.quantized(family)
    found, model, stored = inspect_checkpoint(folder), load(folder), disk(folder)
    totals = found.totals()
    assert totals["bytes"] == sum(len(data) for _, _, data in stored.values())
    assert sum(row.elements for row in found.rows) == sum(p.numel() for p in model.parameters())
    quantized = {fqn: w for fqn, w in weights(model) if fqn in manifest(folder)["weights"]}
    rows = {row.fqn: row for row in found.rows if row.quantized}
    assert set(rows) == set(quantized)
    for fqn, weight in quantized.items():
        row = rows[fqn]
        assert (row.shape, row.format, row.block, row.bytes) == (
            tuple(weight.shape),
            weight.meta.format,
            weight.meta.block,
            weight.nbytes,
        )
        assert (row.kernel, row.reason) == tuple(weight.kernel())
        assert row.activation == ""
        assert row.scale == str(weight.scale.dtype).removeprefix("torch.") + "+zero" * (weight.zero_point is not None)
    bytes_, elements = (sum(getattr(row, name) for row in rows.values()) for name in ("bytes", "elements"))
    assert totals["bits_per_quantized_weight"] == 8 * bytes_ / elements
    assert totals["bytes_quantized"] == bytes_ and totals["quantized_weights"] == len(rows)
    plain = {row.fqn: (row.shape, row.format) for row in found.rows if not row.quantized}
    kept = {fqn: p for fqn, p in model.named_parameters() if fqn not in quantized}
    assert plain == {fqn: (tuple(p.shape), str(p.dtype).removeprefix("torch.")) for fqn, p in kept.items()}


def test_kernels_are_those_of_the_device_asked_for(folders: Folders) -> None:
    folder = folders.quantized("llama")
    for device in ("cpu", "cuda"):
        for row in inspect_checkpoint(folder, device).rows:
            if row.block is not None:
                assert (row.kernel, row.reason) == registry.choose(row.format, row.block, row.shape[-1], device)
    named = {row.kernel for row in inspect_checkpoint(folder, "cuda").rows if row.quantized}
    assert named <= {"aten", "triton", "reference"}  # no kernel for processors


def test_quantized_weights_come_first(folders: Folders) -> None:
    flags = [row.quantized for row in inspect_checkpoint(folders.quantized("llama")).rows]
    assert flags == sorted(flags, reverse=True) and True in flags and False in flags


def test_activations_are_shown_and_cost_no_bytes(folders: Folders) -> None:
    found = inspect_checkpoint(folders.quantized("llama", "a8-g48-asym-int4-g32"))
    plain = inspect_checkpoint(folders.quantized("llama", "int4-g32"))
    rows = [row for row in found.rows if row.quantized]
    assert rows and {row.activation for row in rows} == {"a8-g48-asym"}
    assert {row.activation for row in found.rows if not row.quantized} == {""}
    assert found.totals() == plain.totals()
    assert [replace(row, activation="") for row in found.rows] == list(plain.rows)


@pytest.mark.parametrize("shape", [Shape.single, Shape.sharded])
def test_a_plain_folder_can_be_inspected(shape: Shape, folders: Folders, tmp_path: Path) -> None:
    folder = shape.make(folders("llama", torch.bfloat16), tmp_path / "m")
    found = inspect_checkpoint(folder)
    assert found.save_id is None and not any(row.quantized for row in found.rows)
    assert found.totals()["bits_per_weight"] == 16 and found.totals()["bits_per_quantized_weight"] is None
    assert {row.format for row in found.rows} == {"bfloat16"}


def test_what_it_says_is_plain_json(folders: Folders) -> None:
    found = inspect_checkpoint(folders.quantized("mixtral"))
    content = json.loads(json.dumps(found.to_dict()))
    assert content["save_id"] == manifest(folders.quantized("mixtral"))["save_id"]
    assert content["totals"] == found.totals()
    assert [weight["fqn"] for weight in content["weights"]] == [row.fqn for row in found.rows]
    assert content["config"] == manifest(folders.quantized("mixtral"))["config"]


def test_what_is_no_checkpoint_of_ours_is_refused(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        inspect_checkpoint(tmp_path / "nothing")
    with pytest.raises(ModelNotFoundError):
        inspect_checkpoint(tmp_path)
    foreign = copy(folders.quantized("llama"), tmp_path / "foreign")
    edit_json(foreign / "config.json", lambda c: c["quantization_config"].update(quant_method="gptq"))
    with pytest.raises(CheckpointError, match="gptq"):
        inspect_checkpoint(foreign)
