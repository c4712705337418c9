"""Quantized models are transformers models: load, save, quantize while loading, generate, train adapters, leave."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import (
    CONFIGS,
    Folders,
    Shape,
    assert_same,
    build,
    disk,
    load,
    logits,
    manifest,
    raw,
    rewrite,
    rtn,
    save,
    state,
    tokens,
    weights,
)
from models import copy as copy_folder
from torch import nn

import llmquant
from llmquant import FqnToConfig, Int4WeightOnlyConfig, LlmQuantConfig, QuantizedTensor, load_recipe, quantize_
from llmquant.checkpoint.manifest import verify
from llmquant.config.recipe import to_config
from llmquant.errors import BadWeightError, CheckpointError, ConfigError, NothingToQuantizeError, UnmatchedKeyError
from llmquant.integrations.loading import load_tokenizer
from llmquant.primitives.dynamic import Activation

families = pytest.mark.parametrize("family", CONFIGS)
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def quantized_in_memory(folder: Path, config: Any, **kwargs: Any) -> Any:
    model = load(folder, **kwargs)
    quantize_(model, config)
    return model


def codes(model: nn.Module) -> dict[str, Any]:
    """The components of all quantized weights, whatever dtype they stand for."""
    return {f"{fqn}.{field.name}": raw(inner) for fqn, w in weights(model) for field, inner in w.parts()}


# ---------------------------------------------------------------------------------- load, save, save again


@families
def test_a_reload_equals_what_was_saved(family: str, folders: Folders) -> None:
    model = quantized_in_memory(folders(family), CONFIGS[family])
    again = load(folders.quantized(family))
    assert_same(state(again), state(model))
    assert torch.equal(logits(again), logits(model))
    assert not logits(again).isnan().any() and logits(again).std() > 0.01


A8, WITHOUT = (
    rtn({"_embedding": f"{prefix}int8", "_default": f"{prefix}int4-g32"}) for prefix in ("a8-token-asym-", "")
)


@families
def test_quantized_activations_survive_saving_and_change_what_the_model_says(
    family: str, folders: Folders, tmp_path: Path
) -> None:
    model = quantized_in_memory(folders(family), A8)
    report = model.hf_quantizer.report
    assert {w.scheme for w in report.quantized.values()} == {"a8-token-asym-int8", "a8-token-asym-int4-g32"}
    model.save_pretrained(tmp_path / "a8")
    again = load(tmp_path / "a8")
    assert_same(state(again), state(model))
    assert torch.equal(logits(again), logits(model))
    assert {w.meta.activation for _, w in weights(again)} == {Activation(0, True)}
    again.save_pretrained(tmp_path / "again")
    assert manifest(tmp_path / "again")["weights"] == manifest(tmp_path / "a8")["weights"]
    assert_same(disk(tmp_path / "again"), disk(tmp_path / "a8"))
    # The same weights without it: near, and not the same.
    plain = quantized_in_memory(folders(family), WITHOUT)
    assert codes(plain) == codes(model)
    moved = (logits(plain) - logits(model)).norm() / logits(plain).norm()
    assert 1e-3 < moved < 0.2
    while_loading = load(folders(family), quantization_config=LlmQuantConfig(A8))
    assert torch.equal(logits(while_loading), logits(model))


@families
def test_saving_again_writes_the_same_tensors(family: str, folders: Folders, tmp_path: Path) -> None:
    folder = folders.quantized(family)
    load(folder).save_pretrained(tmp_path / "once")
    load(tmp_path / "once").save_pretrained(tmp_path / "twice")
    for again in (tmp_path / "once", tmp_path / "twice"):
        assert_same(disk(again), disk(folder))
        for field in ("weights", "config", "format_version", "quant_method"):
            assert manifest(again)[field] == manifest(folder)[field]
    assert len({manifest(f)["save_id"] for f in (folder, tmp_path / "once", tmp_path / "twice")}) == 3


def test_saving_one_model_twice_gives_two_saves(folders: Folders, tmp_path: Path) -> None:
    model = load(folders.quantized("llama"))
    for name in "ab":
        model.save_pretrained(tmp_path / name)
        verify(manifest(tmp_path / name), (tmp_path / name).glob("*.safetensors"))
    assert manifest(tmp_path / "a")["save_id"] != manifest(tmp_path / "b")["save_id"]
    assert_same(disk(tmp_path / "a"), disk(tmp_path / "b"))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_components_may_lie_in_different_shards(family: str, folders: Folders, tmp_path: Path) -> None:
    load(folders.quantized(family)).save_pretrained(tmp_path / "s", max_shard_size=1500)
    where = json.loads((tmp_path / "s" / "model.safetensors.index.json").read_text())["weight_map"]
    torn = [fqn for fqn in manifest(tmp_path / "s")["weights"] if where[fqn] != where[f"{fqn}_scale"]]
    assert torn
    assert_same(disk(tmp_path / "s"), disk(folders.quantized(family)))
    assert_same(state(load(tmp_path / "s")), state(load(folders.quantized(family))))


@families
def test_a_model_that_was_never_loaded_can_be_saved(family: str, tmp_path: Path) -> None:
    """No conversion of keys was recorded on it, so transformers would apply its own to our tensors."""
    model = build(family)
    quantize_(model, CONFIGS[family])
    model.save_pretrained(tmp_path)
    assert codes(load(tmp_path)) == codes(model)


def test_an_older_save_of_more_shards_leaves_nothing(folders: Folders, tmp_path: Path) -> None:
    model = load(folders.quantized("llama"))
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert_same(state(load(tmp_path)), state(model))


def test_an_older_save_in_one_file_is_refused_and_not_loaded(folders: Folders, tmp_path: Path) -> None:
    """transformers leaves model.safetensors beside the new shards, and prefers it: a plain model is the old one."""
    model = load(folders.quantized("llama"))
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    with pytest.raises(CheckpointError, match=r"model\.safetensors\n.*new folder"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert_same(state(load(tmp_path)), state(model))


# ---------------------------------------------------------------------------------- quantize while loading


@families
def test_quantizing_while_loading_equals_quantize(family: str, folders: Folders, tmp_path: Path) -> None:
    wanted = load(folders(family))
    report = quantize_(wanted, CONFIGS[family])
    model = load(folders(family), quantization_config=LlmQuantConfig(CONFIGS[family]))
    assert_same(state(model), state(wanted))
    assert torch.equal(logits(model), logits(wanted))
    found = model.hf_quantizer.report
    assert found.quantized == report.quantized and found.skipped == report.skipped
    assert found.bytes_after == report.bytes_after
    model.save_pretrained(tmp_path)
    assert_same(disk(tmp_path), disk(folders.quantized(family)))
    assert manifest(tmp_path)["weights"] == manifest(folders.quantized(family))["weights"]


@pytest.mark.parametrize("family", ["llama-tied", "mixtral"])
@pytest.mark.parametrize("shape", [Shape.sharded])
def test_and_so_it_does_however_the_source_lies(family: str, shape: Shape, folders: Folders, tmp_path: Path) -> None:
    source = shape.make(folders(family), tmp_path / "m")
    model = load(source, quantization_config=LlmQuantConfig(CONFIGS[family]))
    assert_same(state(model), state(quantized_in_memory(source, CONFIGS[family])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama-tied", "gpt-oss"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_and_so_it_does_with_a_dtype(stored: torch.dtype, family: str, dtype: torch.dtype, folders: Folders) -> None:
    source = folders(family, stored)
    model = load(source, dtype=dtype, quantization_config=LlmQuantConfig(CONFIGS[family]))
    assert_same(state(model), state(quantized_in_memory(source, CONFIGS[family], dtype=dtype)))


@pytest.mark.parametrize("both", [True, False])
def test_and_so_it_does_with_a_tied_copy_under_the_heads_name(both: bool, folders: Folders, tmp_path: Path) -> None:
    source = copy_folder(folders("llama-tied"), tmp_path / "m")
    rewrite(
        source / "model.safetensors",
        lambda t: t.update({HEAD: t[TABLE].clone() if both else t.pop(TABLE)}),
    )
    model = load(source, quantization_config=LlmQuantConfig(CONFIGS["llama-tied"]))
    assert_same(state(model), state(quantized_in_memory(source, CONFIGS["llama-tied"])))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_bad_weight_is_named_while_loading(folders: Folders, tmp_path: Path) -> None:
    source = copy_folder(folders("llama"), tmp_path / "m")
    fqn = "model.layers.1.mlp.up_proj.weight"
    rewrite(source / "model.safetensors", lambda t: t[fqn].__setitem__((0, 0), float("nan")))
    with pytest.raises(BadWeightError, match="NaN") as error:
        load(source, quantization_config=LlmQuantConfig("int4-g32"))
    assert error.value.where == fqn


def test_what_cannot_be_done_is_refused_before_loading(folders: Folders) -> None:
    with pytest.raises(UnmatchedKeyError):
        load(folders("llama"), quantization_config=LlmQuantConfig({"model.nothing": "int4"}))
    with pytest.raises(NothingToQuantizeError):
        load(folders("llama"), quantization_config=LlmQuantConfig({"_experts": "int4"}))
    with pytest.raises(ConfigError, match="does not say what to do"):
        load(folders("llama"), quantization_config=LlmQuantConfig())


def test_a_dictionary_will_do_as_quantization_config(folders: Folders, tmp_path: Path) -> None:
    asked = {
        "quant_method": "llmquant",
        "config": {"_default": {"format": "int4", "group_size": 32, "algorithm": "rtn"}},
    }
    model = load(folders("llama"), quantization_config=asked)
    assert_same(state(model), state(quantized_in_memory(folders("llama"), rtn("int4-g32"))))
    model.save_pretrained(tmp_path)
    assert_same(state(load(tmp_path)), state(model))


# ---------------------------------------------------------------------------------- device_map, dtype


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", "cpu"], ids=str)
@pytest.mark.parametrize("family", ["llama-tied", "mixtral"])
def test_device_map(family: str, device_map: Any, folders: Folders, tmp_path: Path) -> None:
    wanted = state(load(folders.quantized(family)))
    model = load(folders.quantized(family), device_map=device_map)
    assert_same(state(model), wanted)
    assert torch.isfinite(logits(model)).all()
    model.save_pretrained(tmp_path)
    assert_same(disk(tmp_path), disk(folders.quantized(family)))
    config = LlmQuantConfig(CONFIGS[family])
    assert_same(state(load(folders(family), device_map=device_map, quantization_config=config)), wanted)


@pytest.mark.parametrize("device_map", [{"": "disk"}, {"model": "cpu", "lm_head": "disk"}], ids=str)
def test_offload_to_disk_is_refused(device_map: dict[str, str], folders: Folders, tmp_path: Path) -> None:
    for kwargs in ({}, {"quantization_config": LlmQuantConfig("int4-g32")}):
        folder = folders("llama") if kwargs else folders.quantized("llama")
        with pytest.raises(ConfigError, match="disk"):
            load(folder, device_map=device_map, offload_folder=tmp_path, **kwargs)


@families
def test_device_maps_are_planned_with_true_sizes(family: str, folders: Folders) -> None:
    """What an element is said to take, before loading, is what it takes."""
    plain, loaded = load(folders(family)), dict(weights(load(folders.quantized(family))))
    quantizer = load(folders.quantized(family)).hf_quantizer
    planner = load(folders(family), quantization_config=LlmQuantConfig(CONFIGS[family])).hf_quantizer
    for fqn, parameter in plain.named_parameters():
        true = loaded[fqn].nbytes if fqn in loaded else parameter.nbytes
        assert quantizer.param_element_size(plain, fqn, parameter) * parameter.numel() == pytest.approx(true)
        # Before it is quantized, short groups and packed zero points may be off by a little.
        assert planner.param_element_size(plain, fqn, parameter) * parameter.numel() == pytest.approx(true, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama-tied", "mixtral", "gpt2"])
def test_a_dtype_asked_for_is_the_weights_dtype(family: str, dtype: torch.dtype, folders: Folders) -> None:
    reference = load(folders.quantized(family))
    model = load(folders.quantized(family), dtype=dtype)
    assert model.dtype == dtype and {p.dtype for p in model.parameters()} == {dtype}
    assert codes(model) == codes(reference)  # codes and scales stay as they are
    for fqn, weight in weights(model):
        assert weight.dequantize().dtype == dtype
        assert torch.equal(weight.dequantize(), dict(weights(reference))[fqn].dequantize(torch.float32).to(dtype))
    assert logits(model).dtype == dtype
    torch.testing.assert_close(logits(model).float(), logits(reference), rtol=0.1, atol=0.1)


def test_converting_a_loaded_model_really_converts(folders: Folders) -> None:
    model = load(folders.quantized("llama")).to(torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert codes(model) == codes(load(folders.quantized("llama")))
    assert logits(model).dtype == torch.float16


# ---------------------------------------------------------------------------------- use


@families
def test_says_what_its_dequantized_weights_say(family: str, folders: Folders) -> None:
    model = load(folders.quantized(family))
    said = logits(model)
    torch.testing.assert_close(said, logits(model.dequantize()), rtol=1e-3, atol=1e-3)


@families
def test_generates_what_repeated_forward_passes_say(family: str, folders: Folders) -> None:
    model, prompt = load(folders.quantized(family)), tokens(1, 5)
    found = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    wanted = prompt
    for _ in range(6):
        with torch.no_grad():
            said = model(wanted, use_cache=False).logits[:, -1]
        said[:, 2] = -torch.inf  # min_new_tokens forbids the end
        wanted = torch.cat([wanted, said.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, wanted)


@families
def test_the_memory_footprint_is_the_true_one(family: str, folders: Folders) -> None:
    plain, model = load(folders(family)), load(folders.quantized(family))
    buffers = sum(b.nbytes for b in model.buffers())
    parameters = sum(
        sum(inner.nbytes for _, inner in p.parts()) if isinstance(p, QuantizedTensor) else p.nbytes
        for p in model.parameters()
    )
    assert model.get_memory_footprint() == pytest.approx(parameters + buffers, abs=1e-6)
    assert model.get_memory_footprint(return_buffers=False) == pytest.approx(parameters, abs=1e-6)
    on_disk = sum(len(data) for _, _, data in disk(folders.quantized(family)).values())
    assert parameters == on_disk  # tied weights count once
    assert model.get_memory_footprint() < 0.5 * plain.get_memory_footprint()


@families
def test_an_in_memory_model_is_marked_as_a_loaded_one(family: str, folders: Folders) -> None:
    memory = quantized_in_memory(folders(family), CONFIGS[family])
    for model in (memory, load(folders.quantized(family))):
        assert model.is_quantized and model.quantization_method == "llmquant"
        assert type(model.config.quantization_config) is LlmQuantConfig
        assert model.config._experts_implementation == "eager"
        assert model.hf_quantizer.is_serializable() and model.hf_quantizer.is_trainable
        content = json.loads(model.config.to_json_string())["quantization_config"]
        assert content["quant_method"] == "llmquant"
        assert FqnToConfig(dict(to_config(content["config"]).items())) == CONFIGS[family]


def test_a_deep_copy_is_independent_and_complete(folders: Folders, tmp_path: Path) -> None:
    model = load(folders.quantized("llama-tied"))
    twin = copy.deepcopy(model)
    assert_same(state(twin), state(model))
    assert twin.lm_head.weight is twin.model.embed_tokens.weight is not model.lm_head.weight
    before = state(model)
    for _, weight in weights(twin):
        weight.qdata.zero_()
    assert_same(state(model), before)
    copy.deepcopy(model).save_pretrained(tmp_path)
    assert_same(disk(tmp_path), disk(folders.quantized("llama-tied")))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "gpt2"])
def test_gradients_reach_an_adapter_through_frozen_weights(family: str, folders: Folders) -> None:
    """A LoRA at the bottom learns: the gradient crosses every quantized layer, and no weight changes."""
    model = load(folders.quantized(family))
    before = state(model)
    assert not any(weight.requires_grad for _, weight in weights(model))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    table = model.get_input_embeddings()
    width = table.weight.shape[1]
    down, up = nn.Linear(width, 4, bias=False), nn.Linear(4, width, bias=False)
    nn.init.zeros_(up.weight)
    table.register_forward_hook(lambda module, args, out: out + up(down(out.detach().clone())))
    optimizer = torch.optim.AdamW([*down.parameters(), *up.parameters()], lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert up.weight.grad is not None and up.weight.grad.abs().sum() > 0
    assert losses[-1] < losses[0] - 0.05
    assert_same(state(model), before)


def test_the_adapters_gradient_is_that_of_the_dequantized_model(folders: Folders) -> None:
    gradients = []
    for model in (load(folders.quantized("llama")), load(folders.quantized("llama")).dequantize()):
        x = model.get_input_embeddings()(tokens()).detach().float().requires_grad_(True)
        F.cross_entropy(model(inputs_embeds=x).logits[:, -1], tokens()[:, 0]).backward()
        gradients.append(x.grad)
    assert gradients[1].abs().max() > 1e-4
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------- tied weights


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_a_tied_weight_is_one_parameter_and_lies_in_the_file_once(family: str, folders: Folders) -> None:
    model = load(folders.quantized(family))
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert isinstance(table, QuantizedTensor) and head is table
    keys = [key for key in disk(folders.quantized(family)) if key.startswith("lm_head") or "embed_tokens" in key]
    keys += [key for key in disk(folders.quantized(family)) if "wte" in key]
    assert len(keys) == len(list(table.parts()))
    assert not [key for key in keys if key.startswith("lm_head")]


def shrinkage(plain: Path, quantized: Path) -> float:
    size = [sum(p.stat().st_size for p in folder.glob("*.safetensors")) for folder in (plain, quantized)]
    return 1 - size[1] / size[0]


@pytest.mark.slow
def test_a_tied_model_in_int8_shrinks_by_48_percent(tmp_path: Path) -> None:
    """SmolLM2-135M's shapes, with two of its thirty layers; on disk and in memory."""
    sizes = dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3
    )
    source = save("llama-tied", tmp_path / "m", torch.bfloat16, **sizes)
    model = load(source)
    before = model.get_memory_footprint(return_buffers=False)
    quantize_(model, {"_embedding": "int8", "_default": "int8"})
    model.save_pretrained(tmp_path / "q")
    assert 0.48 <= shrinkage(source, tmp_path / "q") < 0.5
    assert 0.48 <= 1 - load(tmp_path / "q").get_memory_footprint(return_buffers=False) / before < 0.5


