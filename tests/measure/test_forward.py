"""Logits in blocks are those of the whole window."""

import math
from typing import Any

import pytest
import torch
from models import FAMILIES, build
from torch import Tensor, nn

from llmquant.measure import forward as module
from llmquant.measure.divergence import kl
from llmquant.measure.evaluate import evaluate
from llmquant.measure.forward import forward, inference, rows_in_block
from llmquant.measure.reference import Reference

from .conftest import VOCAB, Fixed, MakeModel

IDS = torch.randint(7, VOCAB, (40,), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 16 * 4 * VOCAB)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "t5"])
def test_every_family_gives_blocks_of_its_own_logits(family: str, small_blocks: None) -> None:
    """Soft caps and scales behind the head included. Products of other shapes round the last bit another way."""
    model = build(family)
    with inference(model), forward(model, IDS) as run:
        blocks = list(run.blocks)
        whole = model(IDS[None], use_cache=False).logits[0]
    assert (run.vocabulary, run.rows, [len(block) for block in blocks]) == (VOCAB, 16, [16, 16, 8])
    torch.testing.assert_close(torch.cat(blocks), whole, rtol=1e-5, atol=2e-6)


def test_the_backbone_runs_once_and_is_left_as_it_was(make_model: MakeModel, small_blocks: None) -> None:
    model, calls = make_model(1), []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with inference(model), forward(model, IDS) as run:
        assert len(list(run.blocks)) == 3
    assert calls == [1] and "forward" not in model.model.__dict__
    with pytest.raises(KeyError), inference(model), forward(model, IDS):
        raise KeyError
    assert "forward" not in model.model.__dict__ and len(model(IDS[None]).logits[0]) == 40


def test_a_forward_of_the_instances_own_is_put_back(make_model: MakeModel, small_blocks: None) -> None:
    """As accelerate leaves one on modules that it moves between devices."""
    model = make_model(1)
    own = model.model.forward = model.model.forward
    with inference(model), forward(model, IDS) as run:
        list(run.blocks)
    assert model.model.forward is own


class Deaf(nn.Module):
    """Has the option and does not listen to it, or has a backbone that it does not call."""

    def __init__(self, model: Any, listens: bool) -> None:
        super().__init__()
        self.inner, self.base_model, self.listens = [model], nn.Linear(1, 1), listens

    def forward(self, ids: Tensor, use_cache: bool, logits_to_keep: Any = 0) -> Any:
        return self.inner[0](ids, use_cache=False, logits_to_keep=logits_to_keep if self.listens else 0)


@pytest.mark.parametrize("listens", [True, False])
def test_a_model_that_cannot_give_some_rows_gives_all_and_says_so(
    make_model: MakeModel, small_blocks: None, listens: bool
) -> None:
    model = make_model(1).eval()
    with torch.inference_mode(), forward(Deaf(model, listens), IDS) as run:
        logits = torch.cat(list(run.blocks))
        assert run.rows == 40 and torch.equal(logits, model(IDS[None]).logits[0])
    with forward(Fixed(torch.zeros(VOCAB)), IDS) as run:
        assert run.rows == 40 and [len(block) for block in run.blocks] == [16, 16, 8]


def test_figures_of_blocks_are_those_of_whole_windows(
    make_model: MakeModel, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token's to the rounding of float32 products of other shapes; in the mean to 1e-6."""
    found = []
    for rows in (1 << 20, 16):
        monkeypatch.setattr(module, "BLOCK", rows * 4 * VOCAB)
        with Reference.compute(make_model(1), windows) as reference:
            found.append(evaluate(make_model(2), windows, reference))
    whole, blocks = found
    assert (whole.rows, blocks.rows) == (24, 16)
    assert blocks.kl and whole.kl and blocks.kl.mean == pytest.approx(whole.kl.mean, rel=1e-6)
    assert blocks.perplexity.value == pytest.approx(whole.perplexity.value, rel=1e-6)


@pytest.mark.parametrize("vocabulary", [7, 128, 32_000, 49_152, 262_144, 10**8])
def test_a_block_is_small_and_whole_tiles_of_rows(vocabulary: int) -> None:
    rows = rows_in_block(vocabulary)
    assert rows % 16 == 0 and (rows == 16 or rows * vocabulary * 4 <= module.BLOCK)
    assert math.isclose(rows * vocabulary * 4, module.BLOCK, rel_tol=0.2) or rows == 16 or vocabulary < 200


def test_each_module_gets_its_own_mode_back_even_after_an_exception() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout()))
    model.eval()
    model[1][0].train()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), inference(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before
    assert not torch.is_inference_mode_enabled()


def test_kl_of_blocks_needs_equal_rows() -> None:
    with pytest.raises(AssertionError):
        kl(torch.zeros(2, 3), torch.zeros(3, 3))
