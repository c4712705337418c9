"""What is written for each weight of a checkpoint, decided from the headers alone, and how one of them is done."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmquant.checkpoint.mapping import Group
from llmquant.checkpoint.shards import Spec, as_bytes, nbytes
from llmquant.checkpoint.source import Source
from llmquant.checkpoint.state import assemble, components, entry, expected
from llmquant.config.base import QuantConfig
from llmquant.config.candidates import Candidate
from llmquant.errors import BadWeightError, CheckpointError
from llmquant.primitives.stats import InputStats
from llmquant.quantize import Plan, quantize_weight
from llmquant.quantize.report import WeightReport, report_weight
from llmquant.tensor import Meta, QuantizedTensor


@dataclass(frozen=True)
class Step:
    """One tensor of the result: how it is read, and what is written.

    Attributes:
        fqn: under which it is stored.
        name: under which its group gives it: another one where it is tied.
        group: what it is read from.
        plain: its dtype and shape before it is quantized.
        written: key -> dtype and shape of every component.
        parts: by how many equal parts along the first dimension it is read: experts, where they can be had alone.
        chosen: the weight and what it becomes; None if it stays in float.
    """

    fqn: str
    name: str
    group: Group
    plain: Spec
    written: Mapping[str, Spec]
    parts: int
    chosen: tuple[Candidate, QuantConfig] | None

    @property
    def bytes_before(self) -> int:
        """Of the plain tensor."""
        return nbytes(self.plain)

    @property
    def bytes_after(self) -> int:
        """Of what is written."""
        return sum(map(nbytes, self.written.values()))

    @property
    def bytes_held(self) -> int:
        """Memory that doing it takes, at most: what is read at a time, what conversions copy, and the result of it."""
        read, made = (self.bytes_before + self.bytes_after) // self.parts, 1 + (len(self.group.inputs) > self.parts)
        return read * made + _TEMPORARIES

    def report(self) -> WeightReport:
        """What becomes of a weight that is quantized: it follows from the plan."""
        assert self.chosen is not None
        candidate, config = self.chosen
        empty = {key: torch.empty(shape, dtype=dtype) for key, (dtype, shape) in self.written.items()}
        weight = assemble(self.fqn, entry_of(candidate, config), empty, self.plain[0])
        return report_weight(candidate.fqns, weight, config, self.bytes_before)


_TEMPORARIES = 2**26  # of an algorithm, which works on few rows at a time


class Work(NamedTuple):
    """All that is to be done.

    steps: in the order of the files.
    twins: pairs that config.json ties although the files hold both: a step, and another that must read the same.
    """

    steps: list[Step]
    twins: list[tuple[Step, Step]]


def plan_steps(source: Source, plan: Plan) -> Work:
    """What is written for every tensor of a checkpoint. Raises `CheckpointError` as `Source.groups`."""
    chosen = {c.name: (c, config) for c, config in plan.chosen}
    canonical = dict(getattr(source.skeleton, "all_tied_weights_keys", {}))
    dtype_of = dtypes(source)
    steps: dict[str, Step] = {}
    twins = []
    for group in source.groups():
        for name, (dtype, shape) in group.specs().items():
            fqn = canonical.get(name, name)
            step = _step(fqn, name, group, (dtype_of(fqn, dtype), shape), chosen.get(fqn))
            if fqn in steps:
                twins.append((steps[fqn], step))
            steps.setdefault(fqn, step)
    return Work(list(steps.values()), twins)


def entry_of(candidate: Candidate, config: QuantConfig) -> dict[str, Any]:
    """The manifest's entry of a weight that will be quantized, known before it is read."""
    rows, columns = candidate.shape[:-3:-1] if candidate.transposed else candidate.shape[-2:]
    spec = config.spec(rows, columns)
    meta = Meta(spec.format.name, spec.block, columns, candidate.transposed, config.activation)
    return entry(meta, candidate.shape, spec.scale_dtype, spec.asymmetric)


def pieces(step: Step, stats: InputStats | None) -> Iterator[dict[str, Tensor]]:
    """What is to be written, piece by piece along the first dimension of every component.

    Raises:
        BadWeightError, CalibrationError: as `quantize_weight`.
        CheckpointError: for what cannot be read.
    """
    if step.chosen is None:
        for value in _parts(step):
            yield {step.fqn: value}
        return
    candidate, config = step.chosen
    experts = 0
    for value in _parts(step):
        for matrix in _matrices(value, candidate, step.parts):
            own = stats.of_expert(experts) if stats is not None and len(candidate.shape) == 3 else stats
            yield components(step.fqn, _quantized(step.fqn, matrix, config, own, candidate.transposed))
            experts += 1


def check_twins(twins: list[tuple[Step, Step]], where: str) -> None:
    """Raises `CheckpointError` where the files hold different values for tied weights."""
    for first, second in twins:
        if _fingerprint(first) != _fingerprint(second):
            names = " and ".join(sorted({first.name, second.name} | {first.fqn}))
            raise CheckpointError(
                f"config.json ties {names}, but the checkpoint holds different values for them",
                where=where,
                hint='set "tie_word_embeddings": false in config.json',
            )


def _step(fqn: str, name: str, group: Group, plain: Spec, chosen: tuple[Candidate, QuantConfig] | None) -> Step:
    shape = plain[1] if chosen is None else chosen[0].shape
    stacked = len(shape) == 3 and (chosen is not None or len(group.inputs) > 1)
    count = shape[0] if stacked else 1
    written = {fqn: plain} if chosen is None else expected(fqn, entry_of(*chosen))
    return Step(fqn, name, group, plain, written, count if group.divides(count) else 1, chosen)


def _parts(step: Step) -> Iterator[Tensor]:
    """The plain value, some of the first dimension at a time."""
    dtype = step.plain[0]
    for i in range(step.parts):
        if step.parts == 1:
            yield step.group.read(dtype)[step.name].to(dtype)
        else:
            yield step.group.read_part(i, step.parts, dtype).to(dtype)


def _matrices(value: Tensor, candidate: Candidate, parts: int) -> Iterator[Tensor]:
    """The matrices [out, in], or [in, out], of a part of a weight."""
    shape = candidate.shape if parts == 1 else (1, *candidate.shape[1:])
    yield from value.reshape(-1, *shape[-2:])


def _quantized(
    fqn: str, matrix: Tensor, config: QuantConfig, stats: InputStats | None, transposed: bool
) -> QuantizedTensor:
    try:
        return quantize_weight(matrix, config, stats, transposed=transposed)
    except BadWeightError as error:
        raise BadWeightError(error.what, where=fqn, hint=error.hint) from error


def _fingerprint(step: Step) -> bytes:
    digest = hashlib.sha256()
    for value in _parts(step):
        digest.update(as_bytes(value))
    return digest.digest()


def dtypes(source: Source) -> Callable[[str, torch.dtype], torch.dtype]:
    """FQN and dtype in the file -> the dtype transformers gives it: the model's, but for what it keeps in float32."""
    if source.raw:
        return lambda fqn, found: found
    from transformers.core_model_loading import build_glob_alternation

    plan = source.skeleton._get_dtype_plan(source.dtype)  # type: ignore[operator]
    kept = build_glob_alternation(list(plan))[0] if plan else None

    def dtype_of(fqn: str, found: torch.dtype) -> torch.dtype:
        if not found.is_floating_point:
            return found
        return torch.float32 if kept is not None and kept.search(fqn) else source.dtype

    return dtype_of
