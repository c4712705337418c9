"""Sensitivity: the score of one quantized product is that of a graph in which nothing else is; skip lists hold."""

from __future__ import annotations

import itertools

import pytest
import torch
from handmade import converted, exported
from test_pt2e_compare import Two
from torch import Tensor, fx, nn

from llmquant.errors import BudgetError, GraphMismatchError
from llmquant.primitives.metrics import compute_error
from llmquant.pt2e.patterns import named_products
from llmquant.pt2e.sensitivity import sensitivity, skip_list


def sqnr(wanted: Tensor, found: Tensor) -> float:
    return float(compute_error(wanted, found))


def with_floats(m: fx.GraphModule, reference: fx.GraphModule, names: set[str]) -> fx.GraphModule:
    """The converted graph with some products float again: what a quantizer that skips them gives."""
    weights = dict(reference.named_parameters())
    for name, node in named_products(m.graph):
        if name in names:
            x = node.args[0].args[0].args[0]
            with m.graph.inserting_before(node):
                setattr(m, f"float_{node.name}", weights[f"{name}.weight"])
                node.args = (x, m.graph.get_attr(f"float_{node.name}"), *node.args[2:])
    m.recompile()
    return m


@pytest.mark.parametrize("mode", ["static", "dynamic", "token"])
def test_the_score_of_a_product_is_that_of_a_graph_with_it_alone_quantized(mode: str) -> None:
    model, x = Two(), torch.randn(8, 32)
    reference = exported(model, x)
    scores = sensitivity(reference, converted(model, x, mode=mode), x)
    assert list(scores.values()) == sorted(scores.values()) and len(scores) == 4
    if mode == "static":
        for name in scores:
            alone = with_floats(converted(model, x), reference, set(scores) - {name})
            assert scores[name] == pytest.approx(sqnr(reference(x), alone(x)), abs=1e-3)


def test_the_layer_with_an_outlier_is_the_most_sensitive() -> None:
    model, x = Two(), torch.randn(8, 32)
    with torch.no_grad():
        model.blocks[1].norm.weight[3] = 100.0  # one large channel makes all other steps coarse
        model.blocks[1].up.weight[:, 3] = 0.0
    scores = sensitivity(exported(model, x), converted(model, x), x)
    names = list(scores)
    assert names[0] == "blocks.1.up" and scores[names[0]] < scores[names[1]] - 6


def test_a_skip_list_is_as_short_as_it_can_be_and_holds_in_a_graph_of_its_own() -> None:
    model, x = Two(), torch.randn(8, 32)
    reference, m = exported(model, x), converted(model, x)
    scores = sensitivity(reference, m, x)
    everything = sqnr(reference(x), m(x))
    assert skip_list(reference, m, x, target=everything - 1, scores=scores).names == []
    found = skip_list(reference, m, x, target=everything + 2, scores=scores)
    assert 0 < len(found.names) < 4 and found.quantized == 4 - len(found.names)
    assert found.names == list(itertools.islice(scores, len(found.names)))
    mixed = with_floats(converted(model, x), reference, set(found.names))
    assert found.score == pytest.approx(sqnr(reference(x), mixed(x)), abs=1e-3) and found.score >= everything + 2
    shorter = with_floats(converted(model, x), reference, set(found.names[:-1]))
    assert sqnr(reference(x), shorter(x)) < everything + 2


def test_a_metric_of_ones_own_and_a_target_that_nothing_reaches() -> None:
    model, x = Two(), torch.randn(8, 32)
    reference, m = exported(model, x), converted(model, x)

    def agreement(wanted: Tensor, found: Tensor) -> float:
        return float((wanted.argmax(-1) == found.argmax(-1)).float().mean())

    assert skip_list(reference, m, x, target=0.0, metric=agreement).quantized == 4
    with pytest.raises(BudgetError, match="no choice"):
        skip_list(reference, m, x, target=1.5, metric=agreement)


def test_graphs_that_do_not_belong_together_are_refused() -> None:
    x = torch.randn(8, 32)
    other = converted(nn.Sequential(nn.Linear(32, 32)), x)
    for reference, m in ((exported(Two(), x), other), (exported(Two(), x), exported(Two(), x))):
        with pytest.raises(GraphMismatchError):
            sensitivity(reference, m, x)
