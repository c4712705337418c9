"""Fisher scores against what they estimate: the KL itself, and the exact second-order form on a model of one layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import build, rtn, tokens
from torch import Tensor, nn

from llmquant.errors import CalibrationError
from llmquant.quantize import make_plan
from llmquant.tune.bank import Bank
from llmquant.tune.fisher import fisher_scores
from llmquant.tune.scores import rank_correlation
from llmquant.tune.sensitivity import sensitivity

FAMILIES = ["llama-tied", "gpt2", "mixtral", "dbrx"]


class Head(nn.Module):
    """One-hot inputs and one linear: the Fisher information of its logits is known."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(8, 12, bias=False)
        self.idle = nn.Linear(8, 12, bias=False)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.lm_head(nn.functional.one_hot(input_ids, 8).float()))


def options_of(model: nn.Module, scheme: str) -> dict[Any, list[Any]]:
    plan = make_plan(model, rtn(scheme))
    return {candidate: [config] for candidate, config in plan.chosen}


def test_scores_approach_the_exact_diagonal_form() -> None:
    """E[(y_n - p_n)^2] = p_n (1 - p_n): a quarter million drawn labels come within two percent of it."""
    model = Head()
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
    bank = Bank(model)
    found = {c: k for c, k in options_of(model, "int3-row").items() if c.name == "lm_head.weight"}
    windows = torch.arange(8).repeat(64, 500)  # every token equally often
    ((candidate, config), score) = next(iter(fisher_scores(bank, found, windows).items()))
    error = bank.get(candidate, config).dequantize() - model.lm_head.weight.detach()  # [12, 8]
    p = model.lm_head.weight.detach().softmax(0)
    exact = float((p * (1 - p) * error.square()).sum(0).mean() / 2)
    assert score == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_follow_the_measured_kl(family: str) -> None:
    """Whatever the model writes its products with. Routers, which may jump, keep experts from a closer agreement."""
    model = build(family)
    ids = torch.randint(3, 128, (12, 24), generator=torch.Generator().manual_seed(1))
    both = {
        method: sensitivity(
            model, list(map(scheme_of, ("int3-g16", "int5-g16"))), ids, method=method, embeddings=True, cache=False
        )
        for method in ("fisher", "measured")
    }
    columns = [[o.score for g in scores.groups for o in g.options.values()] for scores in both.values()]
    assert rank_correlation(*columns) > 0.8
    total = [sum(column) for column in columns]
    assert 0.4 < total[0] / total[1] < 2.5


def scheme_of(text: str) -> Any:
    return dict(rtn(text).items())["_default"]


def test_the_model_is_as_it_was() -> None:
    model = build("llama")
    model.train()
    next(model.parameters()).requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad, id(p)) for name, p in model.named_parameters()}
    sensitivity(model, "int2-g32", tokens(), cache=False)
    assert model.training and all(module.training for module in model.modules())
    for name, p in model.named_parameters():
        value, flag, identity = before[name]
        assert torch.equal(p, value) and (p.requires_grad, id(p), p.grad) == (flag, identity, None)


def test_weights_that_no_token_met_are_refused_by_name() -> None:
    model = Head()
    with pytest.raises(CalibrationError, match=r"never used(.|\n)*idle.weight"):
        fisher_scores(Bank(model), options_of(model, "int4-g8"), torch.arange(8)[None])


def test_an_interrupted_run_leaves_nothing_behind() -> None:
    model = build("llama")

    def stop(done: int, total: int, item: str) -> None:
        if done == 1 and not item:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, "int4-g32", tokens(3), cache=False, progress=stop)
    assert all(p.requires_grad for p in model.parameters())
