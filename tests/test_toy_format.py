"""A new number format is one row and one numerics module: this one goes all the way without an edit to the library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import make_weight
from models import Folders, load

from llmquant.checkpoint.inspect import inspect_checkpoint
from llmquant.checkpoint.stream import quantize_checkpoint
from llmquant.config.base import WeightOnlyConfig
from llmquant.config.schemes import parse_scheme
from llmquant.formats import FORMATS, Format, register_format
from llmquant.primitives.granularity import PerGroup, PerRow
from llmquant.primitives.metrics import compute_error
from llmquant.quantize import quantize_, quantize_weight
from llmquant.tensor import QuantizedTensor


@pytest.fixture
def toy() -> Iterator[Format]:
    yield register_format(Format("toy4", 4, "scaled", "toy_numerics", granularities=("group", "row"), group_size=16))
    FORMATS.pop("toy4")


def test_scheme(toy: Format) -> None:
    assert parse_scheme("toy4") == WeightOnlyConfig("toy4", PerGroup(16))
    assert parse_scheme("toy4-row") == WeightOnlyConfig("toy4", PerRow())
    assert str(parse_scheme("toy4-g8")) == "toy4-g8"


@pytest.mark.parametrize("scheme", ["toy4", "toy4-row"])
def test_tensor(toy: Format, scheme: str) -> None:
    plain = make_weight((6, 70))
    weight = quantize_weight(plain, parse_scheme(scheme))
    assert weight.meta.format == "toy4" and weight.qdata.shape == (6, 35)
    # Nearest powers of two: the ratio is at most sqrt(2) for what is not rounded to zero.
    assert 9 < float(compute_error(plain, weight.dequantize())) < 20
    assert torch.equal(weight[2:5].dequantize(), weight.dequantize()[2:5])
    x = torch.randn(3, 70)
    torch.testing.assert_close(torch.nn.functional.linear(x, weight), x @ weight.dequantize().t())


def test_values_of_the_format_survive(toy: Format) -> None:
    plain = torch.tensor([[1.0, -0.5, 0.25, 0.0, -(2.0**-6), 1.0, 0.03125, -1.0]])
    assert torch.equal(quantize_weight(plain, parse_scheme("toy4")).dequantize(), plain)


def test_quantize_save_and_load(toy: Format, folders: Folders, tmp_path: Path) -> None:
    model = load(folders("llama-tied"))
    report = quantize_(model, "toy4")
    assert {w.scheme for w in report.quantized.values()} == {"toy4"} and len(report.quantized) > 10
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = model(tokens).logits
    assert expected.isfinite().all()
    model.save_pretrained(tmp_path / "saved")

    loaded = load(tmp_path / "saved")
    weights = {name: p for name, p in loaded.named_parameters() if isinstance(p, QuantizedTensor)}
    assert set(report.quantized) <= set(weights)
    assert {w.meta.format for w in weights.values()} == {"toy4"}
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, expected)


def test_inspect(toy: Format, folders: Folders, tmp_path: Path) -> None:
    report = quantize_checkpoint(folders("llama-tied"), tmp_path / "out", "toy4")
    rows = {row.fqn: row for row in inspect_checkpoint(tmp_path / "out").rows if row.quantized}
    assert set(rows) == set(report.quantized)
    for name, weight in report.quantized.items():
        assert (rows[name].format, rows[name].block, rows[name].bytes) == ("toy4", (1, 16), weight.bytes_after)
        assert rows[name].kernel and rows[name].reason


def test_it_is_gone_afterwards() -> None:
    assert "toy4" not in FORMATS
