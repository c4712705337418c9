"""Runs a model block by block: each block meets what the blocks before it, as they are by then, make of the batches.

Only the state between two blocks is kept, one tensor a batch. The model's own forward decides what a block is called
with: it runs with the blocks that are done replaced by what they gave, and is stopped at the next one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from llmquant.calibrate.capture import Capture
from llmquant.calibrate.collect import Calibration, one_by_one, run, wanted
from llmquant.calibrate.observers import Observer
from llmquant.calibrate.watch import Watch
from llmquant.config.recipe import to_config
from llmquant.primitives.stats import InputStats
from llmquant.quantize import Progress, make_plan

Batch = Tensor | Mapping[str, Any]


Held = Callable[[str, Iterable[str]], AbstractContextManager[None]]
"""Has the weights of a block, or those of some names, in memory while it is entered."""


@dataclass(frozen=True)
class Block:
    """A module that a model calls once, after the block before it: a decoder layer, for instance.

    Attributes:
        name: its FQN.
        module: it.
        stack: the FQN of the list that it lies in.
    """

    name: str
    module: nn.Module
    stack: str


@dataclass(frozen=True)
class Call:
    """What a block is called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, block: Callable[..., Any]) -> Any:
        """Calls a block with it."""
        return block(*self.args, **self.kwargs)


def find_blocks(model: nn.Module, batch: Batch) -> list[Block]:
    """The blocks of a model in the order in which they run: members of its outermost lists that a batch meets once."""
    found: list[Block] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(block.name + ".") for block in found):
            found += [Block(f"{name}.{key}", child, name) for key, child in module.named_children()]
    met: list[Block] = []
    with ExitStack() as hooks:
        for block in found:
            hooks.enter_context(block.module.register_forward_pre_hook(lambda *_, block=block: met.append(block)))
        run(model, batch)
    times = Counter(block.name for block in met)
    return [block for block in met if times[block.name] == 1]


class Chain:
    """Some batches on their way through the blocks of a model.

    Args:
        model: the model; entered with `walking`.
        blocks: as `find_blocks` found them.
        batches: token ids [B, T], or the arguments of the model.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch]) -> None:
        self.model, self.blocks, self.batches = model, blocks, batches
        self.done = 0
        self._given: list[dict[str, Any]] = [{} for _ in batches]  # of each batch, a stack's last output so far

    def calls(self) -> Iterator[Call]:
        """What the next block is called with, batch by batch."""
        block = self.blocks[self.done].module
        for given, batch in zip(self._given, self.batches, strict=True):
            with self._replaced(given), block.register_forward_pre_hook(_stop, with_kwargs=True):
                call = self._reach(batch)
            yield call

    def _reach(self, batch: Batch) -> Call:
        try:
            run(self.model, batch)
        except _Reached as reached:
            return reached.call
        raise AssertionError("the model did not call a block that it called before")

    def advance(self) -> Iterator[Any]:
        """Runs the next block on all batches; gives each of its outputs."""
        block = self.blocks[self.done]
        outputs = []
        for call in self.calls():
            outputs.append(call(block.module))
            yield outputs[-1]
        for given, output in zip(self._given, outputs, strict=True):
            given[block.stack] = output
        self.done += 1

    def finish(self) -> Iterator[None]:
        """Runs what lies behind the blocks, batch by batch."""
        assert self.done == len(self.blocks)
        for given, batch in zip(self._given, self.batches, strict=True):
            with self._replaced(given):
                run(self.model, batch)
            yield

    @contextmanager
    def _replaced(self, given: Mapping[str, Any]) -> Iterator[None]:
        """While it is entered, blocks that are done give what their stack gave last; the last of them rightly so."""
        with ExitStack() as stack:
            for block in self.blocks[: self.done]:
                stack.enter_context(_giving(block.module, given[block.stack]))
            yield


def collect_by_blocks(
    model: nn.Module,
    config: Any,
    batches: Sequence[Batch],
    held: Held,
    *,
    imatrix: bool = False,
    observer: str | Callable[[], Observer] = "minmax",
    progress: Progress | None = None,
) -> Calibration:
    """What `collect_stats` collects, of a model of which a block is in memory at a time.

    Args:
        model: whose parameters may be on the meta device while nothing uses them.
        held: called with the FQN of a block, or with "" and the names of weights outside of blocks.
        config, batches, imatrix, observer, progress: as there.

    Raises:
        CalibrationError: as there.
    """
    asked = wanted(make_plan(model, to_config(config)), imatrix)
    found: list[tuple[Mapping[str, InputStats], tuple[str, ...]]] = []
    with walking(model):
        chain = Chain(model, find_blocks(model, batches[0]), batches)
        rest = [a for a in asked if not any(a.candidate.name.startswith(b.name + ".") for b in chain.blocks)]
        parts = [(b.name, [a for a in asked if a.candidate.name.startswith(b.name + ".")]) for b in chain.blocks]
        for done, (name, members) in enumerate([*parts, ("", rest)]):
            with held(name, () if name else [a.candidate.name for a in rest]):
                watch = Watch(model, members, observer)
                with Capture(watch.watched):
                    for index, _ in enumerate(chain.advance() if name else chain.finish()):
                        if progress:
                            progress(done * len(batches) + index, (len(parts) + 1) * len(batches), name)
                found.append(watch.stats())
    stats = {name: each for part, _ in found for name, each in part.items()}
    ordered = {a.candidate.name: stats[a.candidate.name] for a in asked if a.candidate.name in stats}
    return Calibration(ordered, tuple(text for _, texts in found for text in texts), _tokens(batches))


@contextmanager
def walking(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients and caches, experts one by one; all of it as before afterwards."""
    training = {module: module.training for module in model.modules()}
    configs = [c for c in {id(c): c for c in _configs(model)}.values() if getattr(c, "use_cache", False)]
    model.eval()
    for config in configs:
        config.use_cache = False
    try:
        with torch.no_grad(), one_by_one(model):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for config in configs:
            config.use_cache = True


@contextmanager
def _giving(module: nn.Module, output: Any) -> Iterator[None]:
    """While it is entered, calls of a module give this output; each caller gets a copy, which it may change."""
    before = vars(module).get("forward")
    module.forward = lambda *_, **__: tree_map_only(Tensor, Tensor.clone, output)
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class _Reached(Exception):
    def __init__(self, call: Call) -> None:
        self.call = call


def _tokens(batches: Iterable[Batch]) -> int:
    ids = [batch if isinstance(batch, Tensor) else batch.get("input_ids") for batch in batches]
    return sum(each.numel() for each in ids if each is not None)


def _stop(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    raise _Reached(Call(args, dict(kwargs)))


def _configs(model: Any) -> Iterator[Any]:
    """The configs of a transformers model and of the models in it."""
    yield from (config for module in model.modules() if (config := getattr(module, "config", None)) is not None)
