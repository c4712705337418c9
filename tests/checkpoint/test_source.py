"""A plain checkpoint is read tensor by tensor under the names and with the values that transformers would give it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CONFIGS, Folders, Shape, assert_same, copy, edit_json, load, raw, rewrite, save, to_bin
from safetensors.torch import save_file

import llmquant
from llmquant.checkpoint.config_file import read_config
from llmquant.checkpoint.inspect import inspect_checkpoint
from llmquant.checkpoint.source import locate, open_source, parse_dtype, weight_files
from llmquant.checkpoint.stream import quantize_checkpoint
from llmquant.errors import AlreadyQuantizedError, CheckpointError, ConfigError, ModelNotFoundError, PickleError


def values(folder: Path) -> dict[str, tuple]:
    """What the source yields, a tied weight once."""
    source = open_source(folder)
    tied = source.skeleton.all_tied_weights_keys
    found: dict[str, tuple] = {}
    for name, tensor in source.parameters():
        first = tied.get(name, name)
        assert first not in found, f"{name} comes twice"
        found[first] = raw(tensor)
    return found


@pytest.mark.parametrize("shape", Shape)
@pytest.mark.parametrize("family", CONFIGS)
def test_names_and_values_are_those_of_the_loaded_model(
    family: str, shape: Shape, folders: Folders, tmp_path: Path
) -> None:
    folder = shape.make(folders(family), tmp_path / "m")
    wanted = {fqn: raw(p) for fqn, p in load(folder).named_parameters()}
    assert_same(values(folder), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_that_of_the_file_until_it_is_cast(dtype: torch.dtype, folders: Folders) -> None:
    folder = folders("llama", dtype)
    assert {t.dtype for _, t in open_source(folder).parameters()} == {dtype}
    assert open_source(folder).dtype == dtype
    assert open_source(folder, torch.float32).dtype == torch.float32


DTYPES: dict[str, Callable[[dict], object]] = {
    "dtype": lambda c: c.update(dtype="float16"),
    "torch_dtype": lambda c: (c.pop("dtype"), c.update(torch_dtype="float16")),
    "none": lambda c: c.pop("dtype"),
    "null": lambda c: c.update(dtype=None),
}


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape", list(Shape))
def test_the_dtype_is_the_one_from_pretrained_chooses(
    shape: Shape, kind: str, folders: Folders, tmp_path: Path
) -> None:
    folder = shape.make(folders("llama", torch.bfloat16), tmp_path / "m")
    edit_json(folder / "config.json", DTYPES[kind])
    assert open_source(folder).dtype == load(folder).dtype


def test_the_skeleton_holds_no_values(folders: Folders) -> None:
    skeleton = open_source(folders("mixtral")).skeleton
    assert all(p.is_meta for p in skeleton.parameters())


# ---------------------------------------------------------------------------------- locate


def test_a_folder_is_found(tmp_path: Path) -> None:
    assert locate(tmp_path) == locate(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./no/such", "a/b/c", "../x", "no such", "https://example.org/x", "FILE"])
def test_what_is_no_folder_and_no_hub_id(name: str, tmp_path: Path) -> None:
    path = str(tmp_path / "file") if name == "FILE" else name
    (tmp_path / "file").touch()
    with pytest.raises(ModelNotFoundError, match="no such model folder") as error:
        locate(path)
    assert error.value.where == path and error.value.hint


def test_a_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="hub") as error:
        locate("nobody/nothing")
    assert error.value.where == "nobody/nothing"


# ---------------------------------------------------------------------------------- config.json


BAD_CONFIGS = {
    "missing": None,
    "empty": b"",
    "cut": b'{"model_type": "lla',
    "no JSON": b"hello",
    "no UTF-8": b'{"model_type": "\xff\xfe"}',
    "a list": b"[1, 2]",
    "no model_type": b'{"hidden_size": 3}',
    "a model_type that is a list": b'{"model_type": []}',
    "a key twice": b'{"model_type": "llama", "model_type": "gpt2"}',
    "nesting": b'{"model_type": "llama", "a": ' + b"[" * 65 + b"]" * 65 + b"}",
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_a_folder_without_a_readable_config(kind: str, tmp_path: Path) -> None:
    content = BAD_CONFIGS[kind]
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    for function in (read_config, open_source):
        with pytest.raises(ModelNotFoundError, match=r"config\.json") as error:
            function(tmp_path)
        assert error.value.where == str(tmp_path)


HOSTILE_CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a billion layers": (lambda c: c.update(num_hidden_layers=10**9), "num_hidden_layers"),
    "a million experts somewhere inside": (lambda c: c.update(text_config={"num_experts": 10**6}), "num_experts"),
    "a size beyond 31 bits": (lambda c: c.update(hidden_size=2**31), "hidden_size"),
    "a size beyond 63 bits, below zero": (lambda c: c.update(vocab_size=-(2**64)), "vocab_size"),
    "a manifest that is a list": (lambda c: c.update(quantization_config=[1]), "quantization_config"),
}


@pytest.mark.parametrize("kind", HOSTILE_CONFIGS)
def test_a_config_beyond_every_limit_is_refused_before_a_model_is_built(
    kind: str, folders: Folders, tmp_path: Path
) -> None:
    folder, (change, words) = copy(folders("llama"), tmp_path / "m"), HOSTILE_CONFIGS[kind]
    edit_json(folder / "config.json", change)
    for function in (read_config, open_source, inspect_checkpoint):
        with pytest.raises(CheckpointError, match=words):
            function(folder)


def test_code_beside_the_weights_is_not_run(folders: Folders, tmp_path: Path) -> None:
    folder = copy(folders("llama"), tmp_path / "m")
    (folder / "trap.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'sprung')!r}).touch()")
    classes = {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"}
    edit_json(folder / "config.json", lambda c: c.update(auto_map=classes, model_type="trapped", architectures=["X"]))
    for function in (open_source, llmquant.load):
        with pytest.raises(ValueError, match=r"trapped|code"):
            function(folder)
    assert not (tmp_path / "sprung").exists()


# ---------------------------------------------------------------------------------- weight files


def test_a_folder_without_weights(folders: Folders, tmp_path: Path) -> None:
    folder = copy(folders("llama"), tmp_path / "m")
    (folder / "model.safetensors").unlink()
    for function in (weight_files, open_source):
        with pytest.raises(ModelNotFoundError, match=r"no model\.safetensors") as error:
            function(folder)
        assert error.value.where == str(folder)


def test_a_lost_shard_is_named(folders: Folders, tmp_path: Path) -> None:
    folder = Shape.sharded.make(folders("llama"), tmp_path / "m")
    lost = weight_files(folder)[1]
    assert len(weight_files(folder)) > 2
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name):
        weight_files(folder)


INDEXES = {
    "cut": b'{"weight_map": {"a": "mod',
    "empty": b"",
    "a list": b"[]",
    "no weight_map": b'{"metadata": {}}',
    "a weight_map that is a list": b'{"weight_map": ["a"]}',
    "a file that is a number": b'{"weight_map": {"a": 3}}',
}


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_that_cannot_be_read_is_named(kind: str, folders: Folders, tmp_path: Path) -> None:
    folder = Shape.sharded.make(folders("llama"), tmp_path / "m")
    (folder / "model.safetensors.index.json").write_bytes(INDEXES[kind])
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        weight_files(folder)


def test_safetensors_go_before_bin_as_in_transformers(folders: Folders, tmp_path: Path) -> None:
    folder = copy(folders("llama"), tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    assert weight_files(folder) == (folder / "model.safetensors",)


# ---------------------------------------------------------------------------------- models


@pytest.mark.parametrize("method", ["llmquant", "gptq"])
def test_a_quantized_model_is_no_source(method: str, folders: Folders, tmp_path: Path) -> None:
    folder = copy(folders.quantized("llama"), tmp_path / "m")
    edit_json(folder / "config.json", lambda c: c["quantization_config"].update(quant_method=method))
    with pytest.raises(AlreadyQuantizedError, match=method) as error:
        open_source(folder)
    assert error.value.where == str(folder) and error.value.hint
    with pytest.raises(AlreadyQuantizedError):
        quantize_checkpoint(folder, tmp_path / "out", "int4-g32")
    assert not (tmp_path / "out").exists()


FOREIGN: dict[str, Callable[[dict], object]] = {
    "an unknown model": lambda c: c.update(model_type="banana"),
    "a model that is no language model": lambda c: c.update(model_type="vit", architectures=["NoSuchModel"]),
    "a size that is a text": lambda c: c.update(hidden_size="wide"),
    "a dtype that torch lacks": lambda c: c.update(dtype="float7"),
    "a dtype that is no dtype": lambda c: c.update(dtype="nn"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_model_that_cannot_be_built(kind: str, folders: Folders, tmp_path: Path) -> None:
    folder = copy(folders("llama"), tmp_path / "m")
    edit_json(folder / "config.json", FOREIGN[kind])
    with pytest.raises(ModelNotFoundError, match=str(folder)):
        open_source(folder)


def test_an_unknown_class_falls_back_to_the_models_own(folders: Folders, tmp_path: Path) -> None:
    folder = copy(folders("llama"), tmp_path / "m")
    edit_json(folder / "config.json", lambda c: c.update(architectures=["SomebodysLlama"]))
    assert type(open_source(folder).skeleton).__name__ == "LlamaForCausalLM"
    edit_json(folder / "config.json", lambda c: c.pop("architectures"))
    assert type(open_source(folder).skeleton).__name__ == "LlamaForCausalLM"


# ---------------------------------------------------------------------------------- broken weights


def test_parameters_that_no_file_holds_are_named(folders: Folders, tmp_path: Path) -> None:
    folder = copy(folders("mixtral"), tmp_path / "m")
    rewrite(folder / "model.safetensors", lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 .*\n.*model\.layers\.1\.self_attn\.k_proj\.weight"):
        list(open_source(folder).parameters())


def test_an_expert_that_no_file_holds_is_an_error(folders: Folders, tmp_path: Path) -> None:
    folder = copy(folders("mixtral"), tmp_path / "m")
    keys: list[str] = []

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        keys.append(next(key for key in tensors if "experts.2.w1" in key))
        tensors.pop(keys[0])

    rewrite(folder / "model.safetensors", drop)
    assert keys
    with pytest.raises(CheckpointError, match="experts"):
        list(open_source(folder).parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tensor_of_another_shape_is_refused_by_name(family: str, folders: Folders, tmp_path: Path) -> None:
    folder = copy(folders(family), tmp_path / "m")
    keys: list[str] = []

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        keys.append(next(key for key in tensors if "proj.weight" in key))
        tensors[keys[0]] = tensors[keys[0]][:-1].clone()

    rewrite(folder / "model.safetensors", cut)
    with pytest.raises(CheckpointError, match="shape") as error:
        list(open_source(folder).parameters())
    assert keys[0] in str(error.value)


def test_tensors_that_the_model_lacks_are_left_out(folders: Folders, tmp_path: Path) -> None:
    folder = copy(folders("llama"), tmp_path / "m")
    before = values(folder)
    rewrite(folder / "model.safetensors", lambda t: t.update({"model.layers.0.rotary.inv_freq": torch.ones(3)}))
    assert_same(values(folder), before)


@pytest.mark.parametrize("length", [0, 5, 100, 4000, -1])
def test_a_truncated_file_is_refused_by_name(length: int, folders: Folders, tmp_path: Path) -> None:
    folder = copy(folders("llama"), tmp_path / "m")
    (path,) = weight_files(folder)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=path.name):
        list(open_source(folder).parameters())
    with pytest.raises(CheckpointError, match=path.name):
        quantize_checkpoint(folder, tmp_path / "out", "int4-g32")
    assert not (tmp_path / "out").exists()


class Trap:
    """A pickle of it makes a file appear where it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("count", [1, 3])
