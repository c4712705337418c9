"""Scales of quantized weights learn, on every backend, and no gradient of theirs is lost in silence."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import ONE_PER_FORMAT, Case, make_weight
from torch import Tensor, nn

from llmquant import quantize_
from llmquant.config.base import DynamicActivationConfig, QuantConfig, WeightOnlyConfig
from llmquant.errors import UnsupportedOpError
from llmquant.kernels import registry
from llmquant.primitives.granularity import PerGroup
from llmquant.tensor import QuantizedTensor

N, K = 6, 70
every_format = pytest.mark.parametrize("case", ONE_PER_FORMAT, ids=str)


def trainable(case: Case | str = "int4-g32-asym") -> QuantizedTensor:
    case = Case(case) if isinstance(case, str) else case
    weight = case.quantize(make_weight((N, K)) * 50)
    weight.scale = weight.scale.float().requires_grad_()
    return weight


def gradient(weight: QuantizedTensor, out: Tensor) -> Tensor:
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (found,) = torch.autograd.grad(out, weight.scale, seed)
    return found


@pytest.mark.parametrize("backend", [None, "reference"], ids=["chosen", "reference"])
@pytest.mark.parametrize("kind", [WeightOnlyConfig, DynamicActivationConfig])
def test_training_the_scales_of_a_model_brings_it_nearer_to_the_original(
    backend: str | None, kind: type[QuantConfig]
) -> None:
    """As a researcher writes it: see `QuantizedTensor`."""
    plain = nn.Sequential(nn.Embedding(32, 48), nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 24))
    ids = torch.randint(32, (64,))
    target = plain(ids).detach()
    model = copy.deepcopy(plain)
    config = kind("int2", PerGroup(16), scale_dtype=torch.float32)
    table = WeightOnlyConfig("int3", PerGroup(16), scale_dtype=torch.float32)
    quantize_(model, {"_default": config, "_embedding": table})
    quantized = [p for p in model.parameters() if isinstance(p, QuantizedTensor)]
    codes = [p.qdata.clone() for p in quantized]

    def run(steps: int) -> list[float]:
        scales = [p.scale.requires_grad_() for p in quantized]
        optimizer, losses = torch.optim.Adam(scales, lr=3e-3), []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.mse_loss(model(ids), target)
            loss.backward()
            assert all(scale.grad.abs().max() > 0 for scale in scales)
            optimizer.step()
            losses.append(float(loss.detach()))
        for scale in scales:
            scale.requires_grad_(False)
        return losses

    with registry.force(backend) if backend else nullcontext():
        losses = run(60)
    assert losses[-1] < 0.6 * losses[0] and losses[-1] > 0
    assert all(torch.equal(p.qdata, before) for p, before in zip(quantized, codes, strict=True))
    with torch.no_grad():  # the trained scales are what inference now computes with
        assert F.mse_loss(model(ids), target) < 0.6 * losses[0]
        assert not any(p.requires_grad for p in quantized)


@every_format
def test_linear_and_embedding_have_the_gradient_of_the_dequantized_weight(case: Case) -> None:
    weight = trainable(case)
    x, bias, indices = torch.randn(3, K), torch.randn(N), torch.tensor([[5, 0], [5, 2]])
    for found, dense in (
        (F.linear(x, weight, bias), F.linear(x, weight.dequantize(), bias)),
        (F.linear(x[:, :N], weight.t()), F.linear(x[:, :N], weight.dequantize().t())),
        (F.embedding(indices, weight), F.embedding(indices, weight.dequantize())),
    ):
        torch.testing.assert_close(gradient(weight, found), gradient(weight, dense), rtol=1e-4, atol=1e-4)


def test_padding_does_not_train() -> None:
    weight = trainable("int4-row")
    indices = torch.tensor([5, 0, 5, 2])
    for padding in (5, -1):
        found = gradient(weight, F.embedding(indices, weight, padding_idx=padding))
        dense = gradient(weight, F.embedding(indices, weight.dequantize(), padding_idx=5))
        torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-4)
        assert found[5] == 0 and found[0] != 0
    with pytest.raises(UnsupportedOpError, match="frequency"):
        F.embedding(indices, weight, scale_grad_by_freq=True)


@pytest.mark.parametrize("asks", ["toggled", "replaced by a view of its memory"])
def test_a_weight_that_was_used_before_learns_when_asked_to(asks: str) -> None:
    weight = trainable()
    weight.scale = weight.scale.detach()
    x = torch.randn(3, K)
    assert not F.linear(x, weight).requires_grad
    weight.scale = weight.scale.requires_grad_() if asks == "toggled" else nn.Parameter(weight.scale)
    assert F.linear(x, weight).requires_grad
    with torch.no_grad():
        assert not F.linear(x, weight).requires_grad
    weight.scale.requires_grad_(False)
    assert not F.linear(x, weight).requires_grad


LOSING: dict[str, Callable[[QuantizedTensor, Tensor], Any]] = {
    "@ w.t()": lambda w, x: x @ w.t(),
    "mm": lambda w, x: torch.mm(x, w.t()),
    "addmm": lambda w, x: torch.addmm(torch.zeros(N), x, w.t()),
    "mv": lambda w, x: torch.mv(w, x[0]),
    "rows": lambda w, x: w[:4],
    "picked rows": lambda w, x: w[[0, 2]],
    "cat": lambda w, x: torch.cat([w, w]),
    "clone": lambda w, x: w.clone(),
    "to": lambda w, x: w.to(torch.bfloat16),
    "aten.embedding": lambda w, x: torch.ops.aten.embedding(w, torch.tensor([0])),
    "compile": lambda w, x: torch.compile(lambda a: F.linear(a, w), backend="aot_eager")(x),
}


@pytest.mark.parametrize("name", LOSING)
def test_what_autograd_would_not_see_is_refused_and_done_where_no_gradient_is_wanted(name: str) -> None:
    weight, x = trainable(), torch.randn(3, K)
    with pytest.raises(UnsupportedOpError, match="lose the gradient"):
        LOSING[name](weight, x)
    with torch.no_grad():
        LOSING[name](weight, x)
    weight.scale.requires_grad_(False)
    LOSING[name](weight, x)


def test_a_stack_of_experts_says_that_it_cannot_be_trained() -> None:
    stack = Case("int4-g32").quantize(make_weight((3, N, K)))
    stack.scale.requires_grad_()
    with pytest.raises(UnsupportedOpError, match="lose the gradient"):
        F.linear(torch.randn(3, K), stack[1])


def test_detached_and_copied_weights() -> None:
    weight = trainable()
    assert not weight.detach().scale.requires_grad and weight.scale.requires_grad
    assert weight.detach().scale.data_ptr() == weight.scale.data_ptr()
    assert not nn.Parameter(weight, requires_grad=False).scale.requires_grad
    twin = copy.deepcopy(weight)
    assert twin.scale.requires_grad and twin.scale.is_leaf and torch.equal(twin, weight)
    assert twin.scale.data_ptr() != weight.scale.data_ptr()


def test_a_model_in_training_can_be_saved_and_moved() -> None:
    model = nn.Sequential(nn.Linear(K, N))
    quantize_(model, "int4-g32")
    model[0].weight.scale.requires_grad_()
    assert not model.state_dict()["0.weight"].scale.requires_grad
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer)["0.weight"], model[0].weight)
    x = torch.randn(3, K)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
