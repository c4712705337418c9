"""Where channels can be scaled and the function stays: x W = (x / s) (s W), with 1/s folded into what gives x.

What gives x is a norm, or a weight that its reader meets linearly: values before the output projection of attention, or
the product of a gated MLP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.tune.families import Fold
from llmquant.tune.structure import Feed, Pair, Structure, Weight


@dataclass(frozen=True)
class Site:
    """Channels that can be scaled, their source and all weights that read them.

    Attributes:
        source: FQN of the norm's weight, or of the weight that writes them.
        bias: FQN of its bias, if it has one.
        rows: which rows of the source are the channels.
        transposed: whether its rows lie along its last dimension.
        gain_offset: what a norm adds to its weight.
        readers: the weights that read them.
        head_dim: channels of a head, where several heads read one; 0 otherwise.
        block: FQN of their block.
    """

    source: str
    bias: str | None
    rows: slice
    transposed: bool
    gain_offset: float
    readers: tuple[Weight, ...]
    head_dim: int
    block: str

    @property
    def is_norm(self) -> bool:
        """Whether a norm gives the channels."""
        return self.rows == slice(None)

    def shared(self, columns: Tensor) -> Tensor:
        """What is known of the reader's columns [K], as [S, C]: the S columns that read each of C channels."""
        if not self.head_dim:
            return columns.unsqueeze(0)
        count = (self.rows.stop - self.rows.start) // self.head_dim
        return columns.view(count, -1, self.head_dim).transpose(0, 1).reshape(-1, count * self.head_dim)

    def spread(self, channels: Tensor) -> Tensor:
        """Scales of channels [C] as those of the reader's columns [K]."""
        if not self.head_dim:
            return channels
        copies = self.readers[0].inputs // len(channels)
        return channels.view(-1, 1, self.head_dim).expand(-1, copies, -1).reshape(-1)

    @torch.no_grad()
    def apply(self, model: nn.Module, scale: Tensor) -> None:
        """Multiplies what the readers do with channel c by scale[c], divides what the source gives by it.

        Args:
            model: the model that it is a site of.
            scale: [C], positive; used as the source's dtype has it, so that both sides agree.
        """
        source = model.get_parameter(self.source)
        scale = scale.to(source.device, source.dtype)
        for weight in self.readers:
            for matrix in matrices(model, weight):
                matrix.mul_(self.spread(scale))
        if self.is_norm:
            source.copy_((source + self.gain_offset) / scale - self.gain_offset)
        else:
            (source.mT if self.transposed else source)[self.rows].div_(scale.unsqueeze(1))
        if self.bias:
            model.get_parameter(self.bias)[self.rows].div_(scale)


@dataclass
class MigrationReport:
    """What became of every site, and of the weights that are at none.

    Attributes:
        scaled: FQN of a source -> what was chosen, in words.
        skipped: FQN of a source or a weight -> why its channels stay as they are.
        tokens: how many the model read.
        seconds: how long it took.
    """

    scaled: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [f"channels of {len(self.scaled)} sources scaled in {self.seconds:.1f} s, after {self.tokens} tokens"]
        lines += [f"  {name}: {chosen}" for name, chosen in self.scaled.items()]
        return "\n".join(lines + [f"  kept {name}: {reason}" for name, reason in self.skipped.items()])


def find_sites(model: nn.Module, structure: Structure) -> tuple[list[Site], dict[str, str]]:
    """The sites of a model, and why other channels cannot be scaled.

    Those that scale the rows of a weight stand before the norm that scales its columns.
    """
    sites: list[Site] = []
    skipped: dict[str, str] = {structure.head: "the head keeps the final norm as it is"}
    for pair in structure.pairs:
        found = _of_pair(pair, _head_dim(model))
        if isinstance(found, Site):
            sites.append(found)
        else:
            skipped[pair.target.name] = found
    offset = structure.family.gain_offset
    sites += [_of_feed(feed, offset) for feed in (*structure.feeds[:-1], *structure.inner_feeds)]
    read = {weight.name for site in sites for weight in site.readers}
    for weight in structure.writers:
        if weight.name not in read and len(weight.shape) > 1:
            skipped.setdefault(weight.name, _why_not(weight))
    return sites, skipped


def _head_dim(model: nn.Module) -> int:
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _why_not(weight: Weight) -> str:
    if len(weight.shape) == 3:
        return "each expert has hidden channels of its own"
    return "nothing that is linear in its input channels is known"


def _of_feed(feed: Feed, offset: float) -> Site:
    return Site(feed.norm, feed.bias, slice(None), False, offset, feed.readers, 0, feed.block)


def _of_pair(pair: Pair, head_dim: int) -> Site | str:
    """The site of a pair, or why it is none."""
    total, columns = pair.source.outputs, pair.target.inputs
    start = {Fold.second_half: total // 2, Fold.last_heads: columns + (total - columns) // 2}.get(pair.fold, 0)
    channels, heads = total - start, pair.fold in (Fold.heads, Fold.last_heads)
    fits = columns == channels or (heads and channels and not (columns % channels or channels % head_dim))
    if not fits:
        return f"its {columns} columns do not belong to {channels} rows of {pair.source.name}"
    grouped = head_dim if columns != channels else 0
    source, rows = pair.source, slice(start, total)
    return Site(source.name, source.bias, rows, source.transposed, 0.0, (pair.target,), grouped, pair.block)


def matrices(model: nn.Module, weight: Weight) -> Iterator[Tensor]:
    """The matrices [out, in] of a weight as views of it: one, or one an expert."""
    values = model.get_parameter(weight.name).detach().view(weight.shape)
    logical = values.mT if weight.transposed else values
    yield from logical.unbind() if logical.dim() == 3 else [logical]