def test_pickles_are_refused_and_not_read(count: int, folders: Folders, tmp_path: Path) -> None:
    folder = to_bin(folders("llama"), tmp_path / "m", count)
    for path in folder.glob("*.bin"):
        torch.save({"lm_head.weight": Trap(tmp_path / "sprung")}, path)
    for opened in (open_source, weight_files, inspect_checkpoint):
        with pytest.raises(PickleError, match="only safetensors") as error:
            opened(folder)
        assert "pytorch_model" in str(error.value) and "save_pretrained" in str(error.value.hint)
    with pytest.raises(PickleError):
        quantize_checkpoint(folder, tmp_path / "out", "int4-g32")
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "out").exists()
    torch.load(next(folder.glob("*.bin")), weights_only=False)
    assert (tmp_path / "sprung").exists()  # the trap works


# ---------------------------------------------------------------------------------- ties


def test_a_tied_copy_under_the_heads_name_alone(folders: Folders, tmp_path: Path) -> None:
    folder = copy(folders("llama-tied"), tmp_path / "m")
    rewrite(
        folder / "model.safetensors", lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight").clone()})
    )
    wanted = {fqn: raw(p) for fqn, p in load(folders("llama-tied")).named_parameters()}
    assert_same(values(folder), wanted)


# ---------------------------------------------------------------------------------- the rest


def test_extras_are_all_files_but_weights_and_config(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "m")
    kept = {"tokenizer.json", "tokenizer_config.json", "LICENSE", "modeling_x.py", "vocab.txt"}
    left = {"model.gguf", "x.bin", "old.safetensors", "model.safetensors.index.json", "tf_model.h5", ".hidden"}
    for name in kept | left:
        (folder / name).write_text(name)
    (folder / "original").mkdir()
    found = {path.name for path in open_source(folder).extras()}
    assert found == kept | {"generation_config.json"}


def test_parse_dtype() -> None:
    assert parse_dtype(None) is parse_dtype("auto") is None
    assert parse_dtype("bfloat16") == torch.bfloat16
    for name in ("int8", "float8", "bf16", ""):
        with pytest.raises(ConfigError, match="auto, float32"):
            parse_dtype(name)


def test_an_index_that_lists_several_folders_worth_of_files(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}})
    )
    assert weight_files(tmp_path) == (tmp_path / "x.safetensors",)
