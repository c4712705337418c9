"""Every reader of files that others wrote, with files to begin from: what fuzzing and mutations loop over.

A reader is a function of a folder in which one file is the hostile one. It may return, or raise an `LlmQuantError`; any
other exception, a hang or more memory than the file's size and 64 MB is a defect. Another module adds readers with
`register`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class Reader:
    """A reader of one kind of file.

    Attributes:
        name: of the reader, and of its folder in the corpus.
        file: what the hostile file is called.
        read: reads the folder that holds it.
        seeds: whole files to begin from.
        beside: makes what else the folder holds, once.
        words: what a mutation may put in: keys and values that the reader looks for.
    """

    name: str
    file: str
    read: Callable[[Path], object]
    seeds: Callable[[], list[bytes]]
    beside: Callable[[Path], object] = lambda folder: None
    words: tuple[bytes, ...] = ()


READERS: dict[str, Reader] = {}


def register(reader: Reader) -> Reader:
    """Adds a reader."""
    READERS[reader.name] = reader
    return reader


def run(reader: Reader, content: bytes, folder: Path) -> str:
    """Has a reader read a content; `read`, or the name of the error that it was refused with."""
    from llmquant.errors import LlmQuantError

    (folder / reader.file).write_bytes(content)
    try:
        reader.read(folder)
    except LlmQuantError as error:
        return type(error).__name__
    return "read"


def kept(reader: Reader) -> list[Path]:
    """The files of a reader's corpus."""
    return sorted((CORPUS / reader.name).glob("*"))


# ---------------------------------------------------------------------------------- files to begin from


