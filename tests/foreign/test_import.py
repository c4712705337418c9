"""Whole checkpoints of other libraries become ones of ours: names, merges, ties, the report, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import copy, disk, edit_json, load, logits, manifest, rewrite, save
from torch import Tensor
from typer.testing import CliRunner

from foreign import writers
from foreign.writers import set_quantization, write
from llmquant import QuantizedTensor, import_checkpoint
from llmquant.checkpoint.inspect import inspect_checkpoint
from llmquant.cli.main import app
from llmquant.errors import AlreadyQuantizedError, CheckpointError, LlmQuantError, OutputExistsError
from llmquant.foreign.spec import Taken
from llmquant.foreign.store import Store

SIZES = dict(intermediate_size=96, tie_word_embeddings=False)


def values(folder: Path) -> dict[str, Tensor]:
    """Every parameter as a loaded model has it, decoded in float32."""
    found = dict(load(folder).named_parameters())
    return {k: p.dequantize(torch.float32) if isinstance(p, QuantizedTensor) else p.detach() for k, p in found.items()}


def assert_same_model(ours: Path, plain: Path) -> None:
    """Every parameter of two folders is the same, bit for bit."""
    a, b = values(ours), values(plain)
    assert sorted(a) == sorted(b)
    assert not [name for name in a if not torch.equal(a[name], b[name])]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> writers.Pair:
    return write("llama", tmp_path_factory.mktemp("llama"), **SIZES)


@pytest.mark.parametrize("method, bits", [("gptq", 2), ("gptq", 3), ("gptq", 4), ("gptq", 8), ("awq", 4)])
def test_a_model_is_that_of_the_values(method: str, bits: int, tmp_path: Path) -> None:
    pair = write("llama", tmp_path, method, bits=bits, **SIZES)
    report = import_checkpoint(pair.foreign, tmp_path / "ours")
    assert_same_model(tmp_path / "ours", pair.plain)
    assert set(report.counts()) == {Taken.exact} and len(report.weights) == 14
    assert {e["format"] for e in manifest(tmp_path / "ours")["weights"].values()} == {f"int{bits}"}


# Experts of a file lie one by one and are gathered; gpt2's weights stand as [in, out]; a tied head is written once.
@pytest.mark.parametrize("family", ["mixtral", "gpt2", "llama-tied", "qwen3-moe"])
def test_families(family: str, tmp_path: Path) -> None:
    overrides = {"mixtral": dict(intermediate_size=64), "llama-tied": dict(intermediate_size=96)}
    overrides["qwen3-moe"] = dict(moe_intermediate_size=64, intermediate_size=96)
    pair = write(family, tmp_path, **overrides.get(family, {}))
    report = import_checkpoint(pair.foreign, tmp_path / "ours")
    assert_same_model(tmp_path / "ours", pair.plain)
    assert not report.left_out and not report.warnings
    assert any("expert" in name for name in report.weights) == (family in ("mixtral", "qwen3-moe"))


def test_several_shards_in_and_out(llama: writers.Pair, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    sharded = copy(llama.foreign, tmp_path / "sharded")
    tensors = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    places = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(tensors)}
    for name in set(places.values()):
        save_file({k: t for k, t in tensors.items() if places[k] == name}, sharded / name, metadata={"format": "pt"})
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    import_checkpoint(sharded, tmp_path / "ours", max_shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    assert_same_model(tmp_path / "ours", llama.plain)


def test_the_result_is_an_ordinary_checkpoint(llama: writers.Pair, tmp_path: Path) -> None:
    foreign = copy(llama.foreign, tmp_path / "foreign")
    (foreign / "tokenizer.json").write_text("{}")
    (foreign / "quantize_config.json").write_text("{}")
    seen: list[tuple[int, int, str]] = []
    report = import_checkpoint(foreign, tmp_path / "ours", progress=lambda *args: seen.append(args))
    found = inspect_checkpoint(tmp_path / "ours")
    assert found.totals()["quantized_weights"] == len(report.weights) == 14
    assert found.totals()["bytes"] == report.bytes_after == sum(len(b[2]) for b in disk(tmp_path / "ours").values())
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {
        *("config.json", "generation_config.json", "llmquant_checksums.json", "model.safetensors", "tokenizer.json"),
    }
    assert manifest(tmp_path / "ours")["quant_method"] == "llmquant"
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] > 0 and [s[0] for s in seen] == sorted(s[0] for s in seen)
    assert torch.allclose(logits(load(tmp_path / "ours")), logits(load(llama.plain)), atol=1e-4)


def test_scattered_groups_are_refused_or_quantized_again(tmp_path: Path) -> None:
    pair = write("llama", tmp_path, scattered="down_proj", **SIZES)
    with pytest.raises(CheckpointError, match="activation order") as caught:
        import_checkpoint(pair.foreign, tmp_path / "ours")
    assert "down_proj.weight" in str(caught.value.where) and "--requantize" in str(caught.value.hint)
    assert not (tmp_path / "ours").exists()
    report = import_checkpoint(pair.foreign, tmp_path / "ours", requantize="int8")
    assert report.counts() == {Taken.exact: 12, Taken.requantized: 2}
    assert any("decoded" in warning for warning in report.warnings)
    a, b = values(tmp_path / "ours"), values(pair.plain)
    for name in a:
        error = (a[name] - b[name]).norm() / b[name].norm()
        assert 0.0005 < error < 0.02 if "down_proj" in name else error == 0


def test_or_left_plain(tmp_path: Path) -> None:
    pair = write("llama", tmp_path, scattered="down_proj", **SIZES)
    import_checkpoint(pair.foreign, tmp_path / "ours", requantize="none")
    assert_same_model(tmp_path / "ours", pair.plain)
    assert not any("down_proj" in name for name in manifest(tmp_path / "ours")["weights"])


def test_settings_of_older_releases(llama: writers.Pair, tmp_path: Path) -> None:
    foreign = copy(llama.foreign, tmp_path / "foreign")
    settings = writers.settings_of(foreign)
    edit_json(foreign / "config.json", lambda config: config.pop("quantization_config"))
    (foreign / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": settings["group_size"]}))
    import_checkpoint(foreign, tmp_path / "ours")
    assert_same_model(tmp_path / "ours", llama.plain)


def test_zero_biases_that_the_model_lacks_are_left_out(llama: writers.Pair, tmp_path: Path) -> None:
    key, foreign = "model.layers.0.mlp.down_proj.bias", copy(llama.foreign, tmp_path / "foreign")
    rewrite(foreign / "model.safetensors", lambda tensors: tensors.update({key: torch.zeros(64)}))
    report = import_checkpoint(foreign, tmp_path / "ours")
    assert report.left_out == [key] and key in report.warnings[0]
    rewrite(foreign / "model.safetensors", lambda tensors: tensors.update({key: torch.ones(64)}))
    with pytest.raises(CheckpointError, match="no such bias"):
        import_checkpoint(foreign, tmp_path / "other")


def test_a_tie_that_the_checkpoint_does_not_keep(tmp_path: Path) -> None:
    pair = write("llama", tmp_path, **SIZES)
    edit_json(pair.foreign / "config.json", lambda config: config.update(tie_word_embeddings=True))
    with pytest.raises(CheckpointError, match=r"ties lm_head\.weight"):
        import_checkpoint(pair.foreign, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_an_existing_output_stays(llama: writers.Pair, tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine").write_text("x")
    with pytest.raises(OutputExistsError):
        import_checkpoint(llama.foreign, tmp_path / "ours")
    import_checkpoint(llama.foreign, tmp_path / "ours", overwrite=True)
    assert not (tmp_path / "ours" / "mine").exists()


def test_a_failure_in_the_middle_leaves_nothing(
    llama: writers.Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, asked = Store.read, []

    def failing(self: Store, key: str) -> Tensor:
        asked.append(key)
        if key.endswith("layers.1.mlp.up_proj.qweight"):
            raise KeyboardInterrupt
        return read(self, key)

    monkeypatch.setattr(Store, "read", failing)
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(llama.foreign, tmp_path / "ours")
    assert asked and not list(tmp_path.iterdir())


def test_no_value_is_read_before_all_is_known_to_fit(
    llama: writers.Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only zero points and column orders are looked at while a model is refused."""
    read: list[str] = []
    plain = Store.read
    monkeypatch.setattr(Store, "read", lambda self, key: read.append(key) or plain(self, key))
    foreign = copy(llama.foreign, tmp_path / "foreign")
    edit_json(foreign / "config.json", lambda config: config.update(intermediate_size=128))
    with pytest.raises(CheckpointError, match="shape"):
        import_checkpoint(foreign, tmp_path / "ours")
    assert read and {key.rpartition(".")[2] for key in read} == {"qzeros", "g_idx"}


