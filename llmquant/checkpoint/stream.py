"""Quantizing a checkpoint tensor by tensor, from disk to disk: the model is never loaded."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

import llmquant
from llmquant.checkpoint.checksums import in_file, write_checksums
from llmquant.checkpoint.crew import Crew, Task, work_through
from llmquant.checkpoint.files import check_target, no_space_errors
from llmquant.checkpoint.hub import HubShards, in_order, most_held
from llmquant.checkpoint.journal import run_key
from llmquant.checkpoint.manifest import new_manifest, shard_metadata
from llmquant.checkpoint.needs import (
    Needs,
    cache_folder,
    disk_free,
    memory_free,
    memory_needed,
    resident,
    same_disk,
)
from llmquant.checkpoint.origin import Origin
from llmquant.checkpoint.output import Output, partial_folder, unfinished
from llmquant.checkpoint.shards import Layout, as_bytes, lay_out
from llmquant.checkpoint.source import Source, open_source
from llmquant.checkpoint.steps import Step, Work, check_twins, entry_of, pieces, plan_steps
from llmquant.config import recipe
from llmquant.config.fqn import FqnToConfig
from llmquant.primitives.stats import InputStats
from llmquant.quantize import Item, Plan, Progress, QuantizationReport, check_stats, make_plan

DEFAULT_SHARD_BYTES = 2_000_000_000


def quantize_checkpoint(
    model: str | Path | Origin,
    output: str | Path,
    config: Any,
    *,
    stats: Mapping[str, InputStats] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    jobs: int | None = None,
    max_memory: int | None = None,
    ignore_memory: bool = False,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Writes a quantized copy of a checkpoint; the folder appears when it is complete.

    One tensor is in memory at a time, of a stack of experts one expert. A run that was interrupted, even killed, leaves
    what it has finished in OUT.partial; the same call goes on behind it and ends with the same bytes.

    Args:
        model: local folder or hub id of a plain checkpoint, or its `Origin`. Shards of a hub repository are fetched
            when their turn comes.
        output: the folder to make.
        config: what `quantize_` takes.
        stats: FQN of a weight -> what a calibration run saw of its inputs, as `collect_stats` gives it; static
            activations need them.
        dtype: of what stays in float, and of the model when it is loaded; None keeps the checkpoint's.
        overwrite: whether an existing output folder is replaced.
        max_shard_bytes: largest shard.
        jobs: tensors at a time; None is one, or with `max_memory` as many as there are processors. Results are equal.
        max_memory: bytes that the process may come to take; None is no bound.
        ignore_memory: go on where memory will hardly do.
        progress: called before each weight with bytes of the plain checkpoint, and an `Item`.

    Raises:
        ModelNotFoundError, AlreadyQuantizedError, NothingToQuantizeError, ConfigError, BadWeightError,
        CalibrationError, CheckpointError, NoSpaceError, NotEnoughMemoryError, OutputExistsError.
        UnfinishedRunError: where OUT.partial is of another run.
    """
    started = time.perf_counter()
    crew = Crew(jobs, max_memory)
    resolved, target = recipe.to_config(config), Path(output)
    check_target(target, overwrite)
    source = open_source(model, dtype)
    plan = make_plan(source.skeleton, resolved)
    check_stats(plan, stats)
    job = Job(source, resolved, plan, max_shard_bytes, stats or {})
    job.needs(target, crew).check(target, ignore_memory=ignore_memory)
    check_twins(job.work.twins, str(source.folder))
    report = job.report()
    with unfinished(target, job.key, job.layouts, overwrite) as out:
        telling = Telling(progress, job.work.steps)
        work_through(job.tasks(out, telling), crew)
        telling.over()
        job.write_rest(out)
    report.seconds = time.perf_counter() - started
    return report


