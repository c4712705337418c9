"""`verify` finds whatever is not as it was saved, by name, and takes nothing for right that nobody vouches for."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CONFIGS, Folders, Shape, copy, disk, edit_json, load, manifest, rewrite, to_bin
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import llmquant
from llmquant import VerifyReport, verify
from llmquant.checkpoint.checksums import FILE, checksum, read_checksums
from llmquant.checkpoint.header import read_header
from llmquant.checkpoint.index import INDEX
from llmquant.checkpoint.manifest import shard_metadata
from llmquant.checkpoint.source import weight_files
from llmquant.checkpoint.stream import quantize_checkpoint
from llmquant.cli.main import app
from llmquant.errors import CheckpointError, ChecksumError, LlmQuantError, ModelNotFoundError, PickleError

WEIGHT = "model.layers.0.self_attn.q_proj.weight"


def streamed(folders: Folders, target: Path, family: str = "llama", **options: Any) -> Path:
    quantize_checkpoint(folders(family), target, CONFIGS[family], **options)
    return target


@pytest.fixture(params=["in memory", "streamed"])
def folder(request: pytest.FixtureRequest, folders: Folders, tmp_path: Path) -> Path:
    """A sharded checkpoint, with its checksums in the manifest or in a file."""
    if request.param == "streamed":
        return streamed(folders, tmp_path / "q", max_shard_bytes=10_000)
    load(folders.quantized("llama")).save_pretrained(tmp_path / "q", max_shard_size="10KB")
    return tmp_path / "q"


def wrong(report: VerifyReport) -> dict[str, str]:
    assert report.status == "wrong" and not report.ok
    return {problem.where: problem.what for problem in report.problems}


# ---------------------------------------------------------------------------------- what is right


@pytest.mark.parametrize("family", CONFIGS)
def test_every_save_of_every_family_is_right(family: str, folders: Folders, tmp_path: Path) -> None:
    llmquant.save(load(folders.quantized(family)), tmp_path / "saved")
    for folder in (folders.quantized(family), tmp_path / "saved", streamed(folders, tmp_path / "streamed", family)):
        report = verify(folder)
        assert report.ok and not report.problems, report.problems
        assert report.tensors == report.matched == len(disk(folder))
        assert report.bytes == sum(len(content) for _, _, content in disk(folder).values())


def test_sharded_or_saved_again_it_is_right(folder: Path, tmp_path: Path) -> None:
    assert len(weight_files(folder)) > 2 and verify(folder).ok
    load(folder).save_pretrained(tmp_path / "again")
    assert verify(tmp_path / "again").ok


def test_checksums_are_those_of_the_bytes_in_the_files(folder: Path) -> None:
    sums = read_checksums(folder, manifest(folder))
    tensors = {key: t for path in weight_files(folder) for key, t in load_file(path).items()}
    assert sums == {key: checksum(tensor) for key, tensor in tensors.items()}
    assert len(set(sums.values())) > len(sums) // 2  # they differ, where tensors do


def test_a_checksum_is_that_of_the_values_not_of_the_memory() -> None:
    values = torch.arange(6.0).reshape(2, 3)
    assert checksum(values.t()) == checksum(values.t().contiguous()) != checksum(values)
    assert checksum(torch.zeros(0)) == checksum(torch.zeros(0, 3, dtype=torch.int8))  # sha256 of nothing


def test_progress_goes_from_nothing_to_everything(folder: Path) -> None:
    told: list[tuple[int, int, str]] = []
    report = verify(folder, lambda *now: told.append(now))
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert told[0][0] == 0 and told[-1] == (report.bytes, report.bytes, "") and len(told) == report.tensors + 1


# ---------------------------------------------------------------------------------- nobody vouches


def test_plain_models_and_old_saves_are_not_called_right(folders: Folders, tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "goldens" / "v1" / "llama"
    for folder in (golden, folders("llama"), Shape.sharded.make(folders("llama"), tmp_path / "sharded")):
        report = verify(folder)
        assert report.status == "unverifiable" and not report.ok and not report.problems
        assert len(report.unverifiable) == report.tensors == len(disk(folder)) and report.matched == 0


# ---------------------------------------------------------------------------------- single bits


@pytest.mark.parametrize("seed", range(20))
def test_one_bit_of_a_tensor_is_found_by_name(seed: int, folder: Path) -> None:
    chosen = random.Random(seed)
    path = chosen.choice(weight_files(folder))
    key, (begin, end) = chosen.choice(sorted(read_header(path).places.items()))
    content = bytearray(path.read_bytes())
    content[chosen.randrange(begin, end)] ^= 1 << chosen.randrange(8)
    path.write_bytes(content)
    found = verify(folder)
    assert set(wrong(found)) == {key} and found.matched == found.tensors - 1


@pytest.mark.parametrize("seed", range(20))
def test_one_bit_of_a_header_is_found(seed: int, folder: Path) -> None:
    chosen = random.Random(seed)
    path = chosen.choice(weight_files(folder))
    content = bytearray(path.read_bytes())
    content[chosen.randrange(8 + int.from_bytes(content[:8], "little"))] ^= 1 << chosen.randrange(7)
    path.write_bytes(content)
    assert wrong(verify(folder))


# ---------------------------------------------------------------------------------- whole files


def test_every_wrong_tensor_and_file_is_named_at_once(folder: Path) -> None:
    first, second, third, *_ = weight_files(folder)
    lost, damaged = set(read_header(first).tensors), set(read_header(second).tensors)
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    key = next(iter(read_header(third).tensors))
    rewrite(third, lambda tensors: tensors.update({key: 1 - tensors[key]}))
    found = wrong(verify(folder))
    assert lost | damaged | {key, first.name, second.name} <= set(found)
    assert "missing" in found[first.name] and "truncated" in found[second.name] and "sha256" in found[key]


def other(folder: Path) -> Path:
    """A shard without the weight."""
    return next(path for path in weight_files(folder) if WEIGHT not in read_header(path).tensors)


HARM: dict[str, tuple[Callable[[Path], object], str]] = {
    "an index that leaves the folder": (
        lambda f: edit_json(f / INDEX, lambda i: i["weight_map"].update(x="../x")),
        "does not lie in",
    ),
    "an index that is none": (lambda f: (f / INDEX).write_text("{"), "cannot read the index"),
    "an index that names another shard": (
        lambda f: edit_json(
            f / INDEX, lambda i: i["weight_map"].update({WEIGHT: sorted(i["weight_map"].values())[-1]})
        ),
        "as the index says",
    ),
    "an edited manifest": (
        lambda f: edit_json(f / "config.json", lambda c: c["quantization_config"]["weights"].popitem()),
        "another save",
    ),
    "an impossible manifest": (
        lambda f: edit_json(f / "config.json", lambda c: c["quantization_config"]["weights"][WEIGHT].update(block=3)),
        "block is a list",
    ),
    "a manifest of another version": (
        lambda f: edit_json(f / "config.json", lambda c: c["quantization_config"].update(format_version=9)),
        "version 9",
    ),
    "a shard of another save": (
        lambda f: save_file(load_file(weight_files(f)[0]), weight_files(f)[0], metadata={"format": "pt"}),
        "did not write",
    ),
    "a tensor in two shards": (
        lambda f: rewrite(other(f), lambda t: t.update({WEIGHT: torch.zeros(1)})),
        f"{WEIGHT} is in",
    ),
    "a link to elsewhere": (
        lambda f: (weight_files(f)[0].rename(f.parent / "x"), (f / "model-00001-of-00001").symlink_to(f.parent / "x")),
        "missing",
    ),
}


@pytest.mark.parametrize("kind", HARM)
def test_harm_has_its_words(kind: str, folder: Path) -> None:
    harm, words = HARM[kind]
    harm(folder)
    assert any(words in problem.what for problem in verify(folder).problems)


def test_a_plain_tensor_that_is_lost_is_missed(folder: Path) -> None:
    """The manifest does not know it; the checksums do."""
    path = next(path for path in weight_files(folder) if "model.norm.weight" in read_header(path).tensors)
    rewrite(path, lambda tensors: tensors.pop("model.norm.weight"))
    assert "was saved" in "".join(wrong(verify(folder)).values())


SUMS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another version": (lambda c: c.update(version=2), "version"),
    "another algorithm": (lambda c: c.update(algorithm="md5"), "sha256"),
    "no tensors": (lambda c: c.pop("tensors"), "sha256"),
    "a sum that is none": (lambda c: c["tensors"].update(x="0" * 63), "'x'"),
    "a sum that is a number": (lambda c: c["tensors"].update(x=0), "'x'"),
}


@pytest.mark.parametrize("kind", SUMS)
def test_checksums_that_are_none(kind: str, folders: Folders, tmp_path: Path) -> None:
    folder, (change, words) = streamed(folders, tmp_path / "q"), SUMS[kind]
    edit_json(folder / FILE, change)
    with pytest.raises(ChecksumError, match=words):
        read_checksums(folder, manifest(folder))
    assert words in wrong(verify(folder))["checksums"]


def test_checksums_that_are_promised_and_missing(folders: Folders, tmp_path: Path) -> None:
    folder = streamed(folders, tmp_path / "q")
    (folder / FILE).unlink()
    assert "cannot be read" in wrong(verify(folder))["checksums"]


# ---------------------------------------------------------------------------------- values

SCHEMES = {
    "int4": "int4-g8-asym",
    "int3": "int3-g16-s8",
    "float8": "float8",
    "float8-2x4": "f8-float8-2x4",
    "mxfp4": "mxfp4",
    "mxfp8-e5m2": "mxfp8-e5m2",
    "nvfp4": "nvfp4",
    "nf4": "nf4",
    "nf4-single": "nf4-single",
}


def put(component: str, value: float | int) -> Callable[[dict[str, Tensor]], object]:
    """Sets the last value of a component."""
    key = WEIGHT + (component and f"_{component}")
    return lambda tensors: tensors[key].view(-1).__setitem__(-1, value)


VALUES = [
    ("int3", "", 0x80, "stray"),
    ("int4", "zero_point", 0xFF, "stray"),
    ("int4", "scale", float("nan"), "not finite"),
    ("int4", "scale", float("inf"), "not finite"),
    ("int3", "scale", -128, "-128"),
    ("int3", "row_scale", float("nan"), "positive"),
    ("int3", "row_scale", 0.0, "positive"),
    ("float8", "", 0x7F, "no finite number"),
    ("float8", "scale", float("-inf"), "not finite"),
    ("float8-2x4", "", 0x7F, "no finite number"),
    ("mxfp8-e5m2", "", 0x7C, "no finite number"),
    ("mxfp4", "scale", 255, "not finite"),
    ("nvfp4", "scale", 0x7F, "not finite"),
    ("nvfp4", "scale", 0x81, "below zero"),
    ("nvfp4", "tensor_scale", float("inf"), "positive"),
    ("nf4", "row_scale", -1.0, "positive"),
    ("nf4-single", "scale", float("nan"), "not finite"),
]


@pytest.fixture(scope="module")
def formats(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint in each scheme, its rows of a length that fills no byte."""
    place = tmp_path_factory.mktemp("formats")
    found = {}
    for name, scheme in SCHEMES.items():
        torch.manual_seed(0)
        sizes = dict(hidden_size=20, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1)
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(LlamaConfig(vocab_size=24, num_hidden_layers=1, **sizes))
        llmquant.quantize_(model, {WEIGHT: scheme})
        model.save_pretrained(place / name)
        assert verify(place / name).ok
        found[name] = place / name
    return found


