"""How every weight of another library's checkpoint was taken over."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from llmquant.foreign.spec import Taken


@dataclass(frozen=True)
class ImportedWeight:
    """What became of one weight.

    Attributes:
        shape: as its module expects it.
        scheme: format, block and what scales are stored in, for people.
        taken: how it was taken over: of experts that were gathered the worst.
        note: what is worth saying of that.
        bytes_before, bytes_after: of all its tensors, there and here.
    """

    shape: tuple[int, ...]
    scheme: str
    taken: Taken
    note: str
    bytes_before: int
    bytes_after: int


@dataclass
class ImportReport:
    """What `import_checkpoint` did.

    Attributes:
        source: whose checkpoint it was.
        weights: FQN -> what became of each weight that was quantized there.
        copied: FQNs of the tensors that were copied as they are.
        left_out: keys that belong to no parameter of the model.
        warnings: what the user should look at.
        bytes_before, bytes_after: of all tensors.
        seconds: wall time.
    """

    source: str
    weights: dict[str, ImportedWeight] = field(default_factory=dict)
    copied: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    warnings: tuple[str, ...] = ()
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0

    def counts(self) -> dict[Taken, int]:
        """How many weights were taken over in which way."""
        found = [weight.taken for weight in self.weights.values()]
        return {taken: found.count(taken) for taken in Taken if taken in found}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {taken}" for taken, count in self.counts().items())
        lines = [f"{self.source}: {len(self.weights)} weights ({counts}), {len(self.copied)} tensors copied"]
        return "\n".join(lines + [f"  warning: {warning}" for warning in self.warnings])


def worst(found: Iterable[Taken]) -> Taken:
    """The last of them in the order of `Taken`."""
    return max(found, key=list(Taken).index)
