"""Learned rounding of a block: better than where it starts, repeatable, and the block stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from models import VOCAB, Folders, load, raw
from torch import Tensor, nn
from torch.func import functional_call

from llmquant.algorithms import Codes
from llmquant.config.candidates import find_candidates
from llmquant.config.schemes import parse_scheme
from llmquant.primitives.stats import InputStats
from llmquant.quantize import quantize_weight
from llmquant.tune.signround import Learnable, learn_block

# A family for each way in which weights stand: as they are, transposed, in stacks of experts.
BLOCKS = {"llama": "model.layers.1", "gpt2": "transformer.h.1", "mixtral": "model.layers.1"}
every_family = pytest.mark.parametrize("family", BLOCKS)


class Reached(Exception):
    pass


class Work:
    """The last block of a tiny model, what it is called with and what it gives."""

    def __init__(self, folders: Folders, family: str, scheme: str = "int3-g24", dtype: Any = torch.float32) -> None:
        model = load(folders(family), dtype=dtype)
        self.block, prefix = model.get_submodule(BLOCKS[family]), BLOCKS[family] + "."
        self.config = parse_scheme(scheme)
        assert self.config is not None
        self.weights = {
            c.name.removeprefix(prefix): Learnable(c, self.config)
            for c in find_candidates(model).candidates
            if c.name.startswith(prefix)
        }
        self.inputs = [self.reach(model, torch.randint(3, VOCAB, (2, 32))) for _ in range(6)]
        self.targets = [self.output({}, call) for call in self.inputs]

    def reach(self, model: Any, ids: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
            found.append((args, dict(kwargs)))
            raise Reached

        found: list[Any] = []
        handle = self.block.register_forward_pre_hook(stop, with_kwargs=True)
        with torch.no_grad(), pytest.raises(Reached):
            model(ids, use_cache=False)
        handle.remove()
        return found[0]

    def learn(self, **options: Any) -> dict[str, list[Codes]]:
        return learn_block(self.block, self.weights, self.inputs, self.targets, **{"batch": 3, **options})

    @torch.no_grad()
    def output(self, values: dict[str, Tensor], call: tuple[Any, Any]) -> Tensor:
        found = functional_call(self.block, values, *call)
        return found if isinstance(found, Tensor) else found[0]

    def values(self, codes: Mapping[str, list[Codes]]) -> dict[str, Tensor]:
        """What the packed weights decode to."""
        return {name: self.packed(name, given).dequantize() for name, given in codes.items()}

    def packed(self, name: str, codes: list[Codes] | None) -> Any:
        candidate, weight = self.weights[name].candidate, self.block.get_parameter(name)
        assert self.config is not None
        return quantize_weight(
            weight, self.config, self.weights[name].stats, transposed=candidate.transposed, codes=codes
        )

    def error(self, codes: Mapping[str, list[Codes]]) -> float:
        """Mean squared error of the block's output."""
        values = self.values(codes)
        pairs = zip(self.inputs, self.targets, strict=True)
        return sum(float((self.output(values, call).float() - t.float()).square().mean()) for call, t in pairs)


@every_family
@pytest.mark.parametrize("scheme", ["int3-g24", "int4-g32-asym"])
def test_it_is_better_than_search(folders: Folders, family: str, scheme: str) -> None:
    work = Work(folders, family, scheme)
    start, found = (work.error(work.learn(steps=steps)) for steps in (0, 15))
    assert 0.1 * start < found < 0.8 * start


@every_family
def test_no_steps_give_what_search_packs(folders: Folders, family: str) -> None:
    work = Work(folders, family)
    for name, codes in work.learn(steps=0).items():
        learned, searched = work.packed(name, codes), work.packed(name, None)
        assert [raw(t) for _, t in learned.parts()] == [raw(t) for _, t in searched.parts()]


def test_search_starts_from_importance_where_it_is_known(folders: Folders) -> None:
    work = Work(folders, "llama")
    for name, weight in work.weights.items():
        seen = InputStats(mean_square=torch.logspace(-4, 4, weight.candidate.shape[-1]))
        work.weights[name] = Learnable(weight.candidate, weight.config, seen)
    for name, codes in work.learn(steps=0).items():
        learned, searched = work.packed(name, codes), work.packed(name, None)
        assert [raw(t) for _, t in learned.parts()] == [raw(t) for _, t in searched.parts()]


@every_family
def test_the_block_stays_as_it_is(folders: Folders, family: str) -> None:
    work = Work(folders, family)
    before = {name: raw(p) for name, p in work.block.named_parameters()}
    needs = [p.requires_grad for p in work.block.parameters()]
    work.learn(steps=3)
    assert {name: raw(p) for name, p in work.block.named_parameters()} == before
    assert [p.requires_grad for p in work.block.parameters()] == needs
    assert all(p.grad is None for p in work.block.parameters())


def test_a_seed_gives_the_same_codes_and_another_others(folders: Folders) -> None:
    work = Work(folders, "llama")
    first, again, other = (work.learn(steps=8, seed=seed) for seed in (1, 1, 2))
    same = [all(torch.equal(a.codes, b.codes) for a, b in zip(first[n], again[n], strict=True)) for n in first]
    differ = [any(not torch.equal(a.codes, b.codes) for a, b in zip(first[n], other[n], strict=True)) for n in first]
    assert all(same) and any(differ)


def test_codes_may_be_the_start(folders: Folders) -> None:
    """Those of another algorithm, which are not the nearest: no step gives them back, some are better."""
    work = Work(folders, "llama", "int4-g32")
    drawn = torch.Generator().manual_seed(0)
    for name, codes in work.learn(steps=0).items():
        moved = [c.codes.int() + torch.randint(-2, 3, c.codes.shape, generator=drawn) for c in codes]
        given = [c._replace(codes=m.clamp(0, 15).to(torch.uint8)) for c, m in zip(codes, moved, strict=True)]
        work.weights[name] = Learnable(work.weights[name].candidate, work.weights[name].config, codes=given)
    start = work.learn(steps=0)
    for name, weight in work.weights.items():
        assert weight.codes is not None and torch.equal(start[name][0].codes, weight.codes[0].codes)
    assert 0.01 * work.error(start) < work.error(work.learn(steps=25)) < 0.5 * work.error(start)


@pytest.mark.parametrize("scheme", ["int3-g24", "int6-g32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_dtypes_learn_too(folders: Folders, dtype: torch.dtype, scheme: str) -> None:
    work = Work(folders, "llama", scheme, dtype)
    assert work.error(work.learn(steps=25)) < 0.9 * work.error(work.learn(steps=0))


def test_what_is_worse_than_the_start_is_not_kept(folders: Folders) -> None:
    """Steps of half a code and more, without end: much is learned, and it is rubbish."""
    work = Work(folders, "llama", "int8-g32")
    start, found = work.learn(steps=0), work.learn(steps=3, lr=0.9)
    assert all(torch.equal(a.codes, b.codes) for name in start for a, b in zip(start[name], found[name], strict=True))


def test_progress_is_reported(folders: Folders) -> None:
    calls: list[tuple[int, int]] = []
    Work(folders, "llama").learn(steps=3, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
