"""Walking through a model block by block gives what running it at once gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import FAMILIES, VOCAB, Folders, load
from torch import Tensor, nn

from llmquant.calibrate.walk import Chain, find_blocks, walking

TEXT_MODELS = [name for name in FAMILIES if name != "t5"]


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(VOCAB, (1, 9 + i), generator=generator) for i in range(count)]


def last_hidden(model: nn.Module, batch: Any) -> list[Tensor]:
    """The logits, by a hook, however the batch is written."""
    seen: list[Tensor] = []
    with model.register_forward_hook(lambda _, __, output: seen.append(output[0])):
        model(**batch) if isinstance(batch, dict) else model(batch)
    return seen


def walk(model: nn.Module, found: list[Any]) -> list[Tensor]:
    """Logits of batches that went block by block."""
    seen: list[Tensor] = []
    with walking(model):
        chain = Chain(model, find_blocks(model, found[0]), found)
        for _ in chain.blocks:
            assert len(list(chain.advance())) == len(found)
        with model.register_forward_hook(lambda _, __, output: seen.append(output[0])):
            assert len(list(chain.finish())) == len(found)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_those_of_the_whole_model(family: str, folders: Folders) -> None:
    model = load(folders(family))
    found: list[Any] = batches()
    if family == "t5":
        found = [{"input_ids": ids, "decoder_input_ids": ids.flip(1)} for ids in found]
    with walking(model):
        wanted = [logits for batch in found for logits in last_hidden(model, batch)]
        blocks = find_blocks(model, found[0])
    assert len(blocks) >= 2 if family != "longcat" else blocks
    for logits, expected in zip(walk(model, found), wanted, strict=True):
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_each_block_is_called_with_what_the_model_calls_it_with(folders: Folders) -> None:
    """Gemma 3 has blocks of two kinds, with a mask and positions of their own."""
    model, found = load(folders("gemma3")), batches(2)
    with walking(model):
        blocks = find_blocks(model, found[0])
        assert [block.name for block in blocks] == ["model.layers.0", "model.layers.1"]
        chain = Chain(model, blocks, found)
        for block in blocks:
            met: list[Any] = []
            hook = block.module.register_forward_pre_hook(
                lambda _, args, kwargs, met=met: met.append((args, kwargs)), with_kwargs=True
            )
            for batch in found:
                model(batch)
            hook.remove()
            for call, (args, kwargs) in zip(chain.calls(), met, strict=True):
                torch.testing.assert_close((call.args, dict(call.kwargs)), (args, kwargs))
            list(chain.advance())


def test_a_changed_block_changes_what_the_next_one_meets(folders: Folders) -> None:
    model, found = load(folders("llama")), batches(1)
    with walking(model):
        chain = Chain(model, find_blocks(model, found[0]), found)
        before = next(chain.calls()).args[0]
        list(chain.advance())
        plain = next(chain.calls()).args[0]
        chain = Chain(model, chain.blocks, found)
        chain.blocks[0].module.mlp.down_proj.weight.data.zero_()
        list(chain.advance())
        changed = next(chain.calls()).args[0]
    assert not torch.equal(plain, changed) and not torch.equal(before, changed)


@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_as_it_was(broken: bool, folders: Folders) -> None:
    model, found = load(folders("mixtral")), batches(1)
    model.train()
    model.model.layers[0].eval()
    modes, experts = [m.training for m in model.modules()], model.get_experts_implementation()
    forwards = [vars(m).get("forward") for m in model.modules()]
    try:
        with walking(model):
            assert not any(m.training for m in model.modules()) and not model.config.use_cache
            chain = Chain(model, find_blocks(model, found[0]), found)
            list(chain.advance())
            calls = chain.calls()
            next(calls)
            if broken:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert [m.training for m in model.modules()] == modes and model.config.use_cache
    assert [vars(m).get("forward") for m in model.modules()] == forwards
    assert model.get_experts_implementation() == experts
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_model_without_lists_has_no_blocks() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert not find_blocks(model, torch.ones(1, 4))
    chain = Chain(model, [], [torch.ones(1, 4)])
    assert len(list(chain.finish())) == 1


def test_a_block_that_runs_twice_is_none() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](self.layers[2](self.layers[1](self.layers[0](x))))  # type: ignore[no-any-return]

    assert [b.name for b in find_blocks(Twice(), torch.ones(1, 4))] == ["layers.1", "layers.2"]
