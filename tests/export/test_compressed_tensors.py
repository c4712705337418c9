"""Folders that the package compressed-tensors decodes to our values, and packs to the very bytes that we wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Folders, load, logits, quantize, rtn, weights
from safetensors.torch import load_file

import llmquant
from llmquant.errors import ExportError
from llmquant.export.report import EXACT, ROUNDED

pytest.importorskip("compressed_tensors")


def made(folders: Folders, tmp_path: Path, scheme: Any, family: str = "llama-tied", dtype: Any = torch.float32) -> Path:
    """A quantized folder of one scheme, heads and embeddings plain."""
    model = load(folders(family, dtype))
    quantize(model, rtn(scheme if isinstance(scheme, dict) else {"_default": scheme, "?_head": "none"}))
    model.save_pretrained(tmp_path / "q")
    return tmp_path / "q"


def export(folder: Path, tmp_path: Path, **options: Any) -> tuple[Path, Any]:
    report = llmquant.export(folder, "compressed-tensors", tmp_path / "ct", **options)
    return tmp_path / "ct", report


def same_weights(folder: Path, exported: Path) -> tuple[Any, Any]:
    """Both models, after their weights agreed bit for bit in the dtype of the exported one."""
    ours, theirs = load(folder), load(exported)
    theirs(torch.tensor([[1, 2]]))  # the package decodes at the first input
    found = dict(weights(ours))
    assert found
    for fqn, weight in found.items():
        other = theirs.get_parameter(fqn)
        assert torch.equal(other, weight.dequantize(other.dtype)), fqn
    return ours, theirs


EXACT_SCHEMES = {
    "int4-g16": "pack-quantized",
    "int4-g16-asym": "pack-quantized",
    "int4-row-asym": "pack-quantized",
    "int4-tensor": "pack-quantized",
    "int8": "pack-quantized",
    "int8-g16-asym": "pack-quantized",
    "int4-g16-s8": "pack-quantized",
    "float8": "float-quantized",
    "float8-tensor": "float-quantized",
}


@pytest.mark.parametrize("scheme", EXACT_SCHEMES)
def test_logits_are_ours(scheme: str, folders: Folders, tmp_path: Path) -> None:
    """In float32: weights bit for bit, so logits up to the order of sums."""
    folder = made(folders, tmp_path, scheme)
    exported, report = export(folder, tmp_path)
    kinds = {weight.format for weight in report.weights.values() if weight.how == EXACT}
    assert {kind.split()[0] for kind in kinds} == {EXACT_SCHEMES[scheme]}
    ours, theirs = same_weights(folder, exported)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("scheme", ["a8-token-int8", "s8-int8", "f8-float8", "sf8-float8", "a8-token-int4-g16"])
def test_quantized_inputs(scheme: str, folders: Folders, tmp_path: Path) -> None:
    """Weights bit for bit; inputs are rounded by another rule, which moves logits by little, but not by nothing."""
    folder = made(folders, tmp_path, scheme)
    exported, _ = export(folder, tmp_path)
    groups = json.loads((exported / "config.json").read_text())["quantization_config"]["config_groups"]
    inputs = groups["group_0"]["input_activations"]
    assert inputs["num_bits"] == 8 and inputs["dynamic"] == (not scheme.startswith("s"))
    ours, theirs = same_weights(folder, exported)
    difference = (logits(theirs) - logits(ours)).norm() / logits(ours).norm()
    assert difference < 0.05


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp8", "mxfp4"])
def test_block_floats_in_bfloat16(scheme: str, folders: Folders, tmp_path: Path) -> None:
    config = {"re:.*down_proj": "none", "_default": scheme} if scheme != "nvfp4" else scheme
    folder = made(folders, tmp_path, config, dtype=torch.bfloat16)
    exported, _ = export(folder, tmp_path)
    same_weights(folder, exported)
    with pytest.raises(ExportError, match="bfloat16"):
        llmquant.export(folder, "compressed-tensors", tmp_path / "no", dtype=torch.float16)


@pytest.mark.parametrize("scheme", ["int4-g16", "int4-g16-asym", "int8-g16-asym", "int4-row-asym"])
def test_the_bytes_are_those_of_the_package(scheme: str, folders: Folders, tmp_path: Path) -> None:
    """Its own compressor, given the decoded weight and our scales, packs the same words."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    folder = made(folders, tmp_path, scheme)
    exported, _ = export(folder, tmp_path)
    group = json.loads((exported / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    tensors, name = load_file(exported / "model.safetensors"), "model.layers.0.self_attn.k_proj.weight"
    weight = dict(weights(load(folder)))[name]
    state = {"weight": weight.dequantize(), "weight_scale": tensors[f"{name}_scale"]}
    zeros = weight.packed().zeros()
    if zeros is not None:
        state["weight_zero_point"] = (zeros.int() - 2 ** (weight.format.bits - 1)).to(torch.int8)
    theirs = BaseCompressor.get_value_from_registry("pack-quantized").compress(state, QuantizationScheme(**group))
    for key in theirs:
        assert torch.equal(theirs[key], tensors[f"{name.removesuffix('weight')}{key}"]), key


def test_mixtures_name_their_layers(folders: Folders, tmp_path: Path) -> None:
    folder = made(folders, tmp_path, {"re:.*down_proj": "int8", "re:.*v_proj": "none", "_default": "int4-g16"})
    exported, _ = export(folder, tmp_path)
    config = json.loads((exported / "config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == 2 and "model.layers.1.self_attn.v_proj" in config["ignore"]
    assert "lm_head" in config["ignore"]
    ours, theirs = same_weights(folder, exported)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=2e-5)


def test_what_vllm_lacks_is_refused_by_name_or_dequantized(folders: Folders, tmp_path: Path) -> None:
    scheme = {"_embedding": "int8", "re:.*v_proj": "int3-g32", "re:.*down_proj": "int4-g48", "_default": "int4-g16"}
    folder = made(folders, tmp_path, scheme)
    with pytest.raises(ExportError) as refused:
        export(folder, tmp_path)
    text = str(refused.value)
    for part in (
        "model.embed_tokens.weight: it is an embedding",
        "v_proj.weight",
        "no int3",
        "groups of 48",
        "5 weights",
    ):
        assert part in text
    assert not (tmp_path / "ct").exists()
    exported, report = export(folder, tmp_path, misfits="dequantize")
    assert sum(weight.how == "dequantized" for weight in report.weights.values()) == 5
    torch.testing.assert_close(logits(load(exported)), logits(load(folder)), rtol=1e-4, atol=2e-5)


def test_scales_that_the_models_dtype_would_round(folders: Folders, tmp_path: Path) -> None:
    model = load(folders("llama-tied", torch.bfloat16))
    folder = tmp_path / "q"
    quantize(model, "int4-g16")
    model.save_pretrained(folder)  # float16 scales, by search: those of rtn are eighths of a weight
    with pytest.raises(ExportError, match="float16 and bfloat16"):
        export(folder, tmp_path)
    exported, report = export(folder, tmp_path, misfits="round-scales")
    assert ROUNDED in {weight.how for weight in report.weights.values()}
    ours, theirs = dict(weights(load(folder))), load(exported)
    theirs(torch.tensor([[1]]))
    for fqn, weight in ours.items():
        error = (theirs.get_parameter(fqn).float() - weight.dequantize(torch.float32)).abs()
        assert error.max() > 0 and (error <= weight.dequantize(torch.float32).abs() * 2**-7).all()
    llmquant.export(folder, "compressed-tensors", tmp_path / "half", dtype=torch.float16)
    same_weights(folder, tmp_path / "half")


def test_experts_are_refused_by_name(folders: Folders, tmp_path: Path) -> None:
    folder = made(folders, tmp_path, "int4-g16", family="mixtral")
    with pytest.raises(ExportError, match="not to a linear layer"):
        export(folder, tmp_path)
