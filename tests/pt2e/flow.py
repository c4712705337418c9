"""Small models and the way to a prepared or converted graph, for the tests of graph mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from llmquant.pt2e import X86Quantizer, convert_pt2e, prepare_pt2e


class Attention(nn.Module):
    """Three linears that read one tensor, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.out = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class Images(nn.Module):
    """Convolutions with batch norms, and a linear."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.other = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.other(self.second(x)))
        return self.head(self.drop(x.mean((2, 3))))


def attention() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Attention().eval(), torch.randn(2, 5, 32)


def images(**options: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Images(**options).eval()
    for norm in (model.norm, model.other):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return model, torch.randn(2, 3, 8, 8)


def exported(model: nn.Module, *inputs: Any) -> fx.GraphModule:
    with torch.no_grad():
        return torch.export.export(model, inputs).module()


def prepared(model: nn.Module, x: Any, quantizer: Any = None) -> fx.GraphModule:
    graph = prepare_pt2e(exported(model, x), quantizer or X86Quantizer())
    with torch.no_grad():
        graph(x)
    return graph


def converted(model: nn.Module, x: Any, quantizer: Any = None) -> fx.GraphModule:
    return convert_pt2e(prepared(model, x, quantizer))


def sqnr(wanted: Tensor, found: Tensor) -> float:
    return float(10 * torch.log10(wanted.square().sum() / (wanted - found).square().sum()))


def targets(graph: fx.GraphModule) -> list[Any]:
    return [node.target for node in graph.graph.nodes]