def test_refuses_what_is_no_checkpoint_of_another_library(tmp_path: Path, llama: writers.Pair) -> None:
    with pytest.raises(CheckpointError, match="not quantized"):
        import_checkpoint(llama.plain, tmp_path / "a")
    import_checkpoint(llama.foreign, tmp_path / "ours")
    with pytest.raises(AlreadyQuantizedError, match="own"):
        import_checkpoint(tmp_path / "ours", tmp_path / "b")
    unknown = copy(llama.foreign, tmp_path / "foreign")
    set_quantization(unknown, quant_method="hqq")
    with pytest.raises(CheckpointError, match="'hqq' are not imported"):
        import_checkpoint(unknown, tmp_path / "c")


def tensor(key: str, change: Any) -> Any:
    """A change of one tensor of layer 0's up_proj."""
    full = f"model.layers.0.mlp.up_proj.{key}"

    def apply(folder: Path) -> None:
        def edit(tensors: dict[str, Tensor]) -> None:
            found = change(tensors.pop(full)) if change is not None else tensors.pop(full) and None
            if found is not None:
                tensors[full] = found.contiguous()

        rewrite(folder / "model.safetensors", edit)

    return apply


def setting(**changes: Any) -> Any:
    return lambda folder: set_quantization(folder, **changes)