# ---------------------------------------------------------------------------------- models without a head


@pytest.mark.parametrize("family", CONFIGS)
def test_a_base_model_loads_from_a_checkpoint_with_a_head(family: str, folders: Folders, tmp_path: Path) -> None:
    from transformers import AutoModel

    model, base = load(folders.quantized(family)), AutoModel.from_pretrained(folders.quantized(family)).eval()
    inner = {fqn: weight for fqn, weight in weights(model.base_model)}
    assert {fqn: codes for fqn, codes in codes(base).items()} == codes(model.base_model)
    assert {fqn for fqn, _ in weights(base)} == set(inner)
    with torch.no_grad():
        assert torch.equal(base(tokens()).last_hidden_state, model.base_model(tokens()).last_hidden_state)
    base.save_pretrained(tmp_path)
    assert_same(state(AutoModel.from_pretrained(tmp_path)), state(base))


def test_a_model_with_a_tied_head_loads_from_a_checkpoint_of_its_base(folders: Folders, tmp_path: Path) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(folders.quantized("llama-tied")).save_pretrained(tmp_path)
    model, wanted = load(tmp_path), load(folders.quantized("llama-tied"))
    assert_same(state(model), state(wanted))
    assert torch.equal(logits(model), logits(wanted))


# ---------------------------------------------------------------------------------- leaving


