"""accelerate: weights that wait in memory until a module runs, and what cannot wait on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from models import Folders, assert_same, load, logits, rtn, state, weights
from torch import nn

from llmquant import LlmQuantConfig, QuantizedTensor
from llmquant.errors import ConfigError, UnsupportedOpError

SCHEMES = ("int4-g32", "int3-g16-asym", "float8", "a8-int4-g32", "a8-token-int8", "mxfp4", "nvfp4")
ON_DISK = {"model": "cpu", "lm_head": "disk"}


def offloaded(folder: Path) -> Any:
    return cpu_offload(load(folder), execution_device="cpu")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_wait_in_memory_and_give_the_same_logits(scheme: str, folders: Folders) -> None:
    folder = folders.quantized("llama", scheme)
    whole, model = load(folder), offloaded(folder)
    for _ in range(2):
        assert {w.device.type for _, w in weights(model)} == {"meta"}
        assert all(t.is_meta for _, w in weights(model) for _, t in w.parts())
        assert torch.equal(logits(model), logits(whole))
    remove_hook_from_submodules(model)
    assert_same(state(model), state(whole))


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral"])
def test_so_do_tied_ones_those_stored_in_out_and_experts(family: str, folders: Folders) -> None:
    folder = folders.quantized(family)
    assert torch.equal(logits(offloaded(folder)), logits(load(folder)))


def test_they_can_be_generated_from(folders: Folders) -> None:
    folder = folders.quantized("llama", "int4-g32")
    prompt = torch.tensor([[5, 6, 7]])
    said = [m.generate(prompt, max_new_tokens=5, do_sample=False) for m in (offloaded(folder), load(folder))]
    assert torch.equal(*said)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_a_device_map_of_the_processor(device_map: Any, folders: Folders) -> None:
    folder = folders.quantized("llama", "nvfp4")
    assert torch.equal(logits(load(folder, device_map=device_map)), logits(load(folder)))
    while_loading = load(
        folders("llama"),
        device_map=device_map,
        quantization_config=LlmQuantConfig(rtn({"_default": "nvfp4", "_embedding": "nvfp4"})),
    )
    assert torch.equal(logits(while_loading), logits(load(folder)))


def test_hooks_without_offloading_change_nothing(folders: Folders) -> None:
    folder = folders.quantized("llama", "int4-g32")
    model = dispatch_model(load(folder), {"": "cpu"}, force_hooks=True)
    assert torch.equal(logits(model), logits(load(folder)))


def test_an_offloaded_model_is_saved_after_its_hooks_are_gone(folders: Folders, tmp_path: Path) -> None:
    model = offloaded(folders.quantized("llama", "int4-g32"))
    with pytest.raises(ConfigError, match=r"offloaded cannot be saved\n.*weight\n.*remove_hook"):
        model.save_pretrained(tmp_path / "no")
    remove_hook_from_submodules(model)
    model.save_pretrained(tmp_path / "yes")
    assert torch.equal(logits(load(tmp_path / "yes")), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_disk_is_refused_before_anything_is_changed(dtype: torch.dtype, folders: Folders, tmp_path: Path) -> None:
    model = load(folders.quantized("llama", "int4-g32"), dtype=dtype)
    before, said = state(model), logits(model)
    for offload in (
        lambda: disk_offload(model, str(tmp_path / "a"), execution_device="cpu"),
        lambda: dispatch_model(model, ON_DISK, main_device="cpu", offload_dir=str(tmp_path / "b")),
    ):
        with pytest.raises(UnsupportedOpError, match="cpu_offload"):
            offload()
        assert_same(state(model), before)
        assert torch.equal(logits(model), said)


@pytest.mark.parametrize("quantized", [True, False])
def test_loading_to_disk_is_refused(quantized: bool, folders: Folders, tmp_path: Path) -> None:
    config = {} if quantized else {"quantization_config": LlmQuantConfig("int4-g32")}
    folder = folders.quantized("llama", "int4-g32") if quantized else folders("llama")
    with pytest.raises(ConfigError, match=r"offloaded to disk\n.*device_map\n.*cpu instead"):
        load(folder, device_map=ON_DISK, offload_folder=str(tmp_path), **config)


def test_the_type_of_a_parameter_makes_it_anew(folders: Folders) -> None:
    """As `nn.Parameter` does; this is how accelerate moves parameters."""
    for _, weight in weights(load(folders.quantized("llama", "nvfp4"))):
        again = type(weight)(weight.detach(), requires_grad=True)
        assert isinstance(again, nn.Parameter) and isinstance(again, QuantizedTensor) and again.requires_grad
        assert again.meta == weight.meta and torch.equal(again.detach(), weight.detach())
        parts = zip(again.parts(), weight.parts(), strict=True)
        assert all(t.data_ptr() == u.data_ptr() for (_, t), (_, u) in parts)
