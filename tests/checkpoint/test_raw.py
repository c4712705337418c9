"""A checkpoint of an architecture that transformers does not know is quantized by its keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import Folders, assert_same, copy, edit_json, raw
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmquant import load_raw, quantize_weight
from llmquant.checkpoint.inspect import inspect_checkpoint
from llmquant.checkpoint.origin import Origin
from llmquant.checkpoint.raw import raw_role
from llmquant.checkpoint.source import open_source
from llmquant.checkpoint.stream import quantize_checkpoint
from llmquant.config.candidates import Role
from llmquant.config.recipe import to_config
from llmquant.errors import ModelNotFoundError
from llmquant.integrations.loading import load
from llmquant.tensor import QuantizedTensor

WEIGHTS = ("blocks.0.mixer.weight", "blocks.0.w1", "head.type.weight")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of no known architecture, some of whose keys are names that a module has for other things."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    tensors = {
        **{key: random(64, 96) for key in WEIGHTS},
        "tok_embeddings.weight": random(50, 64),
        "blocks.0.norm.weight": random(4, 32),
        "blocks.0.conv": random(8, 4, 3),
        "blocks.0.mixer.bias": random(64).float(),
        "steps": torch.arange(12).reshape(3, 4),
    }
    path = tmp_path / "strange"
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text('{"model_type": "no-such-thing", "dtype": "bfloat16"}')
    return path


def test_matrices_are_quantized_and_the_rest_is_as_it_was(folder: Path, tmp_path: Path) -> None:
    report = quantize_checkpoint(Origin(folder, raw=True), tmp_path / "out", "int4-g32")
    assert set(report.quantized) == set(WEIGHTS)
    assert set(report.skipped) == {"tok_embeddings.weight", "blocks.0.norm.weight", "blocks.0.conv", "steps"}
    assert any("read raw" in warning and "no-such-thing" in warning for warning in report.warnings)
    plain, found = load_file(folder / "model.safetensors"), load_raw(tmp_path / "out")
    assert found.keys() == plain.keys()
    (config,) = to_config("int4-g32").fqn_to_config.values()
    for key, tensor in plain.items():
        if key in WEIGHTS:
            wanted = quantize_weight(tensor, config)
            assert isinstance(found[key], QuantizedTensor) and found[key].dtype == torch.bfloat16
            assert torch.equal(found[key].dequantize(), wanted.dequantize())
        else:
            assert raw(found[key]) == raw(tensor)


def test_norms_and_embeddings_are_quantized_where_they_are_named(folder: Path, tmp_path: Path) -> None:
    config = {"_embedding": "int8", "blocks.0.norm.weight": "int8", "_default": "int4-g32"}
    report = quantize_checkpoint(Origin(folder, raw=True), tmp_path / "out", config)
    assert set(report.quantized) == {*WEIGHTS, "tok_embeddings.weight", "blocks.0.norm.weight"}
    assert set(report.skipped) == {"blocks.0.conv", "steps"}


def test_inspect_reads_the_result(folder: Path, tmp_path: Path) -> None:
    quantize_checkpoint(Origin(folder, raw=True), tmp_path / "out", "int4-g32")
    assert {row.fqn for row in inspect_checkpoint(tmp_path / "out").rows if row.quantized} == set(WEIGHTS)


def test_without_raw_the_error_names_it(folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no-such-thing") as error:
        open_source(folder)
    assert "--raw" in str(error.value.hint) and "--trust-remote-code" not in str(error.value.hint)


def test_loading_as_a_model_names_load_raw(folder: Path, tmp_path: Path) -> None:
    quantize_checkpoint(Origin(folder, raw=True), tmp_path / "out", "int4-g32")
    with pytest.raises(ModelNotFoundError, match="no-such-thing") as error:
        load(tmp_path / "out")
    assert "load_raw" in str(error.value.hint)


def test_a_known_architecture_gives_the_same_codes(folders: Folders, tmp_path: Path) -> None:
    quantize_checkpoint(folders("llama"), tmp_path / "a", "int4-g32")
    quantize_checkpoint(Origin(folders("llama"), raw=True), tmp_path / "b", "int4-g32")
    one, two = (load_raw(tmp_path / name) for name in "ab")
    assert one.keys() == two.keys()
    quantized = {key for key, tensor in one.items() if isinstance(tensor, QuantizedTensor)}
    assert quantized == {key for key, tensor in two.items() if isinstance(tensor, QuantizedTensor)}
    assert_same(*({k: raw(t.dequantize() if k in quantized else t) for k, t in x.items()} for x in (one, two)))


@pytest.mark.parametrize(
    ("key", "role"),
    [
        ("model.layers.0.input_layernorm.weight", Role.norm),
        ("h.0.ln_1.weight", Role.norm),
        ("q_norm", Role.norm),
        ("backbone.embeddings.weight", Role.embedding),
        ("transformer.wte.weight", Role.embedding),
        ("model.embed_tokens.weight", Role.embedding),
        ("lm_head.weight", Role.head),
        ("layers.0.normalizer_proj.weight", Role.linear),
        ("layers.0.attention.wq.weight", Role.linear),
    ],
)
def test_roles_by_key(key: str, role: Role) -> None:
    assert raw_role(key) is role


# ---------------------------------------------------------------------------------- code beside the weights

CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own-thing"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that brings code, which leaves a mark when it runs."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = copy(folders("llama"), tmp_path / "own")
    (path / "own.py").write_text(CODE.format(mark=str(tmp_path / "it-ran")))
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_json(
        path / "config.json", lambda c: c.update(model_type="own-thing", architectures=["OwnModel"], auto_map=auto)
    )
    return path


def test_code_does_not_run_unless_asked(with_code: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError) as error:
        quantize_checkpoint(with_code, tmp_path / "out", "int4-g32")
    assert "--trust-remote-code" in str(error.value.hint) and "--raw" in str(error.value.hint)
    quantize_checkpoint(Origin(with_code, raw=True), tmp_path / "raw", "int4-g32")
    assert not (tmp_path / "it-ran").exists()


def test_code_that_is_trusted_runs(with_code: Path, folders: Folders, tmp_path: Path) -> None:
    quantize_checkpoint(Origin(with_code, trust_remote_code=True), tmp_path / "out", "int4-g32")
    assert (tmp_path / "it-ran").exists()
    quantize_checkpoint(folders("llama"), tmp_path / "known", "int4-g32")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "known"))
    assert_same({k: raw(t) for k, t in one.items()}, {k: raw(t) for k, t in two.items()})