@cache
def _quantized() -> dict[str, bytes]:
    """The files of a small checkpoint of ours, two shards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmquant import quantize_

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=24, num_hidden_layers=1, **sizes))
    schemes = {"re:.*q_proj.*": "int4-g8-asym", "re:.*up_proj.*": "mxfp4", "_default": "a8-int3-g16-s8"}
    quantize_(model, schemes)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size="3KB")
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _file(write: Callable[[Path], object]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "x")
        return (Path(folder) / "x").read_bytes()


def _headers() -> list[bytes]:
    small = {"a": torch.zeros(2, 3), "b": torch.zeros(1, dtype=torch.uint8), "c": torch.zeros(0, 4, dtype=torch.int64)}
    plain = _file(lambda path: save_file(small, path, metadata={"format": "pt", "k": '"\\'}))
    return [plain, _file(lambda path: save_file({}, path))]


def _jsons(*contents: Any) -> list[bytes]:
    return [json.dumps(content).encode() for content in contents]


_ENTRY = {"format": "int4", "bits": 4, "shape": [8, 32], "block": [1, 16], "transposed": False}
_ENTRY |= {"scale_dtype": "float16", "asymmetric": True}


def _manifests() -> list[bytes]:
    weights = {"a": _ENTRY, "b": _ENTRY | {"format": "nvfp4", "scale_dtype": "float8_e4m3fn", "asymmetric": False}}
    weights["c"] = _ENTRY | {"activation": {"dtype": "int8", "group": -1, "asymmetric": True, "static": True}}
    weights["d"] = _ENTRY | {"format": "float8-2x4", "block": [1, 32], "bits": 8, "asymmetric": False}
    manifest = {"quant_method": "llmquant", "format_version": 1, "save_id": "0" * 32, "config": [], "weights": weights}
    manifest["checksums"] = {"algorithm": "sha256", "tensors": {"a": "0" * 64}}
    whole = json.loads(_quantized()["config.json"])
    return _jsons({"model_type": "llama", "num_hidden_layers": 2, "quantization_config": manifest}, whole)


def _imatrices() -> list[bytes]:
    from llmquant import InputStats, save_imatrix

    stats = {"a.weight": InputStats(mean_square=torch.ones(4)), "b": InputStats(mean_square=torch.ones(2, 3))}
    return [_file(lambda path: save_imatrix(stats, path, {"text": "x"}))]


def _parts() -> list[bytes]:
    from llmquant import quantize_weight
    from llmquant.config.schemes import parse_scheme
    from llmquant.tune.journal import Part, write_part

    weights = {
        name: quantize_weight(torch.randn(4, 16, generator=torch.manual_seed(0)), parse_scheme(scheme))
        for name, scheme in {"a": "int4-g8", "b": "nvfp4", "c": "int3-g8-asym"}.items()
    }
    return [_file(lambda path: write_part(path, Part(weights, ["a warning"])))]


def _references() -> list[bytes]:
    from torch import nn

    from llmquant import Reference

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 7).to(torch.float16)

        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            return type("Output", (), {"logits": self.table(input_ids)})()

    def write(path: Path) -> None:
        Reference.compute(Toy(), torch.arange(10).reshape(2, 5) % 7, path=path).close()

    return [_file(write)]


# ---------------------------------------------------------------------------------- readers


def _header(folder: Path) -> None:
    from llmquant.checkpoint.header import read_header

    read_header(folder / "x.safetensors")


def _index(folder: Path) -> None:
    from llmquant.checkpoint.index import INDEX, read_index

    read_index(folder / INDEX)


def _manifest(folder: Path) -> None:
    from llmquant.checkpoint.checksums import read_checksums
    from llmquant.checkpoint.config_file import read_config
    from llmquant.checkpoint.manifest import digest, promises

    manifest = read_config(folder).get("quantization_config") or {}
    digest(manifest)
    promises(manifest)
    read_checksums(folder, manifest)


def _checksums(folder: Path) -> None:
    from llmquant.checkpoint.checksums import read_checksums

    read_checksums(folder, {})


def _recipe(folder: Path) -> None:
    from llmquant import load_recipe

    load_recipe(folder / "x.yaml")


def _study(folder: Path) -> None:
    from llmquant import load_study

    load_study(folder / "x.yaml")


def _imatrix(folder: Path) -> None:
    from llmquant import load_imatrix

    load_imatrix(folder / "x")


def _part(folder: Path) -> None:
    from llmquant.tune.journal import read_part

    read_part(folder / "x")


def _reference(folder: Path) -> None:
    from llmquant import Reference

    with Reference.open(folder / "x") as found:
        for index in range(min(len(found.windows), 3)):
            list(found.blocks(index))


def _results(folder: Path) -> None:
    from llmquant.report.read import read_rows

    read_rows(folder / "results.jsonl")


def _checkpoint(folder: Path) -> None:
    from llmquant.checkpoint.verify import verify
    from llmquant.errors import CheckpointError

    if verify(folder).problems:
        raise CheckpointError("something is wrong, and was named")


@cache
def _gptq() -> dict[str, bytes]:
    """The files of a small checkpoint as GPTQ writes them: 4 bits, groups of 16, zero points."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=24, num_hidden_layers=1, **sizes)).half()
    state, draw = dict(model.state_dict()), torch.Generator().manual_seed(0)

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, generator=draw).to(torch.int32)

    for name in [name for name in state if "_proj.weight" in name]:
        rows, columns = state.pop(name).shape
        module = name.removesuffix(".weight")
        state[f"{module}.qweight"], state[f"{module}.qzeros"] = (
            words(columns // 8, rows),
            words(columns // 16, rows // 8),
        )
        state[f"{module}.scales"] = torch.rand(columns // 16, rows, generator=draw).half()
        state[f"{module}.g_idx"] = torch.arange(columns, dtype=torch.int32) // 16
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": False}
    config = model.config.to_dict() | {"quantization_config": settings, "architectures": ["LlamaForCausalLM"]}
    return {
        "config.json": _jsons(config)[0],
        "model.safetensors": _file(lambda path: save_file(state, path, metadata={"format": "pt"})),
    }


def _import(folder: Path) -> None:
    from llmquant import import_checkpoint

    import_checkpoint(folder, folder / "out", overwrite=True)


def _lay_gptq(folder: Path) -> None:
    for name, content in _gptq().items():
        (folder / name).write_bytes(content)


def _lay_checkpoint(folder: Path) -> None:
    for name, content in _quantized().items():
        (folder / name).write_bytes(content)


def _recipes() -> list[bytes]:
    from llmquant.config.recipe import recipe_folder

    return [path.read_bytes() for path in sorted(recipe_folder().glob("*.yaml"))[:6]]


def _studies() -> list[bytes]:
    return [path.read_bytes() for path in sorted((Path(__file__).parents[1] / "studies").glob("*.yaml"))]


def _lines() -> list[bytes]:
    row = {"schema": 1, "kind": "candidate", "status": "done", "label": "int4", "model": "m", "text": "t"}
    return _jsons(row, row | {"status": "failed", "error": {"what": "x"}})


def _shards_beside(folder: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(b"")


_SHARD = "model-00001-of-00002.safetensors"
_KEYS = (
    b'"dtype"',
    b'"shape"',
    b'"data_offsets"',
    b'"__metadata__"',
    b"[0,0]",
    b'"F32"',
    b'"F4"',
    b'"U8"',
    b"{}",
    b"[]",
)
_FIELDS = tuple(f'"{key}"'.encode() for key in (*_ENTRY, "weights", "checksums", "activation", "tensors", "file"))
_YAML = (
    b"llmquant_recipe: 1\n",
    b"weights:\n",
    b"  _default: int4-g64\n",
    b"&a",
    b"*a",
    b"!!",
    b"<<: ",
    b"- ",
    b"? ",
    b"{",
    b"[",
)

register(Reader("header", "x.safetensors", _header, _headers, words=_KEYS))
register(
    Reader(
        "index",
        "model.safetensors.index.json",
        _index,
        lambda: _jsons({"metadata": {"total_size": 3}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}),
        _shards_beside,
        (b'"weight_map"', b'"total_size"', b"../", b"/", b"\\u0000"),
    )
)
register(Reader("manifest", "config.json", _manifest, _manifests, words=_FIELDS))
register(
    Reader(
        "checksums",
        "llmquant_checksums.json",
        _checksums,
        lambda: _jsons({"version": 1, "algorithm": "sha256", "tensors": {"a": "0" * 64}}),
        words=_FIELDS,
    )
)
register(Reader("recipe", "x.yaml", _recipe, _recipes, words=_YAML))
register(Reader("study", "x.yaml", _study, _studies, words=_YAML))
register(Reader("imatrix", "x", _imatrix, _imatrices, words=_KEYS))
register(Reader("journal", "x", _part, _parts, words=_KEYS + _FIELDS))
register(Reader("reference", "x", _reference, _references, words=_KEYS))
register(Reader("results", "results.jsonl", _results, _lines, words=(b'"schema"', b'"label"', b"\n", b"NaN")))
register(Reader("shard", _SHARD, _checkpoint, lambda: [_quantized()[_SHARD]], _lay_checkpoint, words=_KEYS))
register(
    Reader("config", "config.json", _checkpoint, lambda: [_quantized()["config.json"]], _lay_checkpoint, words=_FIELDS)
)
_GPTQ = (b'"bits"', b'"group_size"', b'"sym"', b'"desc_act"', b'"quant_method"', b'"awq"', b'"gptq_v2"', b'"fp8"')
register(Reader("gptq", "model.safetensors", _import, lambda: [_gptq()["model.safetensors"]], _lay_gptq, words=_KEYS))
register(Reader("foreign", "config.json", _import, lambda: [_gptq()["config.json"]], _lay_gptq, words=_GPTQ))
