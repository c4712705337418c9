"""2:4 sparsity: which weights are kept, what they become, and the weight in models and products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import make_weight
from hypothesis import given
from hypothesis import strategies as st
from models import Folders, load
from torch import Tensor

from llmquant.config.named import Float8DynamicActivationFloat8SemiSparseWeightConfig, Float8WeightOnlyConfig
from llmquant.errors import UnsupportedOpError
from llmquant.kernels import cpu
from llmquant.primitives.dynamic import fake_quantize
from llmquant.primitives.metrics import compute_error
from llmquant.primitives.semisparse import prune
from llmquant.quantize import quantize_, quantize_weight
from llmquant.tensor import QuantizedTensor

CONFIG = Float8DynamicActivationFloat8SemiSparseWeightConfig()


def kept_by_sorting(row: list[float]) -> list[float]:
    """The two of largest magnitude in each four, by Python's own sort; of equals the first."""
    found = [0.0] * len(row)
    for start in range(0, len(row), 4):
        columns = range(start, min(start + 4, len(row)))
        for column in sorted(columns, key=lambda i: (-abs(row[i]), i))[:2]:
            found[column] = row[column]
    return found


def fours(matrix: Tensor) -> Tensor:
    return F.pad(matrix, (0, -matrix.shape[-1] % 4)).unflatten(-1, (-1, 4))


@given(st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -3.0, 2.0**-100]), min_size=1, max_size=23))
def test_the_two_largest_of_each_four_are_kept(row: list[float]) -> None:
    assert prune(torch.tensor([row])).tolist() == [kept_by_sorting(row)]


@pytest.mark.parametrize("shape", [(64, 256), (7, 70), (3, 33), (1, 1), (5, 4)])
def test_what_is_kept_is_the_dense_format(shape: tuple[int, int]) -> None:
    """Same scales as without pruning, the same codes, and zeros at the other places."""
    plain = make_weight(shape)
    weight, dense = (quantize_weight(plain, config) for config in (CONFIG, Float8WeightOnlyConfig()))
    kept = prune(plain) != 0
    assert torch.equal(weight.scale, dense.scale)
    assert torch.equal(weight.dequantize(), torch.where(kept, dense.dequantize(), 0.0))
    counts = fours(kept).sum(-1)
    assert counts.max() <= 2 and torch.equal(counts, fours(torch.ones(shape)).sum(-1).clamp(max=2).long())
    assert (fours(weight.dequantize()) != 0).sum(-1).max() <= 2


def test_signal_and_bytes() -> None:
    """On normal weights the smaller half of each four is 13.2 % of the energy: 8.8 dB. Two-sided."""
    plain = make_weight((256, 2048))
    weight = quantize_weight(plain, CONFIG)
    assert 8.7 < float(compute_error(plain, weight.dequantize())) < 8.9
    assert weight.nbytes == 256 * (1024 + 256 + 4)


def test_a_zeroed_four_and_minus_zero() -> None:
    plain = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, -1e-9, 0.0, 0.0]])
    found = quantize_weight(plain, CONFIG).dequantize()
    assert torch.equal(found, torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, -0.0, 0.0, 0.0]]))
    assert found.signbit().tolist() == [[False] * 5 + [True, False, False]]


def test_products_are_those_of_the_unpacked_weight_and_rounded_inputs() -> None:
    weight = quantize_weight(make_weight((24, 72)), CONFIG)
    x = make_weight((5, 72), seed=1)
    assert weight.meta.activation is not None
    expected = fake_quantize(x, weight.meta.activation) @ weight.dequantize().T
    torch.testing.assert_close(F.linear(x, weight), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(x @ weight.dequantize().T, expected, rtol=1e-4, atol=1e-7)  # inputs were rounded


@pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))
def test_a_native_kernel_serves_it() -> None:
    kernel, reason = quantize_weight(make_weight((4, 8)), CONFIG).kernel()
    assert kernel in cpu.BACKENDS and "no native kernel" not in reason


# --- cutting and joining ------------------------------------------------------------------------------------------


def test_rows_and_columns_are_cut_exactly() -> None:
    weight = quantize_weight(make_weight((6, 70)), CONFIG)
    values = weight.dequantize()
    assert torch.equal(weight[2:5].dequantize(), values[2:5])
    for start, stop in ((8, 40), (0, 4), (4, 12), (64, 70), (12, 37), (0, 70)):
        assert torch.equal(weight[:, start:stop].dequantize(), values[:, start:stop])
    assert weight[:, 8:40].qdata.data_ptr() == weight.qdata.data_ptr() + 5  # a view
    for size in (4, 8, 12):
        joined = torch.cat(weight[:, :48].split(size, 1), 1)
        assert torch.equal(joined.dequantize(), values[:, :48]) and torch.equal(joined.qdata, weight[:, :48].qdata)


@pytest.mark.parametrize("start", [1, 2, 3, 6])
def test_a_four_is_not_cut(start: int) -> None:
    weight = quantize_weight(make_weight((2, 16)), CONFIG)
    with pytest.raises(UnsupportedOpError, match=r"cuts 4 neighbours of float8-2x4(.|\n)*multiple of 4"):
        weight[:, start:]
    with pytest.raises(UnsupportedOpError, match="cat: 4 neighbours"):
        torch.cat([weight[:, :start], weight[:, :start]], 1)


# --- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["f8-float8-2x4", "nf4", "nf4-single"])
def test_a_model_goes_all_the_way(scheme: str, folders: Folders, tmp_path: Path) -> None:
    from llmquant.checkpoint.stream import quantize_checkpoint

    model = load(folders("llama-tied"))
    report = quantize_(model, scheme)
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = model(tokens).logits
    model.save_pretrained(tmp_path / "saved")
    quantize_checkpoint(folders("llama-tied"), tmp_path / "streamed", scheme)
    for folder in ("saved", "streamed"):
        loaded = load(tmp_path / folder)
        weights = {name: p for name, p in loaded.named_parameters() if isinstance(p, QuantizedTensor)}
        assert set(weights) >= set(report.quantized) and len(weights) > 10
        assert all(torch.equal(p, model.get_parameter(name)) for name, p in weights.items())
        with torch.no_grad():
            assert torch.equal(loaded(tokens).logits, expected)
