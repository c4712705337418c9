"""What `prepare` did to every weight of a model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class PreparedWeight:
    """One fake-quantized weight. `names` are all its FQNs; `trains` says whether it required a gradient."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    scheme: str
    algorithm: str
    trains: bool


@dataclass
class PreparationReport:
    """What `prepare` did to every weight of two or more dimensions.

    Attributes:
        prepared: by canonical FQN.
        skipped: FQN -> why it stays as it is.
        warnings: what the user should look at.
    """

    prepared: dict[str, PreparedWeight] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        schemes: dict[str, list[PreparedWeight]] = {}
        for weight in self.prepared.values():
            schemes.setdefault(f"{weight.scheme} ({weight.algorithm})", []).append(weight)
        lines = [f"{len(self.prepared)} weights are quantized while the model runs"]
        for name, found in schemes.items():
            frozen = sum(not weight.trains for weight in found)
            lines.append(f"  {name}: {len(found)} weights" + (f", {frozen} of them frozen" if frozen else ""))
        lines += [f"  kept {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines + [f"  warning: {warning}" for warning in self.warnings])
