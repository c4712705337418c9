"""docs/format.md says enough: a reader written from it alone, and its worked example, agree with the library."""

from __future__ import annotations

import ast
import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy_reader
import pytest
import torch
from cases import ALL_CASES, STATIC, Case, input_stats, make_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIGS, Folders, load, raw
from torch import Tensor

from llmquant.checkpoint.header import read_header
from llmquant.checkpoint.manifest import new_manifest, shard_metadata, verify
from llmquant.checkpoint.shards import write_shards
from llmquant.checkpoint.state import assemble, components, describe
from llmquant.config.base import WeightOnlyConfig
from llmquant.formats import FORMATS
from llmquant.primitives.granularity import MappingType, PerGroup
from llmquant.quantize import quantize_weight
from llmquant.tensor import QuantizedTensor

DOCUMENT = Path(__file__).parents[2] / "docs" / "format.md"
LAYOUTS = {
    "linear": ((7, 70), False),
    "conv1d": ((70, 7), True),
    "experts": ((3, 7, 70), False),
    "transposed-experts": ((3, 70, 7), True),
    "one": ((1, 1), False),
    "row": ((1, 257), False),
}


def write(folder: Path, weights: Mapping[str, QuantizedTensor], plain: Mapping[str, Tensor], shard: int) -> None:
    """A checkpoint of these weights."""
    folder.mkdir(exist_ok=True)
    manifest = new_manifest([], {fqn: describe(weight) for fqn, weight in weights.items()})
    units = [components(fqn, weight) for fqn, weight in weights.items()]
    write_shards(folder, [*units, plain], shard_metadata(manifest), shard)
    (folder / "config.json").write_text(json.dumps({"quantization_config": manifest}))


def assert_reads(folder: Path, wanted: Mapping[str, Tensor]) -> None:
    """The numpy reader finds exactly these values, bit for bit (a negative zero is not zero)."""
    found = numpy_reader.read(folder)
    assert sorted(found) == sorted(wanted)
    for fqn, values in found.items():
        assert values.dtype == np.float32 and values.shape == tuple(wanted[fqn].shape), fqn
        assert values.tobytes() == wanted[fqn].contiguous().numpy().tobytes(), fqn


def test_the_reader_knows_nothing_of_the_library() -> None:
    tree = ast.parse(Path(numpy_reader.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= {"json", "struct", "pathlib", "numpy"}


def test_the_reader_has_at_most_60_lines_of_code() -> None:
    lines = [line for line in Path(numpy_reader.__file__).read_text().splitlines() if line.strip()]
    assert len([line for line in lines if not line.strip().startswith(("#", '"""'))]) <= 60


@pytest.mark.parametrize("case", ALL_CASES + STATIC, ids=str)
def test_the_reader_reproduces_every_format_and_layout(case: Case, tmp_path: Path) -> None:
    weights = {
        name: quantize_weight(
            make_weight(shape, seed=i),
            case.config.with_algorithm("rtn"),
            input_stats(make_weight(shape)),
            transposed=transposed,
        )
        for i, (name, (shape, transposed)) in enumerate(LAYOUTS.items())
    }
    norm = torch.randn(70)
    plain = {"norm": norm, "half": norm.to(torch.bfloat16), "other": norm.half()}
    write(tmp_path, weights, plain, shard=300)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    wanted = {fqn: weight.dequantize(torch.float32) for fqn, weight in weights.items()}
    assert_reads(tmp_path, wanted | {fqn: tensor.float() for fqn, tensor in plain.items()})


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["int4-g32", "int7-row", "float8-row"])
def test_the_reader_reproduces_every_scale_dtype(scheme: str, scale_dtype: torch.dtype, tmp_path: Path) -> None:
    plain = Case(scheme).config
    config = WeightOnlyConfig(plain.format, plain.granularity, plain.mapping_type, scale_dtype)
    weight = quantize_weight(make_weight((5, 70)), config)
    assert weight.scale.dtype == scale_dtype
    write(tmp_path, {"w": weight}, {}, shard=10**6)
    assert_reads(tmp_path, {"w": weight.dequantize(torch.float32)})


@pytest.mark.parametrize("family", CONFIGS)
def test_the_reader_reads_a_model_that_transformers_saved(family: str, folders: Folders) -> None:
    folder = folders.quantized(family)
    model = load(folder)
    plain = {fqn: p for fqn, p in model.named_parameters(remove_duplicate=True)}
    wanted = {
        fqn: p.dequantize(torch.float32) if isinstance(p, QuantizedTensor) else p.detach() for fqn, p in plain.items()
    }
    assert_reads(folder, wanted)


@settings(max_examples=60)
@given(
    fmt=st.sampled_from([f for f in FORMATS.values() if f.asymmetric]),
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    group=st.integers(1, 80),
)
def test_bits_behind_the_last_code_are_zero_and_the_order_is_that_of_the_columns(
    fmt: object, rows: int, columns: int, group: int
) -> None:
    row = FORMATS[fmt.name]  # type: ignore[attr-defined]
    config = WeightOnlyConfig(row.name, PerGroup(group), MappingType.ASYMMETRIC, algorithm="rtn")
    weight = quantize_weight(make_weight((rows, columns)), config)
    tensors = components("w", weight)
    assert tensors["w"].shape == (rows, -(-columns * row.bits // 8), 1)
    blocks = -(-columns // min(group, columns))
    for packed, length in ((tensors["w"][..., 0], columns), (tensors["w_zero_point"], blocks)):
        stream = np.unpackbits(packed.numpy(), axis=-1, bitorder="little")
        assert not stream[:, length * row.bits :].any()
    codes = numpy_reader.read_codes(tensors["w"][..., 0].numpy(), row.bits, columns)
    whole = numpy_reader.read_codes(weight[:, : min(group, columns)].qdata.numpy(), row.bits, min(group, columns))
    assert (codes[:, : min(group, columns)] == whole).all()


def test_the_readers_float8_is_torchs_for_every_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    for dtype, exponent_bits in ((torch.float8_e4m3fn, 4), (torch.float8_e5m2, 5)):
        wanted = codes.view(dtype).double()
        finite = wanted.isfinite()
        found = torch.from_numpy(numpy_reader.read_float(codes.long().numpy(), exponent_bits, 7 - exponent_bits))
        assert raw(found[finite]) == raw(wanted[finite])


# ---------------------------------------------------------------------------------- the worked example


def example(folder: Path) -> Tensor:
    """The folder that section 7 of the document spells out, and the values it promises."""
    text = DOCUMENT.read_text()
    config, header, values = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.S))
    (data,) = re.findall(r"```hex\n(.*?)```", text, re.S)
    head = json.dumps(header).encode()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes.fromhex(data))
    return torch.tensor(values)


def test_the_documents_example_is_true(tmp_path: Path) -> None:
    wanted = example(tmp_path)
    manifest = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    verify(manifest, [tmp_path / "model.safetensors"])
    assert (torch.from_numpy(numpy_reader.read(tmp_path)["w"]) == wanted).all()


def test_the_documents_example_is_what_the_library_reads(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    wanted = example(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["weights"]["w"]
    weight = assemble("w", entry, load_file(tmp_path / "model.safetensors"), torch.float32)
    assert torch.equal(weight.dequantize(), wanted)
    assert describe(weight) == entry
    assert read_header(tmp_path / "model.safetensors").tensors["w"] == (torch.uint8, (2, 2, 1))


def test_the_document_names_every_format() -> None:
    text = DOCUMENT.read_text()
    for row in FORMATS.values():
        assert f"`{row.name}`" in text or (row.name.startswith("int") and "`int1` ... `int8`" in text), row.name
