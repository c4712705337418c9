"""A plain checkpoint of every family loads as the dequantized model, bit for bit; outputs are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import FAMILIES, Folders, assert_same, copy, load, logits, state
from safetensors import safe_open
from typer.testing import CliRunner

import llmquant
from llmquant.cli.main import app
from llmquant.errors import CheckpointError, ConfigError, NoSpaceError, OutputExistsError


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_dequantized_model(family: str, folders: Folders, tmp_path: Path) -> None:
    folder = folders.quantized(family, "int8")
    report = llmquant.export(folder, "hf16", tmp_path / "plain")
    again = load(tmp_path / "plain")
    assert_same(state(load(folder).dequantize()), state(again))
    assert {weight.how for weight in report.weights.values()} <= {"dequantized", "plain"}
    assert "quantization_config" not in (tmp_path / "plain/config.json").read_text()


def test_another_dtype(folders: Folders, tmp_path: Path) -> None:
    llmquant.export_checkpoint(folders.quantized("llama"), "hf16", tmp_path / "plain", dtype=torch.bfloat16)
    model = load(tmp_path / "plain")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    expected = load(folders.quantized("llama")).model.layers[0].mlp.down_proj.weight.dequantize(torch.bfloat16)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, expected)


def test_shards_and_keys_are_those_of_the_original(folders: Folders, tmp_path: Path) -> None:
    llmquant.export(folders.quantized("mixtral"), "hf16", tmp_path / "plain", max_shard_bytes=100_000)
    shards = sorted((tmp_path / "plain").glob("*.safetensors"))
    keys = {key for path in shards for key in safe_open(path, "pt").keys()}  # noqa: SIM118
    assert len(shards) > 2 and keys == set(safe_open(folders("mixtral") / "model.safetensors", "pt").keys())


def test_failures_leave_nothing(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folders.quantized("llama")
    with pytest.raises(ConfigError, match="unknown target"):
        llmquant.export(folder, "onnx", tmp_path / "out")
    with pytest.raises(ConfigError, match="misfits"):
        llmquant.export(folder, "hf16", tmp_path / "out", misfits="ignore")
    with pytest.raises(CheckpointError, match="not quantized"):
        llmquant.export(folders("llama"), "hf16", tmp_path / "out")
    damaged = copy(folder, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        llmquant.export(damaged, "hf16", tmp_path / "out")

    def stop(done: int, total: int, item: str = "") -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llmquant.export(folder, "hf16", tmp_path / "out", progress=stop)
    with monkeypatch.context() as patch, pytest.raises(NoSpaceError):
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        llmquant.export(folder, "hf16", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged"]


def test_what_is_there_stays(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    (tmp_path / "out.gguf").write_text("x")
    for to, name in (("hf16", "out"), ("gguf", "out.gguf")):
        with pytest.raises(OutputExistsError):
            llmquant.export(folders.quantized("llama"), to, tmp_path / name)
    assert (tmp_path / "out/mine").read_text() == (tmp_path / "out.gguf").read_text() == "x"
    llmquant.export(folders.quantized("llama"), "hf16", tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out/mine").exists()


def test_the_command(folders: Folders, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["export", str(folders.quantized("llama")), "--to", "hf16", "-o", str(tmp_path / "out")]
    )
    assert done.exit_code == 0 and "dequantized" in done.stdout
    assert logits(load(tmp_path / "out")).isfinite().all()
