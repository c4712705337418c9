"""What the channels of sites carry while a model reads some tokens, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.calibrate.walk import Batch, Chain, find_blocks, walking
from llmquant.errors import CalibrationError
from llmquant.quantize import Progress
from llmquant.tune.sites import Site


class Channels:
    """Inputs of a site's readers, summed up.

    Attributes:
        tokens: how many were seen.
    """

    def __init__(self, *, gram: bool) -> None:
        self.tokens = 0
        self._gram = gram
        self._sums: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Takes note of inputs [..., K] of any float dtype."""
        rows = x.detach().flatten(0, -2).float()
        if not len(rows):
            return
        size = rows.abs()
        found = [size.sum(0), size.amax(0), *([rows.T @ rows] if self._gram else [])]
        if self._sums:
            found = [
                self._sums[0] + found[0],
                self._sums[1].maximum(found[1]),
                *map(torch.add, self._sums[2:], found[2:]),
            ]
        self._sums = found
        self.tokens += len(rows)

    @property
    def mean(self) -> Tensor:
        """The mean magnitude of each column's input, float32 [K]."""
        return self._sums[0] / self.tokens

    @property
    def largest(self) -> Tensor:
        """The largest magnitude of each column's input, float32 [K]."""
        return self._sums[1]

    @property
    def gram(self) -> Tensor | None:
        """The mean of x x^T, float32 [K, K]; None unless it was asked for."""
        return self._sums[2] / self.tokens if self._gram else None


def each_block(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch], *, gram: bool, progress: Progress | None
) -> Iterator[list[tuple[Site, Channels]]]:
    """Block by block, the sites that lie in it and what their channels carried.

    A change of a block between two steps must not change its function: the next one meets what it gave before.

    Raises:
        CalibrationError: for inputs that are not finite.
    """
    with walking(model):
        blocks = find_blocks(model, batches[0])
        chain = Chain(model, blocks, batches)
        for index, block in enumerate(blocks):
            found = [(site, Channels(gram=gram)) for site in sites if site.block == block.name]
            with ExitStack() as hooks:
                for site, channels in found:
                    hooks.enter_context(_watching(model, site, channels))
                for step, _ in enumerate(chain.advance()):
                    if progress:
                        progress(index * len(batches) + step, len(blocks) * len(batches), block.name)
            for site, channels in found:
                _check(site, channels)
            yield found


def _watching(model: nn.Module, site: Site, channels: Channels) -> Any:
    """A handle of the hook that shows a site's channels."""
    if site.is_norm:
        norm = model.get_submodule(site.source.removesuffix(".weight"))
        return norm.register_forward_hook(lambda _module, _args, output: channels.update(output))
    reader = model.get_submodule(site.readers[0].name.removesuffix(".weight"))
    return reader.register_forward_pre_hook(_first(channels.update))


def _first(update: Callable[[Tensor], None]) -> Callable[..., None]:
    return lambda _module, args: update(args[0])


def _check(site: Site, channels: Channels) -> None:
    if channels.tokens and not channels.largest.isfinite().all():
        raise CalibrationError(
            "the inputs of a weight are not finite",
            where=site.readers[0].name,
            hint="a wider dtype for the model, or a check of its weights",
        )
