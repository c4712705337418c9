"""Finds in a model what its family's table says: norms and what reads them, and what writes the residual stream.

Every parameter has to have its place in the table. One that has none might read or write the stream too, and a change
of the others would break the model in silence: then the model is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from llmquant.config.candidates import Candidate, find_candidates
from llmquant.errors import AlreadyQuantizedError, BadWeightError, UnknownArchitectureError
from llmquant.tensor import QuantizedTensor
from llmquant.tune.families import FAMILIES, REFUSED, Family, Fold


@dataclass(frozen=True)
class Weight:
    """A weight that reads or writes a stream of channels.

    Attributes:
        name: its FQN.
        shape: [out, in] or [experts, out, in], the last two the other way round with `transposed`; [out] of a vector
            that is added.
        transposed: see `shape`.
        bias: FQN of its bias, [out] or [experts, out].
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool
    bias: str | None

    @property
    def outputs(self) -> int:
        """How many channels it writes."""
        return self.shape[-1] if self.transposed or len(self.shape) == 1 else self.shape[-2]

    @property
    def inputs(self) -> int:
        """How many channels it reads."""
        return self.shape[-2] if self.transposed else self.shape[-1]


@dataclass(frozen=True)
class Feed:
    """A norm and the weights that read what it gives.

    Attributes:
        norm: FQN of the norm's weight.
        bias: FQN of its bias, if it has one.
        readers: all that read it.
        block: FQN of the block that it lies in; empty behind the last one.
    """

    norm: str
    bias: str | None
    readers: tuple[Weight, ...]
    block: str = ""


@dataclass(frozen=True)
class Pair:
    """A weight that writes hidden channels linearly, and the only one that reads them."""

    source: Weight
    target: Weight
    fold: Fold
    block: str


@dataclass(frozen=True)
class Structure:
    """The parts of one model.

    Attributes:
        family: its table.
        hidden: channels of the residual stream.
        embeddings: weights [rows, hidden] that begin the stream.
        writers: weights whose output is added to it.
        feeds: norms of the stream, the final one (which feeds the head) last.
        inner_feeds: norms that lie between two weights.
        pairs: what can be scaled inside of blocks.
        head: FQN of the head's weight, and `tied_to` that of the embedding if they are one.
        post_norms: FQNs of norms between writers and the stream.
    """

    family: Family
    hidden: int
    embeddings: tuple[Weight, ...]
    writers: tuple[Weight, ...]
    feeds: tuple[Feed, ...]
    inner_feeds: tuple[Feed, ...]
    pairs: tuple[Pair, ...]
    head: str
    tied_to: str | None
    post_norms: tuple[str, ...]


def find_structure(model: nn.Module) -> Structure:
    """The structure of a plain model of a known family.

    Raises:
        UnknownArchitectureError: for a model whose family is not known, or that has a parameter that the family's table
            does not know.
        AlreadyQuantizedError: if a weight is quantized.
        BadWeightError: if a weight has no values, or is no float.
    """
    _check_plain(model)
    return _Finder(model, _family(model))()


def _family(model: nn.Module) -> Family:
    kind = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    if kind in FAMILIES:
        return FAMILIES[kind]
    known = f"one of {', '.join(sorted(FAMILIES))}"
    if kind in REFUSED:
        raise UnknownArchitectureError(f"{kind} cannot be changed so: {REFUSED[kind]}", hint=known)
    raise UnknownArchitectureError(
        f"nobody has said what feeds what in {kind}",
        hint=f"{known}; or a row for it in llmquant/tune/families.py",
    )


def _check_plain(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, QuantizedTensor):
            raise AlreadyQuantizedError("the model is quantized already", where=name, hint="start from the plain model")
        if parameter.is_meta:
            raise BadWeightError("the weight has no values (it lies on the meta device)", where=name, hint="load it")
        if not parameter.is_floating_point() or parameter.dtype.itemsize == 1:
            raise BadWeightError(f"the weight is {parameter.dtype}, not a plain float", where=name)


