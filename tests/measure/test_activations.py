"""What `compare_activations` says of models whose difference is known."""

from __future__ import annotations

import math

import pytest
import torch
from models import build, inputs, quantize, rtn
from torch import nn

from llmquant import compare_activations, compute_error, quantize_
from llmquant.errors import LlmQuantError
from llmquant.measure.activations import ActivationReport, LayerError


def test_a_model_does_not_differ_from_itself() -> None:
    model = build("llama")
    report = compare_activations(model, model, inputs(model))
    assert report.rows and all(row.sqnr == math.inf and row.mean_abs_difference == 0 for row in report.rows)
    assert report.first_jump() is None and not report.unmatched and report.tokens == 24
    assert not any(module._forward_hooks for module in model.modules())


class Chain(nn.Module):
    """Blocks of two linears each."""

    def __init__(self) -> None:
        super().__init__()
        make = lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))  # noqa: E731
        self.blocks = nn.ModuleList(make() for _ in range(5))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = nn.functional.one_hot(input_ids, 8).float()
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("size", [1e-3, 0.1])
def test_the_block_where_the_error_begins_is_named(size: float) -> None:
    plain, other = Chain(), Chain()
    other.load_state_dict(plain.state_dict())
    with torch.no_grad():
        other.blocks[0][0].weight[0, 0] += 1e-5  # an error before, which is none to speak of
        other.blocks[3][1].weight += size
    ids = torch.arange(8)[None]
    report = compare_activations(plain, other, ids)
    jump = report.first_jump()
    assert jump is not None and jump.name == "blocks.3"
    by_name = {row.name: row for row in report.rows}
    seen: dict[str, torch.Tensor] = {}
    for model, key in ((plain, "x"), (other, "y")):
        model.blocks[3].register_forward_hook(lambda m, a, out, key=key: seen.update({key: out.detach()}))
        model(ids)
    x, y = seen["x"], seen["y"]
    assert by_name["blocks.3"].sqnr == pytest.approx(float(compute_error(x, y)), abs=0.01)
    assert by_name["blocks.3"].mean_abs_difference == pytest.approx(float((x - y).abs().mean()), rel=1e-5)
    assert by_name["blocks.3"].mean_abs == pytest.approx(float(x.abs().mean()), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt-oss", "t5", "mamba"])
def test_every_quantized_module_has_a_row_or_is_named(family: str) -> None:
    plain, other = build(family), build(family)
    quantized = quantize(other, rtn("int4-g32")).quantized
    report = compare_activations(plain, other, inputs(plain))
    owners = {name.rpartition(".")[0] for name in quantized}
    rows = {row.name for row in report.rows if row.kind == "quantized"}
    assert rows | set(report.unmatched) == owners
    assert {name.rpartition(".")[2] for name in report.unmatched} == ({"dt_proj"} if family == "mamba" else set())
    assert all(row.sqnr < 60 for row in report.rows if row.kind == "quantized" and row.mean_abs)
    assert any(row.kind == "block" for row in report.rows)


def test_more_bits_are_nearer_everywhere() -> None:
    plain = build("llama")

    def report_of(scheme: str) -> dict[str, float]:
        other = build("llama")
        quantize_(other, rtn(scheme))
        return {row.name: row.sqnr for row in compare_activations(plain, other, inputs(plain)).rows if row.sqnr < 999}

    few, many = report_of("int4-g32"), report_of("int8")
    assert few and all(many[name] - few[name] > 15 for name in few)  # four bits are 24 dB


def test_outputs_that_are_not_finite_are_refused_by_name() -> None:
    model, other = build("llama"), build("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(LlmQuantError, match=r"not finite(.|\n)*layers.0"):
        compare_activations(model, other, inputs(model))


def test_models_without_a_common_layer_are_refused() -> None:
    with pytest.raises(LlmQuantError, match="no layer in common"):
        compare_activations(Chain(), build("llama"), torch.arange(8)[None])


@pytest.mark.parametrize(
    ("sqnr", "decibels", "name"),
    [
        ([30, 25, 20, 13, 2], 6, "3"),
        ([30, 25, 20, 13, 2], 8, "4"),
        ([30, 25, 20, 13, 2], 12, None),
        ([30, 10, 28, 9], 6, "1"),
        ([math.inf, 5, 4], 6, None),  # what goes before has no error to compare with
    ],
)
def test_a_jump_is_a_fall_below_all_before(sqnr: list[float], decibels: float, name: str | None) -> None:
    rows = tuple(LayerError(str(i), "block", value, 0.0, 1.0) for i, value in enumerate(sqnr))
    found = ActivationReport(rows, 1, ()).first_jump(decibels)
    assert (found.name if found else None) == name
