"""What quantizing did to every weight of a model, and what it cost."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from llmquant.config.base import QuantConfig
from llmquant.tensor import QuantizedTensor


@dataclass(frozen=True)
class WeightReport:
    """What became of one weight. `names` are all its FQNs, `block` the (rows, columns) that share a scale."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    scheme: str
    algorithm: str
    block: tuple[int, int]
    bytes_before: int
    bytes_after: int
    kernel: str
    kernel_reason: str


@dataclass
class QuantizationReport:
    """What `quantize_` did to every weight of two or more dimensions, and what it cost.

    Attributes:
        quantized: by canonical FQN.
        skipped: FQN -> why it stays as it is.
        bytes_before, bytes_after: of all parameters, tied ones once.
        warnings: what the user should look at.
        seconds: wall time.
    """

    quantized: dict[str, WeightReport] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        schemes: dict[str, list[WeightReport]] = {}
        for weight in self.quantized.values():
            schemes.setdefault(f"{weight.scheme} ({weight.algorithm})", []).append(weight)
        before, after = self.bytes_before / 1e6, self.bytes_after / 1e6
        lines = [f"{len(self.quantized)} weights quantized in {self.seconds:.1f} s: {before:.1f} MB -> {after:.1f} MB"]
        lines += [f"  {name}: {len(found)} weights" for name, found in schemes.items()]
        lines += [f"  kept {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines + [f"  warning: {warning}" for warning in self.warnings])


def report_weight(
    fqns: tuple[str, ...], weight: QuantizedTensor, config: QuantConfig, bytes_before: int
) -> WeightReport:
    """The report of one quantized weight."""
    kernel, reason = weight.kernel()
    return WeightReport(
        fqns,
        tuple(weight.shape),
        config.scheme,
        config.algorithm or "",
        weight.meta.block,
        bytes_before,
        weight.nbytes,
        kernel,
        reason,
    )
