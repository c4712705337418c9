"""Errors by module name: what is quantized shows, what is not does not, and a broken layer stands out."""

from __future__ import annotations

import math

import pytest
import torch
from handmade import converted, exported
from torch import Tensor, nn

from llmquant.errors import GraphMismatchError
from llmquant.primitives.metrics import compute_error
from llmquant.pt2e import _ops
from llmquant.pt2e.compare import compare
from llmquant.pt2e.lowering import lower


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](x))


def test_errors_by_name_in_the_order_of_execution() -> None:
    model, x = Two(), torch.randn(8, 32)
    float_graph, m = exported(model, x), converted(model, x)
    errors = {error.name: error.sqnr for error in compare(float_graph, m, x)}
    order = [f"blocks.{at}.{name}" for at in (0, 1) for name in ("norm", "up", "down")]
    assert [name for name in errors if name in order] == order and {"blocks.0", "blocks.1"} <= set(errors)
    assert math.isinf(errors["blocks.0.norm"])  # nothing before it is quantized
    assert 25 < errors["blocks.0.up"] < 60 and 25 < errors["blocks.1.norm"] < 60
    assert errors["output"] == pytest.approx(float(compute_error(model(x), m(x)).detach()))


def test_a_broken_layer_stands_out() -> None:
    model, x = Two(), torch.randn(8, 32)
    m = converted(model, x)
    codes = [node for node in m.graph.nodes if node.target is _ops.dequantize_per_channel][2].args[0]
    m.get_buffer(str(codes.target)).zero_()
    errors = {error.name: error.sqnr for error in compare(exported(model, x), m, x)}
    assert errors["blocks.1.up"] < 10 < 25 < errors["blocks.0.down"]


@pytest.mark.skipif(not (_ops.has_onednn() and _ops.has_vnni()), reason="needs oneDNN and VNNI")
def test_lowered_graphs_can_be_compared_too() -> None:
    model, x = Two(), torch.randn(8, 32)
    lowered, _ = lower(converted(model, x))
    names = {error.name: error.sqnr for error in compare(exported(model, x), lowered, x)}
    assert 25 < names["blocks.1.down"] < 60


def test_a_graph_with_itself() -> None:
    m = exported(Two(), torch.randn(8, 32))
    assert all(math.isinf(error.sqnr) for error in compare(m, m, torch.randn(8, 32)))


def test_graphs_of_other_models_are_refused() -> None:
    x = torch.randn(8, 32)
    with pytest.raises(GraphMismatchError, match="no module in common"):
        compare(exported(Two(), x), exported(nn.Sequential(nn.Linear(32, 32)), x), x)
    with pytest.raises(GraphMismatchError, match="try"):
        compare(exported(nn.Sequential(nn.Linear(32, 8)), x), exported(nn.Sequential(nn.Linear(32, 32)), x), x)