@families
def test_dequantize_gives_a_plain_model(family: str, folders: Folders, tmp_path: Path) -> None:
    quantized, model = load(folders.quantized(family)), load(folders.quantized(family)).dequantize()
    assert not list(weights(model)) and not model.is_quantized
    assert not hasattr(model, "hf_quantizer") or model.hf_quantizer is None
    assert getattr(model.config, "quantization_config", None) is None
    values = dict(model.named_parameters(remove_duplicate=False))
    for fqn, weight in weights(quantized):
        assert torch.equal(values[fqn], weight.dequantize())
    head = model.get_output_embeddings().weight
    assert (head is model.get_input_embeddings().weight) == model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    assert set(disk(tmp_path)) == set(disk(folders(family)))  # original names again, experts one by one
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert_same(state(load(tmp_path)), state(model))
    # Experts of the plain model run in another order of summation.
    torch.testing.assert_close(logits(load(tmp_path)), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dequantize_to_a_dtype(dtype: torch.dtype, folders: Folders) -> None:
    quantized, model = load(folders.quantized("llama")), load(folders.quantized("llama")).dequantize(dtype)
    values = dict(model.named_parameters())
    for fqn, weight in weights(quantized):
        assert values[fqn].dtype == dtype and torch.equal(values[fqn], weight.dequantize(dtype))


def test_a_dequantized_model_can_be_quantized_again(folders: Folders) -> None:
    """Values that come from codes of the same format are their own best approximation."""
    model = load(folders.quantized("mixtral", "int8")).dequantize()
    before = logits(model)
    quantize_(model, rtn("int8"))
    torch.testing.assert_close(logits(model), before, rtol=0.05, atol=0.05)
    assert model.is_quantized


# ---------------------------------------------------------------------------------- configs

INPUTS: dict[str, Callable[[], Any]] = {
    "a scheme": lambda: "int4-g32",
    "a config": lambda: Int4WeightOnlyConfig(group_size=32),
    "an FqnToConfig": lambda: FqnToConfig({"_default": Int4WeightOnlyConfig(group_size=32)}),
    "a mapping of schemes": lambda: {"_default": "int4-g32"},
    "a mapping of configs": lambda: {"_default": Int4WeightOnlyConfig(group_size=32)},
    "a mapping of fields": lambda: {"_default": {"format": "int4", "group_size": 32}},
    "a recipe": lambda: FqnToConfig.of(Int4WeightOnlyConfig(group_size=32)),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_every_way_to_say_it_means_the_same(kind: str) -> None:
    config = LlmQuantConfig(INPUTS[kind]())
    assert config.fqn_to_config == LlmQuantConfig("int4-g32").fqn_to_config
    json.dumps(config.to_dict())
    assert LlmQuantConfig.from_dict(config.to_dict()).fqn_to_config == config.fqn_to_config
    assert copy.deepcopy(config).to_dict() == config.to_dict() == dict(config)


def test_recipes_by_name_path_and_object(tmp_path: Path) -> None:
    wanted = load_recipe("mixed-4-6-8").config
    path = tmp_path / "mine.yaml"
    path.write_text("llmquant_recipe: 1\nweights:\n  _default: int4-g32\n")
    assert LlmQuantConfig("mixed-4-6-8").fqn_to_config == wanted
    assert LlmQuantConfig(load_recipe("mixed-4-6-8")).fqn_to_config == wanted
    for source in (path, str(path)):
        assert LlmQuantConfig(source).fqn_to_config == LlmQuantConfig("int4-g32").fqn_to_config


@pytest.mark.parametrize(
    "nonsense",
    ["int9", "int4-g", "int4-g0", "no-such.yaml", {"_default": 4}, {"_default": {"format": "int4", "size": 3}}],
    ids=str,
)
def test_nonsense_is_a_config_error(nonsense: Any) -> None:
    with pytest.raises(ConfigError):
        LlmQuantConfig(nonsense)


def test_arguments_that_do_not_exist_are_refused() -> None:
    """They would otherwise be taken for fields of a manifest, and silently do nothing."""
    with pytest.raises(ConfigError, match="group_size"):
        LlmQuantConfig("int4", group_size=64)


def test_a_config_of_another_kind_is_refused(folders: Folders) -> None:
    from transformers import FineGrainedFP8Config

    with pytest.raises(ValueError, match="LlmQuantConfig"):
        load(folders.quantized("llama"), quantization_config=FineGrainedFP8Config())


@pytest.mark.filterwarnings("ignore:You passed")
def test_of_two_configs_the_checkpoints_counts(folders: Folders) -> None:
    model = load(folders.quantized("llama"), quantization_config=LlmQuantConfig("int8"))
    assert_same(state(model), state(load(folders.quantized("llama"))))


def test_weights_that_are_no_safetensors_are_refused(folders: Folders, tmp_path: Path) -> None:
    folder = copy_folder(folders.quantized("llama"), tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        load(folder)


# ---------------------------------------------------------------------------------- helpers


def test_load_is_from_pretrained(folders: Folders) -> None:
    model = llmquant.load(str(folders.quantized("llama")), dtype=torch.float16)
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float16
    assert codes(model) == codes(load(folders.quantized("llama")))


def test_a_folder_without_a_tokenizer_is_named(folders: Folders) -> None:
    with pytest.raises(llmquant.LlmQuantError, match="tokenizer") as error:
        load_tokenizer(folders("llama"))
    assert error.value.where == str(folders("llama")) and error.value.hint


def modules_left(model: nn.Module) -> Iterator[str]:
    yield from (name for name, _ in model.named_modules())


def test_quantizing_replaces_parameters_not_modules(folders: Folders) -> None:
    plain, model = load(folders("mixtral")), load(folders.quantized("mixtral"))
    assert list(modules_left(plain)) == list(modules_left(model))
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]
