"""A checkpoint quantized from disk to disk, or block by block, after the plain model has read a text if need be."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmquant.checkpoint.crew import ALONE, Crew, work_through
from llmquant.checkpoint.origin import Origin
from llmquant.convert.listener import Listener, Silent
from llmquant.errors import CalibrationError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from llmquant.config.fqn import FqnToConfig
    from llmquant.primitives.stats import InputStats
    from llmquant.quantize import QuantizationReport

FEW_TOKENS = 8192
"""Enough for ranges and mean squares."""


@dataclass(frozen=True)
class Reading:
    """What of which text is read, and how; None stands for a default.

    Attributes:
        text, tokens, seed: as for `calibration_windows`.
        observer: name of what finds the range of static activations.
        steps: in which signround learns each block.
    """

    text: str | None = None
    tokens: int | None = None
    seed: int = 0
    observer: str | None = None
    steps: int | None = None


class Calibrating:
    """A checkpoint that is to be quantized, and what must be read for it.

    Args:
        model: folder, hub id or `Origin` of a plain checkpoint.
        config: what becomes of its weights.
        reading: the text.
        imatrix: where the importance of columns is kept, if errors are to be weighed by it.
        dtype: name of the dtype to load in.
        was_read: whether the text has been of use already.
        listener: hears how it goes.

    Raises:
        ConfigError: for a text that nothing needs.
    """

    def __init__(
        self,
        model: str | Origin,
        config: FqnToConfig,
        reading: Reading,
        imatrix: Path | None = None,
        dtype: str = "auto",
        *,
        was_read: bool = False,
        listener: Listener | None = None,
    ) -> None:
        from llmquant.calibrate.observers import observer_factory
        from llmquant.checkpoint.source import open_source, parse_dtype
        from llmquant.quantize import make_plan
        from llmquant.quantize.plan import MODEL, needed_stats
        from llmquant.tune.sequential import runs_by_blocks

        observer_factory(reading.observer or "minmax", None)  # a misspelt name shows before a model is loaded
        self.origin = model
        self.source = open_source(model, parse_dtype(dtype))
        self.config, self.reading, self.imatrix = config, reading, imatrix
        self.listener = listener or Silent()
        self.plan = make_plan(self.source.skeleton, config)
        self.needs_blocks = runs_by_blocks(self.plan)
        kept = imatrix is not None and imatrix.exists()
        self.reads = bool(self.plan.calibrated) or (imatrix is not None and not kept)
        if reading.text is not None and not (self.reads or was_read):
            raise ConfigError(
                "nothing here needs --calib", hint="it is for --algorithm gptq, --imatrix and schemes like s8-int8"
            )
        if reading.observer is not None and not any("low" in needed_stats(q) for _, q in self.plan.chosen):
            raise ConfigError(
                "nothing here needs --observer: it is for static activations", hint="for instance s8-int8"
            )
        if reading.steps is not None and not any(MODEL in needed_stats(q) for _, q in self.plan.chosen):
            raise ConfigError("nothing here learns in --steps", hint="--algorithm signround does")

    def write(
        self, output: Path, overwrite: bool, max_shard_bytes: int, crew: Crew = ALONE, ignore_memory: bool = False
    ) -> QuantizationReport:
        """Writes the quantized checkpoint in the way that its algorithms need."""
        way = self.by_blocks if self.needs_blocks else self.streamed
        return way(output, overwrite, max_shard_bytes, crew, ignore_memory)

    def streamed(
        self, output: Path, overwrite: bool, max_shard_bytes: int, crew: Crew, ignore_memory: bool
    ) -> QuantizationReport:
        """Quantizes from disk to disk, after the plain model has read the text where that is needed."""
        from llmquant.checkpoint.stream import quantize_checkpoint

        stats = self.stats()
        with self.listener.bar("Quantizing") as progress:
            return quantize_checkpoint(
                self.origin,
                output,
                self.config,
                stats=stats,
                dtype=self.source.dtype,
                overwrite=overwrite,
                max_shard_bytes=max_shard_bytes,
                jobs=crew.jobs,
                max_memory=crew.max_memory,
                ignore_memory=ignore_memory,
                progress=progress,
            )

    def by_blocks(
        self, output: Path, overwrite: bool, max_shard_bytes: int, crew: Crew, ignore_memory: bool
    ) -> QuantizationReport:
        """Quantizes block by block while the model reads the text; one block is in memory, the rest on the disk."""
        from llmquant.checkpoint.lazy import LazyModel
        from llmquant.checkpoint.output import unfinished
        from llmquant.checkpoint.steps import check_twins
        from llmquant.checkpoint.stream import Job
        from llmquant.convert.written import Written
        from llmquant.tune.journal import fingerprint
        from llmquant.tune.sequential import DEFAULT_STEPS, DEFAULT_TOKENS, quantize_by_blocks

        started = time.perf_counter()
        windows, importance = self._windows(DEFAULT_TOKENS), self._importance()
        steps = self.reading.steps or DEFAULT_STEPS
        words = [fingerprint([self._observer, steps], [windows])]
        job = Job(self.source, self.config, self.plan, max_shard_bytes, importance, words)
        check_twins(job.work.twins, str(self.source.folder))
        job.needs(output, crew).check(output, ignore_memory=ignore_memory)
        with unfinished(output, job.key, job.layouts, overwrite) as out, self.listener.bar("Quantizing") as progress:
            lazy, batches = LazyModel(self.source), list(windows.split(1))
            report = quantize_by_blocks(
                *(lazy.model, self.config, batches, Written(job, out), lazy.held),
                imatrix=importance,
                observer=self._observer,
                steps=steps,
                progress=progress,
            )
            lazy.drop()
            work_through(job.tasks(out, steps=[s for s in job.work.steps if s.chosen is None]), crew)
            job.write_rest(out)
        self._say(int(windows.numel()))
        planned = job.report()
        report.bytes_before, report.bytes_after = planned.bytes_before, planned.bytes_after
        report.seconds = time.perf_counter() - started
        return report

    def stats(self) -> Mapping[str, InputStats]:
        """What the plain model's weights meet: ranges for static activations, mean squares for importance."""
        from llmquant.calibrate.walk import collect_by_blocks
        from llmquant.calibrate.watch import weighed
        from llmquant.checkpoint.lazy import LazyModel

        importance = self._importance()
        if not self.plan.calibrated:
            return importance
        windows = self._windows(FEW_TOKENS)
        with self.listener.bar("Calibrating") as progress:
            lazy = LazyModel(self.source)
            found = collect_by_blocks(
                *(lazy.model, self.config, list(windows.split(1)), lazy.held),
                observer=self._observer,
                progress=progress,
            )
        self._warn(found.warnings)
        self._say(found.tokens)
        return weighed(found, importance)

    @property
    def _observer(self) -> str:
        return self.reading.observer or "minmax"

    def _importance(self) -> dict[str, InputStats]:
        """The importance of columns: from the file, or gathered and written to it."""
        from llmquant.calibrate.imatrix import load_imatrix, save_imatrix
        from llmquant.calibrate.walk import collect_by_blocks
        from llmquant.checkpoint.lazy import LazyModel

        if self.imatrix is None:
            return {}
        if self.imatrix.exists():
            return load_imatrix(self.imatrix, self.plan)
        windows = self._windows(FEW_TOKENS)
        with self.listener.bar("Importance") as progress:
            lazy = LazyModel(self.source)
            found = collect_by_blocks(
                *(lazy.model, self._plain(), list(windows.split(1)), lazy.held), imatrix=True, progress=progress
            )
        self._warn(found.warnings)
        about = {"text": self.reading.text or "builtin", "tokens": str(found.tokens), "seed": str(self.reading.seed)}
        save_imatrix(found, self.imatrix, about)
        self.listener.say(f"importance of {len(found)} weights written to {self.imatrix}")
        return dict(found)

    def _plain(self) -> FqnToConfig:
        """The config with the formats' default algorithms and no activations: it needs nothing but the importance."""
        from llmquant.config.base import QuantConfig, WeightOnlyConfig
        from llmquant.config.fqn import FqnToConfig

        return FqnToConfig(
            {
                key: WeightOnlyConfig(value.format, value.granularity) if isinstance(value, QuantConfig) else None
                for key, value in self.config.items()
            }
        )

    def _windows(self, default: int) -> Tensor:
        """Token windows of the text. Raises `CalibrationError` for a model that reads more than one text at a time."""
        from llmquant.calibrate.data import calibration_windows
        from llmquant.integrations.loading import load_tokenizer

        if self.source.config.get("is_encoder_decoder"):
            raise CalibrationError(
                "an encoder and a decoder read two texts, of which --calib has one",
                where=str(self.source.folder),
                hint="in Python, llmquant.quantize_with_data_ with batches of your own",
            )
        tokenizer, text = load_tokenizer(self.source.folder), self.reading.text or "builtin"
        tokens = default if self.reading.tokens is None else self.reading.tokens
        return calibration_windows(tokenizer, text, tokens=tokens, seed=self.reading.seed)

    def _say(self, tokens: int) -> None:
        text, seed = self.reading.text or "builtin", self.reading.seed
        self.listener.say(f"calibrated on {tokens} tokens of {text} (seed {seed})")

    def _warn(self, warnings: tuple[str, ...]) -> None:
        for warning in warnings:
            self.listener.warn(warning)
