import time
from pathlib import Path

import pytest
import torch
from torch import nn

from llmquant.measure import memory
from llmquant.measure.memory import (
    Footprint,
    RssAnonSampler,
    WeightCounts,
    disk_bytes,
    footprint,
    peak_rss,
    rss_anon,
    weight_bytes,
    weight_counts,
)

from .conftest import MakeModel

MB = 1 << 20
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")


class Packed(torch.Tensor):
    """A stand-in for a quantized weight: fp32 to look at, 4 bits per weight in `qdata`."""

    qdata: torch.Tensor

    @staticmethod
    def __new__(cls, qdata: torch.Tensor, shape: tuple[int, int]) -> "Packed":
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)

    def __init__(self, qdata: torch.Tensor, shape: tuple[int, int]) -> None:
        self.qdata = qdata

    @property
    def nbytes(self) -> int:
        return self.qdata.nbytes

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func is torch.ops.aten.detach.default, func
        return Packed(args[0].qdata, tuple(args[0].shape))


def packed_parameter(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(Packed(torch.zeros(rows * columns // 2, dtype=torch.uint8), (rows, columns)), False)


def holder(*parameters: nn.Parameter) -> nn.Module:
    module = nn.Module()
    for index, parameter in enumerate(parameters):
        module.register_parameter(f"p{index}", parameter)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_count_once(make_model: MakeModel, dtype: torch.dtype) -> None:
    tied, untied = (make_model(1, dtype, tie_word_embeddings=tie) for tie in (True, False))
    head = tied.lm_head.weight
    assert weight_bytes(untied) - weight_bytes(tied) == head.nbytes
    assert weight_counts(untied).elements - weight_counts(tied).elements == head.numel()
    assert weight_counts(tied).bits_per_weight == weight_counts(untied).bits_per_weight == 8 * dtype.itemsize


def test_weights_tied_by_storage_count_once_but_parts_of_one_storage_both_count() -> None:
    data = torch.zeros(8, 4)
    assert weight_bytes(holder(nn.Parameter(data), nn.Parameter(data))) == data.nbytes
    assert weight_bytes(holder(nn.Parameter(data[:4]), nn.Parameter(data[4:]))) == data.nbytes


@pytest.mark.parametrize("tie", [True, False])
def test_embeddings_and_the_head_are_left_out_by_what_they_are(make_model: MakeModel, tie: bool) -> None:
    """All in 32 bits but these, which are in 16: only what is counted with them shows that."""
    model = make_model(1, tie_word_embeddings=tie)
    model.model.embed_tokens.half()
    model.lm_head.half()
    counts, table = weight_counts(model), model.lm_head.weight
    assert counts.embedding_elements == table.numel() * (1 if tie else 2)
    assert counts.embedding_bytes == table.nbytes * (1 if tie else 2)
    assert counts.bits_per_weight_without_embeddings == 32
    assert 16 < float(counts.bits_per_weight or 0) < 32


def test_buffers_are_bytes_but_not_weights() -> None:
    module = nn.Linear(4, 2, bias=False)
    module.register_buffer("cache", torch.zeros(100))
    assert weight_bytes(module) == 32 + 400
    assert weight_counts(module) == WeightCounts(8, 32, 0, 0, 0, 0)


def test_weights_without_memory_are_told_apart() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    assert weight_bytes(model) == 2 * 64


def test_quantized_weights_count_at_their_packed_size() -> None:
    model = holder(packed_parameter(8, 16), packed_parameter(4, 16), nn.Parameter(torch.zeros(64)))
    counts = weight_counts(model)
    assert counts == WeightCounts(256, 64 + 32 + 256, 192, 96, 0, 0)
    assert counts.bits_per_quantized_weight == 4.0 and counts.bits_per_weight == 11.0
    assert weight_bytes(model) == counts.bytes


def test_tied_quantized_weights_count_once() -> None:
    parameter = packed_parameter(8, 16)
    rewrapped = nn.Parameter(Packed(parameter.qdata, (8, 16)), False)
    assert weight_counts(holder(parameter, parameter, rewrapped)) == WeightCounts(128, 64, 128, 64, 0, 0)


def test_bits_of_nothing_are_unknown() -> None:
    counts = weight_counts(nn.Module())
    assert (counts.bits_per_weight, counts.bits_per_quantized_weight) == (None, None)


def test_disk_bytes_are_those_of_the_weight_files(tmp_path: Path) -> None:
    assert disk_bytes(tmp_path) is None and disk_bytes(tmp_path / "nowhere") is None
    (tmp_path / "config.json").write_bytes(b"x" * 1000)
    assert disk_bytes(tmp_path) is None
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 100)
    assert disk_bytes(tmp_path) == 100
    (tmp_path / "model-1.safetensors").write_bytes(b"x" * 10)
    (tmp_path / "model-2.safetensors").write_bytes(b"x")
    assert disk_bytes(str(tmp_path)) == 11


def test_a_footprint_gathers_all(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(1)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 10)
    result = footprint(model, tmp_path)
    assert result == Footprint(10, weight_bytes(model), result.peak_rss, 32.0, 32.0, None)
    assert footprint(model).disk is None


@needs_proc
def test_resident_memory_is_between_what_is_surely_used_and_what_a_machine_has() -> None:
    block = torch.ones(32 * MB, dtype=torch.uint8)
    now, peak = rss_anon(), peak_rss()
    assert now is not None and peak is not None
    assert block.nbytes < now <= peak < 1 << 45


@needs_proc
def test_the_sampler_sees_what_is_held_at_its_end() -> None:
    with RssAnonSampler() as sampler:
        block = torch.ones(64 * MB, dtype=torch.uint8)
    assert sampler.peak is not None and sampler.baseline is not None
    assert 0.9 * block.nbytes < sampler.peak - sampler.baseline < 2 * block.nbytes


@needs_proc
def test_the_sampler_sees_what_comes_and_goes() -> None:
    deadline = time.monotonic() + 20
    with RssAnonSampler(interval=0.0005) as sampler:
        assert sampler.baseline is not None and sampler.peak is not None
        block = torch.ones(64 * MB, dtype=torch.uint8)
        while sampler.peak - sampler.baseline < 50 * MB and time.monotonic() < deadline:
            pass
        del block
    assert not sampler._thread.is_alive()
    assert 50 * MB < sampler.peak - sampler.baseline < 128 * MB


def test_a_system_without_status_knows_nothing_and_fails_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(memory.Path, "read_text", refuse)
    with RssAnonSampler() as sampler:
        assert (peak_rss(), rss_anon()) == (None, None)
    assert (sampler.baseline, sampler.peak) == (None, None)


def test_sizes_are_read_in_kilobytes(monkeypatch: pytest.MonkeyPatch) -> None:
    status = "Name:\tpython\nVmHWM:\t    2048 kB\nRssAnon:\t       1 kB\n"
    monkeypatch.setattr(memory.Path, "read_text", lambda path: status)
    assert (peak_rss(), rss_anon()) == (2 * MB, 1024)
