"""Native rounding of activations against aten's, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmquant.kernels import cpu
from llmquant.kernels.cpu import library
from llmquant.primitives import dynamic
from llmquant.primitives.dynamic import ALL_TOKENS, FLOAT8, Activation, StaticScale

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RULES = ("floor", "ceil", "even", "rceil")
MX = ("mxfp4", "mxfp6-e2m3", "mxfp6-e3m2", "mxfp8", "mxfp8-e5m2")
ACTIVATIONS = [
    *(Activation(group, dtype=FLOAT8) for group in (0, ALL_TOKENS, 1, 7, 32, 300)),
    *(Activation(32, dtype=name, scale_rule=rule) for name in MX for rule in RULES),
    *(Activation(group, dtype="nvfp4") for group in (0, ALL_TOKENS)),
    Activation(ALL_TOKENS, dtype=FLOAT8, static=True),
]
STATIC = StaticScale(torch.tensor([[0.013]]))
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.scheme)


def assert_same(x: Tensor, activation: Activation) -> None:
    static = STATIC if activation.static else None
    found, wanted = cpu.fake_quantize(x, activation, static), dynamic.fake_quantize(x, activation, static)
    assert found.dtype == x.dtype and found.shape == x.shape and found.is_contiguous()
    bits = torch.int32 if x.dtype == torch.float32 else torch.int16
    same = (found.view(bits) == wanted.contiguous().view(bits)) | (found.isnan() & wanted.isnan())
    assert same.all(), (x[~same][:3], found[~same][:3], wanted[~same][:3])


@every_activation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ordinary_tokens(dtype: torch.dtype, activation: Activation) -> None:
    for shape in ((1, 200), (3, 5, 72), (33, 300), (200,), (0, 64), (2, 0), (70, 200)):
        assert_same((torch.randn(shape) * torch.logspace(-3, 3, shape[-1])).to(dtype), activation)
    assert_same(torch.randn(64, 30).to(dtype).t(), activation)


@every_activation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_sixteen_bits(dtype: torch.dtype, activation: Activation) -> None:
    """Among numbers of its own size, among those of every size, and infinities and NaN among others."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    shuffled = finite[torch.randperm(len(finite))]
    for row in (finite, shuffled, every, shuffled * torch.tensor(2.0**-6)):
        for columns in (32, 64, 1024):
            assert_same(row[: len(row) // columns * columns].view(-1, columns), activation)


@every_activation
def test_numbers_of_every_size(activation: Activation) -> None:
    """Float32 of random bits, subnormals and numbers that no scale reaches among them."""
    bits = torch.randint(-(2**31), 2**31 - 1, (2000, 64)).to(torch.int32)
    x = bits.view(torch.float32)
    assert_same(x, activation)
    x = torch.where(x.isfinite(), x, 0.0)
    assert_same(x, activation)
    assert_same(x.abs().clamp(max=1e-37).view(-1, 128), activation)
    assert_same(torch.randn(500, 64) * torch.logspace(-44, 38, 500)[:, None], activation)


@every_activation
def test_ties_and_edges_of_scales(activation: Activation) -> None:
    """Powers of two, their neighbours, and the middles between numbers of small floats."""
    powers = 2.0 ** torch.arange(-140, 127).float()
    steps = torch.arange(64) / 16
    x = powers[:, None] * steps
    assert_same(x, activation)
    assert_same(torch.nextafter(x, torch.tensor(torch.inf)), activation)
    assert_same(torch.nextafter(x, torch.tensor(-torch.inf)), activation)


@pytest.mark.parametrize("activation", [Activation(0, dtype=FLOAT8), Activation(ALL_TOKENS, dtype="nvfp4")], ids=str)
def test_the_number_of_threads_changes_nothing(activation: Activation) -> None:
    x, before, found = torch.randn(70, 300), torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(cpu.fake_quantize(x, activation))
    torch.set_num_threads(before)
    assert torch.equal(*found)


def test_without_the_library_aten_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    x, activation = torch.randn(3, 64), Activation(0, dtype=FLOAT8)
    found = cpu.fake_quantize(x, activation)
    monkeypatch.setattr(library, "load", lambda: None)
    assert torch.equal(cpu.fake_quantize(x, activation), found)
