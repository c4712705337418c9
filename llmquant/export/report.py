"""What became of each weight on its way into another format."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

EXACT, ROUNDED, REQUANTIZED, DEQUANTIZED, PLAIN = "exact", "scales rounded", "requantized", "dequantized", "plain"


@dataclass(frozen=True)
class Exported:
    """One weight of the result.

    Attributes:
        how: `exact` (codes and scales are ours), `scales rounded` (codes are ours), `requantized`, `dequantized`, or
            `plain` (was not quantized).
        format: what it is called there.
        reason: why it is not exact; empty where it is.
    """

    how: str
    format: str
    reason: str = ""


@dataclass
class ExportReport:
    """All weights by FQN, what a user should know, and what it took.

    Attributes:
        target: `compressed-tensors`, `gguf`, `torchao` or `hf16`.
        weights: FQN -> what became of it.
        warnings: whole sentences.
        bytes: of the files with weights.
        seconds: wall time.
    """

    target: str
    weights: dict[str, Exported] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    bytes: int = 0
    seconds: float = 0.0

    def groups(self) -> dict[tuple[str, str, str], list[str]]:
        """(how, format, reason) -> FQNs."""
        found: dict[tuple[str, str, str], list[str]] = {}
        for fqn, weight in self.weights.items():
            found.setdefault((weight.how, weight.format, weight.reason), []).append(fqn)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.target}: {self.bytes / 1e6:.1f} MB in {self.seconds:.1f} s"]
        for (how, name, reason), fqns in self.groups().items():
            lines.append(f"  {name} ({how}): {len(fqns)} weights" + (f": {reason}" if reason else ""))
        return "\n".join([*lines, *(f"  note: {warning}" for warning in self.warnings)])