class _Finder:
    """One search; remembers which parameters have been met."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model, self.family = model, family
        self.parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self.candidates = {fqn: c for c in find_candidates(model).candidates for fqn in c.fqns}
        self.known: set[str] = set()

    def __call__(self) -> Structure:
        family = self.family
        final = self._feed("", family.final_norm, family.head)
        embeddings = self._weights("", family.embeddings)
        if final is None or len(final.readers) != 1 or not embeddings:
            raise UnknownArchitectureError(
                "the model has no final norm, head or embedding where its family has them",
                where=f"{family.final_norm}, {family.head}, {family.embeddings}",
                hint="the model with its language-model head",
            )
        head = final.readers[0].name
        tied = next((e.name for e in embeddings if self.parameters[e.name] is self.parameters[head]), None)
        blocks = list(self._blocks())
        found = Structure(
            family,
            self.parameters[final.norm].numel(),
            embeddings,
            tuple(w for b in blocks for w in self._weights(b, family.writers)) + self._weights("", family.outside),
            (*self._feeds(blocks, family.feeds), final),
            self._feeds(blocks, family.inner_feeds),
            tuple(self._pairs(blocks)),
            head,
            tied,
            tuple(name for b in blocks for name in self._post_norms(b)),
        )
        self._inner(blocks)
        self._check(found)
        return found

    def _blocks(self) -> Iterator[str]:
        """FQNs of the blocks."""
        for name, _ in self.model.get_submodule(self.family.blocks).named_children():
            yield f"{self.family.blocks}.{name}."

    def _name(self, path: str) -> str | None:
        return next((name for name in (f"{path}.weight", path) if name in self.parameters), None)

    def _weight(self, path: str) -> Weight | None:
        name = self._name(path)
        if name is None:
            return None
        bias = next((b for b in (f"{path}.bias", f"{path}_bias") if b in self.parameters), None)
        self.known.update(filter(None, (name, bias)))
        candidate: Candidate | None = self.candidates.get(name)
        if candidate is None:
            return Weight(name, tuple(self.parameters[name].shape), False, bias)
        return Weight(name, candidate.shape, candidate.transposed, bias)

    def _weights(self, block: str, names: str) -> tuple[Weight, ...]:
        return tuple(weight for name in names.split() if (weight := self._weight(block + name)))

    def _feed(self, block: str, norm: str, readers: str) -> Feed | None:
        """A norm and its readers; None where the block has neither, and an error where it has but one."""
        own, found = self._weight(block + norm), self._weights(block, readers)
        if own is None and not found:
            return None
        if own is None or not found:
            raise UnknownArchitectureError(
                "a norm without readers, or readers without their norm",
                where=f"{block}{norm}: {', '.join(w.name for w in found) or 'nothing reads it'}",
                hint="another variant of the architecture; say what feeds what in llmquant/tune/families.py",
            )
        return Feed(own.name, own.bias, found, block.removesuffix("."))

    def _feeds(self, blocks: Iterable[str], feeds: Any) -> tuple[Feed, ...]:
        found = (self._feed(block, norm, readers) for block in blocks for norm, readers in feeds.items())
        return tuple(feed for feed in found if feed)

    def _pairs(self, blocks: Iterable[str]) -> Iterator[Pair]:
        for block in blocks:
            for source, target, fold in self.family.pairs:
                first, second = self._weight(block + source), self._weight(block + target)
                if first and second:
                    yield Pair(first, second, fold, block.removesuffix("."))

    def _post_norms(self, block: str) -> Iterator[str]:
        return (weight.name for weight in self._weights(block, self.family.post_norms))

    def _inner(self, blocks: Iterable[str]) -> None:
        """Takes note of the parameters that never meet the stream."""
        patterns = [block + pattern for block in blocks for pattern in self.family.inner.split()]
        patterns += self.family.outside_inner.split()
        self.known.update(n for n in self.parameters for p in patterns if fnmatchcase(n, p))

    def _check(self, found: Structure) -> None:
        """All parameters have a place, and all widths agree."""
        unknown = [name for name in self.parameters if name not in self.known]
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            raise UnknownArchitectureError(
                f"{self.model.config.model_type} is known, but not with these parameters",  # type: ignore[union-attr]
                where=", ".join(unknown[:3]) + more,
                hint="say what they read and write in llmquant/tune/families.py",
            )
        readers = [w for feed in found.feeds for w in feed.readers]
        meeting = [w.name for w in (*readers, *found.writers, *found.embeddings)]
        assert len(set(meeting)) == len(meeting), "the table names a weight twice"
        widths = {w.name: w.inputs for w in readers}
        widths |= {w.name: w.outputs for w in found.writers} | {w.name: w.shape[-1] for w in found.embeddings}
        wrong = [name for name, width in widths.items() if width != found.hidden]
        if wrong:
            raise UnknownArchitectureError(
                f"a weight does not meet all {found.hidden} channels of the residual stream", where=", ".join(wrong[:3])
            )
