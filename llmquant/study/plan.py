"""From a study to jobs and to the lines of its results: what is known by which key, and what needs what."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmquant.checkpoint.source import Source, locate, open_source
from llmquant.errors import LlmQuantError, MissingDependencyError, StudyError
from llmquant.measure.text import Text, load_text
from llmquant.quantize import make_plan
from llmquant.study import keys
from llmquant.study.candidates import Candidate, find_candidates
from llmquant.study.job import Job, describe_error
from llmquant.study.spec import Study
from llmquant.study.store import Store


@dataclass(frozen=True)
class Line:
    """A line of the results: a model, a candidate (or the reference, or the noise floor) and a text.

    Attributes:
        model, label, kind, text: as in results.jsonl.
        keys: part of a result (`model`, `quality`, ...) -> key of the job that gives it.
        candidate: what was tried; None for the reference and the noise floor.
        error: why nothing can be tried.
    """

    model: str
    label: str
    kind: str
    text: str
    keys: Mapping[str, str]
    candidate: Candidate | None = None
    error: Mapping[str, Any] | None = None

    def parts(self) -> list[str]:
        """Keys of the jobs whose results it shows."""
        return [key for part, key in self.keys.items() if part != "model"]


@dataclass
class Plan:
    """All that a study asks for.

    Attributes:
        lines: of its results.
        jobs: by key, in the order in which they are best done.
        notes: what the user should know.
        sizes: key -> bytes that a job's file or folder takes, estimated.
    """

    lines: list[Line] = field(default_factory=list)
    jobs: dict[str, Job] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)


def plan_study(study: Study, store: Store, threads: int, threads_alone: int | None = None) -> Plan:
    """Plans a study.

    Args:
        study: what is asked for.
        store: where files will lie; nothing is written but hashes that were computed are remembered.
        threads: of each cell.
        threads_alone: of a cell that runs alone; None is the same.

    Raises:
        StudyError: for models, recipes and texts that cannot be.
        MissingDependencyError: for tasks without lm-eval.
    """
    if study.measures("tasks"):
        _require_lm_eval()
    candidates, left_out = find_candidates(study)
    planner = _Planner(study, store, threads, threads_alone or threads)
    planner.plan.notes += [f"left out: {pair}" for pair in left_out]
    names = _short_names(study.models)
    for index, model in enumerate(study.models):
        try:
            source = open_source(locate(model))
        except LlmQuantError as error:
            raise StudyError(error.what, where=f"models[{index}], {error.where or model}", hint=error.hint) from error
        planner.add_model(names[index], source, candidates)
    return planner.plan


class _Planner:
    """Adds model after model to a plan."""

    def __init__(self, study: Study, store: Store, threads: int, threads_alone: int) -> None:
        self.study, self.store, self.threads, self.threads_alone = study, store, threads, threads_alone
        self.plan = Plan()
        self.texts = [self._text(name, "test", f"texts[{i}]") for i, name in enumerate(study.texts)]
        self.calibration: Text | None = None

    def add_model(self, name: str, source: Source, candidates: list[Candidate]) -> None:
        """The reference, the noise floor and all candidates on one model."""
        model = _Model(name, source, keys.model_key(source.folder, self.store.digests))
        references = [self._reference(model, text) for text in self.texts]
        if self.study.measures("noise"):
            for text, reference in zip(self.texts, references, strict=True):
                self._noise(model, text, reference)
        for text, reference in zip(self.texts, references, strict=True):
            parts = {"reference": reference, **self._tasks(model, model.key, str(source.folder), "16 bits", ())}
            self._line(model, text, "16 bits", "reference", parts)
        tried = [self._candidate(model, candidate, references) for candidate in candidates]
        self._performance(model, model.key, str(source.folder), "16 bits", ())
        for candidate, key in zip(candidates, tried, strict=True):
            if key is not None:
                self._performance(model, key, str(self.store.model(key)), candidate.label, (key,))

    # --- jobs -----------------------------------------------------------------------------------------

    def _reference(self, model: _Model, text: Text) -> str:
        dtype = self.study.reference.dtype or self.study.dtype
        asked = (self.study.context, self.study.windows, dtype, self.threads)
        key = keys.reference_key(model.key, text.sha256, *asked)
        arguments = {**self._reads(model.folder, text, dtype), "path": str(self.store.reference(key))}
        self._add("reference", key, f"{model.name} on {text.name}: reference", arguments)
        vocabulary = model.source.skeleton.get_input_embeddings().weight.shape[0]  # type: ignore[operator,union-attr]
        self.plan.sizes[key] = 2 * int(vocabulary) * self._tokens(text)
        return key

    def _noise(self, model: _Model, text: Text, reference: str) -> None:
        key = keys.noise_key(reference)
        dtype = self.study.reference.dtype or self.study.dtype
        arguments = {**self._reads(model.folder, text, dtype), "reference": str(self.store.reference(reference))}
        self._add("noise", key, f"{model.name} on {text.name}: noise floor", arguments, (reference,))
        self._line(model, text, "noise floor", "noise", {"quality": key})

    def _candidate(self, model: _Model, candidate: Candidate, references: list[str]) -> str | None:
        """The jobs and lines of one candidate; the key of the quantized model, None if it cannot be one."""
        try:
            quantized = self._quantize(model, candidate)
        except LlmQuantError as error:
            for text in self.texts:
                self._line(model, text, candidate.label, "candidate", {}, candidate, describe_error(error))
            return None
        folder = str(self.store.model(quantized))
        shared = {"quantize": quantized, **self._tasks(model, quantized, folder, candidate.label, (quantized,))}
        for text, reference in zip(self.texts, references, strict=True):
            parts = dict(shared)
            if self.study.measures("quality"):
                parts["quality"] = self._quality(model, text, candidate.label, quantized, reference)
            self._line(model, text, candidate.label, "candidate", parts, candidate)
        return quantized

    def _quantize(self, model: _Model, candidate: Candidate) -> str:
        found = make_plan(model.source.skeleton, candidate.what.config)
        weights = {c.name: chosen.to_dict() for c, chosen in found.chosen}
        changes, budget = candidate.what.changes, candidate.budget()
        spent = None
        if budget:
            spent = {"bits": budget.bits, "options": [option.to_dict() for option in budget.options()]}
        read = self._calibration() if found.calibrated or changes.migrate or budget else None
        key = keys.quantized_key(
            model.key,
            weights,
            {"rotate": changes.rotate, "migrate": changes.migrate},
            read and {k: v for k, v in read.items() if k != "text"},
            spent,
            self.threads if read or changes.rotate else None,
        )
        arguments = {
            "model": str(model.folder),
            "candidate": candidate.to_dict(),
            "calibration": read,
            "output": str(self.store.model(key)),
            "scores": str(self.store.folder / "scores"),
        }
        self._add("quantize", key, f"{model.name}, {candidate.label}: quantize", arguments)
        self.plan.sizes[key] = _bytes_under(model.source, found.chosen)
        return key

    def _quality(self, model: _Model, text: Text, label: str, quantized: str, reference: str) -> str:
        key = keys.quality_key(quantized, reference, self.study.dtype)
        arguments = {
            **self._reads(self.store.model(quantized), text, self.study.dtype),
            "reference": str(self.store.reference(reference)),
        }
        self._add("quality", key, f"{model.name}, {label} on {text.name}", arguments, (reference, quantized))
        return key

    def _tasks(self, model: _Model, of: str, folder: str, label: str, needs: tuple[str, ...]) -> dict[str, str]:
        if not self.study.measures("tasks"):
            return {}
        options = self.study.task_options
        own = keys.folder_key(Path(options.path), self.store.digests) if options.path else None
        names = sorted(set(self.study.tasks))
        files = [self.store.digests(Path(name)) for name in names if Path(name).is_file()]
        asked = {"names": names, "files": files, "path": own, "limit": options.limit, "batch": options.batch_size}
        key = keys.tasks_key(of, asked, self.study.dtype, self.threads)
        path = options.path and str(Path(options.path).resolve())
        arguments = {
            **{"model": folder, "names": names, "dtype": self.study.dtype},
            "options": {"path": path, "limit": options.limit, "batch_size": options.batch_size},
        }
        self._add("tasks", key, f"{model.name}, {label}: tasks", arguments, needs)
        return {"tasks": key}

    def _performance(self, model: _Model, of: str, folder: str, label: str, needs: tuple[str, ...]) -> None:
        """Sizes and speed, and the lines that show them."""
        speed = self.study.measures("speed")
        if not (speed or self.study.measures("size")):
            return
        asked = {**self.study.speed.model_dump(), "speed": speed}
        key = keys.performance_key(of, model.key, asked, self.threads_alone)
        arguments = {"model": folder, "plain": str(model.folder), **asked}
        self._add("performance", key, f"{model.name}, {label}: size and speed", arguments, needs, alone=True)
        for index, line in enumerate(self.plan.lines):
            if line.model == model.name and line.label == label:
                self.plan.lines[index] = _with_part(line, "performance", key)

    # --- parts of them --------------------------------------------------------------------------------

    def _add(
        self,
        kind: str,
        key: str,
        title: str,
        arguments: Mapping[str, Any],
        needs: tuple[str, ...] = (),
        alone: bool = False,
    ) -> None:
        threads = self.threads_alone if alone else self.threads
        self.plan.jobs.setdefault(key, Job(kind, key, title, arguments, needs, threads, alone))

    def _line(
        self,
        model: _Model,
        text: Text,
        label: str,
        kind: str,
        parts: Mapping[str, str],
        candidate: Candidate | None = None,
        error: Mapping[str, Any] | None = None,
    ) -> None:
        known = {"model": model.key, **parts}
        self.plan.lines.append(Line(model.name, label, kind, text.name, known, candidate, error))

    def _reads(self, folder: Path, text: Text, dtype: str) -> dict[str, Any]:
        asked = {"context": self.study.context, "windows": self.study.windows}
        return {"model": str(folder), "text": {"name": text.name, "sha256": text.sha256, **asked}, "dtype": dtype}

    def _calibration(self) -> dict[str, Any]:
        """The text that is read, loaded once; a note if it is measured on too."""
        asked = self.study.calibration
        if self.calibration is None:
            self.calibration = self._text(asked.text, "train", "calibration.text")
            for text in self.texts:
                if text.sha256 == self.calibration.sha256:
                    self.plan.notes.append(
                        f"{text.name} is calibrated on and measured on: recipes that read it look better than they are"
                    )
        return {**asked.model_dump(), "sha256": self.calibration.sha256}

    def _text(self, name: str, split: str, place: str) -> Text:
        try:
            return load_text(name, split)
        except LlmQuantError as error:
            raise StudyError(error.what, where=f"{place}, {error.where or name}", hint=error.hint) from error

    def _tokens(self, text: Text) -> int:
        """At most so many tokens are scored: no token of a text is shorter than a byte."""
        most = len(text.content.encode())
        return min(self.study.context * self.study.windows or most, most)


@dataclass(frozen=True)
class _Model:
    name: str
    source: Source
    key: str

    @property
    def folder(self) -> Path:
        return self.source.folder.resolve()


def _with_part(line: Line, part: str, key: str) -> Line:
    known = {**line.keys, part: key}
    return Line(line.model, line.label, line.kind, line.text, known, line.candidate, line.error)


def _bytes_under(source: Source, chosen: Any) -> int:
    """Bytes of a quantized model; for a budget, under what is assumed before it has chosen."""
    from llmquant.tune.bank import bytes_under

    names = {candidate.name for candidate, _ in chosen}
    plain = sum(p.nbytes for name, p in source.skeleton.named_parameters() if name not in names)
    return plain + sum(bytes_under(candidate, config) for candidate, config in chosen)


def _require_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependencyError("tasks need the package lm-eval", hint="pip install llmquant[tasks]")


def _short_names(models: tuple[str, ...]) -> list[str]:
    """The last part of each, or all of it where two end alike."""
    names = [Path(model).resolve().name if Path(model).exists() else model.rpartition("/")[2] for model in models]
    return [name if names.count(name) == 1 else model for name, model in zip(names, models, strict=True)]