@dataclass(frozen=True, eq=False)
class Job:
    """A checkpoint and what becomes of it, decided before any of its tensors is read.

    Attributes:
        source: the checkpoint.
        config: what was asked for.
        plan: what that means for its model.
        max_shard_bytes: largest shard.
        stats: of a calibration run.
        words: what else the result depends on, in plain JSON.
    """

    source: Source
    config: FqnToConfig
    plan: Plan
    max_shard_bytes: int
    stats: Mapping[str, InputStats]
    words: Any = None

    @cached_property
    def work(self) -> Work:
        """A step for every tensor of the result."""
        return plan_steps(self.source, self.plan)

    @cached_property
    def key(self) -> str:
        """What two runs must share for one to go on where the other ended: all that the result depends on."""
        import transformers

        versions = [llmquant.__version__, torch.__version__, transformers.__version__]
        machine = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
        weights = [[c.name, entry_of(c, config), config.algorithm] for c, config in self.plan.chosen]
        return run_key(
            *(versions, machine, self.source.identity(), self.source.config, str(self.source.dtype)),
            *(recipe.to_pairs(self.config), weights, self.max_shard_bytes, _stats_hash(self.stats), self.words),
        )

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Its save id follows from the key, so that a run that was interrupted ends with the same bytes."""
        entries = {candidate.name: entry_of(candidate, config) for candidate, config in self.plan.chosen}
        return new_manifest(recipe.to_pairs(self.config), entries, self.key[:32], in_file())

    @cached_property
    def layouts(self) -> list[Layout]:
        """Where every tensor of the result lies."""
        units = [step.written for step in self.work.steps]
        return lay_out(units, shard_metadata(self.manifest), self.max_shard_bytes)

    def needs(self, target: Path, crew: Crew) -> Needs:
        """What it will take of memory and disk."""
        held = memory_needed([step.bytes_held for step in self.work.steps], crew)
        now, most = resident()
        there = sum(p.stat().st_blocks * 512 for p in partial_folder(target).glob("draft/*.safetensors"))
        found = Needs(
            peak_memory=max(most, now + held),
            memory=held,
            memory_free=memory_free(),
            disk=max(sum(step.bytes_after for step in self.work.steps) - there, 0),
            disk_free=disk_free(target),
        )
        return found if self.source.hub is None else self._with_cache(found, self.source.hub, target)

    def _with_cache(self, found: Needs, hub: HubShards, target: Path) -> Needs:
        missing = {name: hub.sizes[name] if name in hub.missing() else 0 for name in hub.names}
        uses, download = self.uses(self.work.steps), sum(missing.values())
        return replace(
            found,
            download=download,
            cache=most_held(uses, in_order(uses, hub.names), missing) if hub.drop else download,
            cache_free=disk_free(cache_folder()),
            cache_shared=same_disk(cache_folder(), target),
        )

    def uses(self, steps: Iterable[Step]) -> dict[str, set[str]]:
        """FQN -> the shards of the hub that its step reads."""
        return {step.fqn: self.source.shards_of(step.group) for step in steps}

    def report(self) -> QuantizationReport:
        """What will be done to every weight, and what it will cost."""
        steps = self.work.steps
        return QuantizationReport(
            quantized={step.fqn: step.report() for step in steps if step.chosen is not None},
            skipped=self.plan.skipped(self.source.skeleton),
            warnings=(*self.source.warnings, *self.plan.resolution.warnings),
            bytes_before=sum(step.bytes_before for step in steps),
            bytes_after=sum(step.bytes_after for step in steps),
        )

    def tasks(self, out: Output, telling: Telling | None = None, steps: Sequence[Step] | None = None) -> list[Task]:
        """What is left to do for an output, by default of all steps."""
        steps, left = self.work.steps if steps is None else steps, []
        telling = telling or Telling(None, steps)
        for step in steps:
            if out.has(step.fqn):
                telling.ended(step)
            else:
                left.append(step)
        return [
            Task(
                partial(self._do, step, out),
                step.bytes_held,
                partial(telling.started, step),
                partial(telling.ended, step),
            )
            for step in self._by_shards(left, telling)
        ]

    def _by_shards(self, steps: list[Step], telling: Telling) -> list[Step]:
        """The steps in the order in which they ask least of the hub. Where they write does not depend on it."""
        hub = self.source.hub
        if hub is None:
            return steps
        by_name, uses = {step.fqn: step for step in steps}, self.uses(steps)
        hub.expect(uses)
        hub.told = telling.downloading
        return [by_name[name] for name in in_order(uses, hub.names)]

    def _do(self, step: Step, out: Output) -> None:
        """Reads, quantizes and writes one tensor."""
        written = {key: out.component(key) for key in step.written}
        for piece in pieces(step, self.stats.get(step.fqn)):
            for key, tensor in piece.items():
                written[key].write(tensor)
        out.finish(step.fqn, {key: component.finish() for key, component in written.items()})
        if self.source.hub is not None:
            self.source.hub.done(step.fqn)

    def write_rest(self, out: Output) -> None:
        """config.json with the manifest, checksums, and whatever else lies beside the weights."""
        out.commit()
        write_checksums(out.folder, out.digests())
        config = {k: v for k, v in self.source.config.items() if k != "torch_dtype"}
        config |= {"dtype": str(self.source.dtype).removeprefix("torch."), "quantization_config": self.manifest}
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        with no_space_errors(out.folder):
            (out.folder / "config.json").write_text(text, encoding="utf-8")
            for path in self.source.extras():
                shutil.copy2(path, out.folder / path.name)


class Telling:
    """Tells a progress how far the steps are, in bytes of the plain checkpoint and in tensors."""

    def __init__(self, progress: Progress | None, steps: Sequence[Step]) -> None:
        self.progress, self.count, self.total = progress, len(steps), sum(step.bytes_before for step in steps)
        self.done = self.number = 0

    def started(self, step: Step) -> None:
        """A step begins."""
        self._tell(step.fqn)

    def ended(self, step: Step) -> None:
        """It is done, perhaps in an earlier run."""
        self.done += step.bytes_before
        self.number += 1

    def downloading(self, shard: str) -> None:
        """A shard is fetched."""
        self._tell(f"fetching {shard}")

    def over(self) -> None:
        """All steps are done."""
        self._tell("")

    def _tell(self, what: str) -> None:
        if self.progress:
            self.progress(self.done, self.total, Item(what, self.number, self.count))


def _stats_hash(stats: Mapping[str, InputStats]) -> str:
    digest = sha256()
    for fqn, found in sorted(stats.items()):
        for field in fields(found):
            tensor = getattr(found, field.name)
            if tensor is not None:
                digest.update(f"{fqn} {field.name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(as_bytes(tensor.cpu()))
    return digest.hexdigest()