@pytest.mark.parametrize(("scheme", "component", "value", "words"), VALUES)
def test_values_that_no_writer_stores(
    scheme: str, component: str, value: Any, words: str, formats: dict[str, Path], tmp_path: Path
) -> None:
    """Also where a checksum vouches for them: another writer may have made both."""
    folder = copy(formats[scheme], tmp_path / "q")
    edit_json(folder / "config.json", lambda c: c["quantization_config"].pop("checksums"))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    put(component, value)(tensors)
    save_file(tensors, path, metadata=shard_metadata(manifest(folder)))
    found = wrong(verify(folder))
    assert list(found) == [WEIGHT + (component and f"_{component}")]
    assert words in next(iter(found.values())).replace("stand for no code", "stray")


# ---------------------------------------------------------------------------------- what cannot be looked at


def test_what_is_no_model_is_an_error(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        verify(tmp_path / "nowhere")
    with pytest.raises(ModelNotFoundError):
        verify(tmp_path)
    with pytest.raises(PickleError):
        verify(to_bin(folders("llama"), tmp_path / "bin"))
    folder = copy(folders.quantized("llama"), tmp_path / "m")
    edit_json(folder / "config.json", lambda c: c.update(num_hidden_layers=10**9))
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        verify(folder)


def test_memory_stays_small(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.zeros(64, 2**20, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    tracemalloc.start()
    report = verify(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.bytes == 2**26 and peak < 2**24


# ---------------------------------------------------------------------------------- the command


def call(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", *arguments])
    if isinstance(result.exception, LlmQuantError):
        return result.exception.status, str(result.exception)
    return result.exit_code, result.stdout


def test_exit_status_and_words(folder: Path, folders: Folders, tmp_path: Path) -> None:
    assert call(str(folder))[0] == 0 and "right: " in call(str(folder))[1]
    status, text = call(str(folders("llama")))
    assert status == 3 and "unverifiable" in text and "no checksum: lm_head.weight" in text
    path = weight_files(folder)[0]
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    status, text = call(str(folder))
    assert status == 1 and "sha256" in text and "1 problems" in text
    assert call(str(tmp_path / "nowhere"))[0] == 2


def test_json(folder: Path, tmp_path: Path) -> None:
    assert call(str(folder), "--json", str(tmp_path / "report.json"))[0] == 0
    found = json.loads((tmp_path / "report.json").read_text())
    report = verify(folder).to_dict()
    assert {**found, "seconds": 0} == {**report, "seconds": 0} and found["status"] == "right"