HOSTILE = {
    "scales of another group": (tensor("scales", lambda t: t[1:]), "does not fit|do not fit"),
    "scales of other outputs": (tensor("scales", lambda t: t[:, 8:]), "do not fit"),
    "zero points of other groups": (tensor("qzeros", lambda t: t[1:]), "does not fit"),
    "zero points of other outputs": (tensor("qzeros", lambda t: t[:, 1:]), "do not fit"),
    "codes of another dtype": (tensor("qweight", lambda t: t.short()), "int16"),
    "codes in three dimensions": (tensor("qweight", lambda t: t[None]), "2 sides"),
    "no codes": (tensor("qweight", lambda t: t[:0]), "2 sides"),
    "codes of fewer inputs": (tensor("qweight", lambda t: t[1:]), "fit"),
    "scales missing": (tensor("scales", lambda t: None), "lacks"),
    "infinite scale": (tensor("scales", lambda t: t.index_fill(0, torch.tensor(0), torch.inf)), "NaN or infinite"),
    "a group that is none": (tensor("g_idx", lambda t: t + 1), "no group"),
    "a group below zero": (tensor("g_idx", lambda t: t - 2), "no group"),
    "a shorter order": (tensor("g_idx", lambda t: t[1:]), "does not fit"),
    "an order of floats": (tensor("g_idx", lambda t: t.float()), "float32"),
    "other bits": (setting(bits=3), "4 bits, config.json says 3"),
    "bits in words": (setting(bits="four"), "'four'"),
    "no bits": (setting(bits=None), "bits is None"),
    "huge groups": (setting(group_size=10**12), "group_size"),
    "groups of nothing": (setting(group_size=0), "fit"),
    "groups of minus two": (setting(group_size=-2), "group_size"),
    "a layout of kernels": (setting(checkpoint_format="marlin"), "'marlin'"),
    "the planar layout": (setting(planar=True), "planar"),
    "a list of settings": (setting(dynamic=[1]), "dynamic"),
    "symmetric in words": (setting(sym="yes"), "neither true nor false"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(case: str, llama: writers.Pair, tmp_path: Path) -> None:
    damage, message = HOSTILE[case]
    damage(copy(llama.foreign, tmp_path / "foreign"))
    with pytest.raises(LlmQuantError, match=message):
        import_checkpoint(tmp_path / "foreign", tmp_path / "ours")
    assert not (tmp_path / "ours").exists() and len(list(tmp_path.iterdir())) == 1


def test_no_pickle_is_read(tmp_path: Path, llama: writers.Pair) -> None:
    foreign = copy(llama.foreign, tmp_path / "foreign")
    (foreign / "model.safetensors").rename(foreign / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors"):
        import_checkpoint(foreign, tmp_path / "ours")


def test_command_line(tmp_path: Path) -> None:
    pair = write("llama", tmp_path, scattered="down_proj", **SIZES)
    arguments = ["import", str(pair.foreign), "-o", str(tmp_path / "ours")]
    failed = CliRunner().invoke(app, arguments)
    assert isinstance(failed.exception, CheckpointError)
    done = CliRunner().invoke(app, [*arguments, "--requantize", "int4-g16-asym", "--json", str(tmp_path / "r.json")])
    assert done.exit_code == 0, done.output
    assert "14 weights taken over" in done.output and "requantized" in done.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert (
        report["source"] == "GPTQ"
        and report["weights"]["model.layers.0.mlp.down_proj.weight"]["taken"] == "requantized"
    )


def test_compressed_tensors_model(tmp_path: Path) -> None:
    """A model that the real package quantized and saved, against that package's own load."""
    pytest.importorskip("compressed_tensors")
    from foreign.others import compressed_tensors_model, decoded

    foreign = compressed_tensors_model(save("llama", tmp_path / "plain", **SIZES), tmp_path / "foreign")
    report = import_checkpoint(foreign, tmp_path / "ours")
    assert report.counts() == {Taken.exact: 14}
    expected, found = decoded(foreign), values(tmp_path / "ours")
    assert sum(torch.equal(found[name], expected[name]) for name in found) == len(found) == len(expected)


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_model(nested: bool, tmp_path: Path) -> None:
    """A model that transformers quantized with the real package, against that package's own decoding."""
    pytest.importorskip("bitsandbytes")
    from foreign.others import bitsandbytes_model, decoded_4bit

    plain = save("llama", tmp_path / "plain", **dict(SIZES, intermediate_size=128))
    foreign = bitsandbytes_model(plain, tmp_path / "foreign", nested)
    report = import_checkpoint(foreign, tmp_path / "ours")
    assert report.counts() == {Taken.widened if nested else Taken.exact: 14}
    expected, found = decoded_4bit(foreign), values(tmp_path / "ours")
    assert len(expected) == 14
    assert not [name for name, value in expected.items() if not torch.equal(found[name], value)]
