"""What `quantize_checkpoint` would do, from the headers alone: nothing is read or written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmquant.checkpoint.crew import Crew
from llmquant.checkpoint.needs import Needs
from llmquant.checkpoint.origin import Origin
from llmquant.checkpoint.source import open_source
from llmquant.checkpoint.stream import DEFAULT_SHARD_BYTES, Job
from llmquant.config import recipe
from llmquant.quantize import make_plan
from llmquant.quantize.plan import needed_stats


@dataclass(frozen=True)
class SchemeSize:
    """The weights that get one scheme, and their bytes."""

    scheme: str
    algorithm: str
    weights: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class CheckpointPlan:
    """What a conversion would do.

    Attributes:
        model, output: as they were given.
        schemes: what is quantized, by scheme and algorithm.
        kept: FQN -> why a weight of two or more dimensions stays in float.
        bytes_before, bytes_after: of all tensors, tied ones once.
        shards: files of the result.
        calibrated: FQN -> what must be known of its inputs, from a run of the model over a text.
        needs: memory and disk, needed and free. Where weights are calibrated, it counts the quantizing alone: the run
            over the text takes memory of its own.
        warnings: what the user should look at.
    """

    model: str
    output: str
    schemes: tuple[SchemeSize, ...]
    kept: Mapping[str, str]
    bytes_before: int
    bytes_after: int
    shards: int
    calibrated: Mapping[str, tuple[str, ...]]
    needs: Needs
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def plan_checkpoint(
    model: str | Path | Origin,
    output: str | Path,
    config: Any,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    jobs: int | None = None,
    max_memory: int | None = None,
) -> CheckpointPlan:
    """What `quantize_checkpoint` would do with the same arguments, and what it would take.

    Args:
        model: folder, hub id or `Origin` of a plain checkpoint. Of a hub repository, small files are fetched and the
            headers of shards read by ranges.
        output: the folder that would be made.
        config: what `quantize_` takes.
        dtype, max_shard_bytes, jobs, max_memory: as `quantize_checkpoint`.

    Raises:
        ModelNotFoundError, AlreadyQuantizedError, NothingToQuantizeError, ConfigError, CheckpointError.
    """
    resolved = recipe.to_config(config)
    source = open_source(model, dtype)
    plan = make_plan(source.skeleton, resolved)
    job = Job(source, resolved, plan, max_shard_bytes, {})
    report = job.report()
    return CheckpointPlan(
        model=str(model),
        output=str(output),
        schemes=_by_scheme(report.quantized.values()),
        kept=report.skipped,
        bytes_before=report.bytes_before,
        bytes_after=report.bytes_after,
        shards=len(job.layouts),
        calibrated={name: tuple(sorted(needed_stats(config))) for name, (_, config) in plan.calibrated.items()},
        needs=job.needs(Path(output), Crew(jobs, max_memory)),
        warnings=report.warnings,
    )


def _by_scheme(weights: Any) -> tuple[SchemeSize, ...]:
    groups: dict[tuple[str, str], list[Any]] = {}
    for weight in weights:
        groups.setdefault((weight.scheme, weight.algorithm), []).append(weight)
    return tuple(
        SchemeSize(*key, len(found), sum(w.bytes_before for w in found), sum(w.bytes_after for w in found))
        for key, found in groups.items()
    )
