"""Quantizes a model block by block on some tokens: a block is calibrated on what the quantized ones before it give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llmquant.calibrate.capture import Capture
from llmquant.calibrate.collect import Batches, as_batches, collect_stats, wanted
from llmquant.calibrate.observers import MinMaxObserver, Observer
from llmquant.calibrate.walk import Batch, Block, Chain, find_blocks, walking
from llmquant.calibrate.watch import HESSIAN, Watch, weighed
from llmquant.config.base import QuantConfig
from llmquant.config.candidates import Candidate
from llmquant.config.recipe import to_config, to_pairs
from llmquant.measure.text import BUILTIN
from llmquant.primitives.stats import InputStats
from llmquant.quantize import InPlace, Progress, QuantizationReport, make_plan, quantize_
from llmquant.quantize.model import put_parameter
from llmquant.quantize.plan import needed_stats
from llmquant.tune.journal import Journal, fingerprint

DEFAULT_TOKENS = 65_536


def quantize_with_data_(
    model: nn.Module,
    config: Any,
    data: str | Sequence[str] | Tensor | Batches = BUILTIN,
    *,
    tokenizer: Any = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    imatrix: bool | Mapping[str, InputStats] = False,
    observer: Callable[[], Observer] = MinMaxObserver,
    journal: str | Path | None = None,
    progress: Progress | None = None,
    **windows: int,
) -> QuantizationReport:
    """Quantizes a model in place after, or while, showing it some tokens.

        quantize_with_data_(model, WeightOnlyConfig("int4", PerGroup(64), algorithm="gptq"), tokenizer=tokenizer)

    Algorithms that need the Hessian of a weight's inputs run block by block: what a block is calibrated on comes from
    the already quantized blocks before it. Where only ranges or mean squares are needed, the model reads the tokens
    once, as it is.

    Args:
        model, config, filter_fn: as for `quantize_`.
        data: what the model reads, as for `collect_stats`.
        tokenizer: that of the model; texts need it.
        imatrix: whether errors are weighed by the mean square of each column's inputs: yes, or what another run saw.
        observer: makes what finds the range of inputs, for static activations.
        journal: a folder for finished blocks. The same run, interrupted, goes on behind them and ends with equal bits;
            afterwards the folder is gone. None keeps nothing.
        progress: called with steps done, steps in all, and what is at work.
        **windows: `tokens` (default 65536), `context` and `seed` of `calibration_windows`.

    Returns:
        The report of `quantize_`; its warnings name experts that saw too few tokens, and weights for which an algorithm
        had to fall back to another.

    Raises:
        ConfigError, NothingToQuantizeError, AlreadyQuantizedError, BadWeightError, CalibrationError, TextError: as
        `quantize_` and `collect_stats`. The model is then as it was, also if the run is interrupted.
    """
    resolved = to_config(config)
    plan = make_plan(model, resolved, filter_fn)
    given = imatrix if isinstance(imatrix, Mapping) else {}
    if given and not plan.calibrated:
        return quantize_(model, resolved, filter_fn=filter_fn, stats=given, progress=progress)
    batches = as_batches(data, tokenizer, {"tokens": DEFAULT_TOKENS, **windows})
    if not any(HESSIAN in needed_stats(chosen) for _, chosen in plan.chosen):
        seen = collect_stats(
            model, resolved, batches, filter_fn=filter_fn, imatrix=imatrix is True, observer=observer, progress=progress
        )
        report = quantize_(model, resolved, filter_fn=filter_fn, stats=weighed(seen, given), progress=progress)
        report.warnings += seen.warnings
        return report
    work = InPlace(model, resolved, filter_fn)
    run = _Sequential(model, work, batches, imatrix, observer, progress)
    kept = Journal(Path(journal) if journal else None, run.fingerprint(to_pairs(resolved)))
    with _restored_on_error(model, work):
        run(kept)
        report = work.finish()
    kept.remove()
    return report


class _Sequential:
    """One run over a model's blocks."""

    def __init__(
        self,
        model: nn.Module,
        work: InPlace,
        batches: Sequence[Batch],
        imatrix: bool | Mapping[str, InputStats],
        observer: Callable[[], Observer],
        progress: Progress | None,
    ) -> None:
        self.model, self.work, self.batches, self.observer = model, work, batches, observer
        self.given = imatrix if isinstance(imatrix, Mapping) else {}
        self.fields = dict((c.name, fields) for c, fields in wanted(work.plan, imatrix=imatrix is True))
        self.progress, self.steps, self.total = progress, 0, 0

    def fingerprint(self, config: Any) -> str:
        """What two runs must share to end with equal bits."""
        words = [config, {name: sorted(fields) for name, fields in self.fields.items()}]
        given = [s.mean_square for _, s in sorted(self.given.items()) if s.mean_square is not None]
        tensors = [t for batch in self.batches for t in (batch.values() if isinstance(batch, Mapping) else [batch])]
        plain = [t for t in tensors if isinstance(t, Tensor)]
        return fingerprint(words, [*given, *plain, *self.model.parameters()])

    def __call__(self, journal: Journal) -> None:
        """Quantizes every block, then what lies outside of them."""
        with walking(self.model):
            blocks = find_blocks(self.model, self.batches[0])
            chain = Chain(self.model, blocks, self.batches)
            self.total = len(self.batches) * (2 * len(blocks) + 1)
            for block in blocks:
                members = [(c, q) for c, q in self.work.plan.chosen if c.name.startswith(block.name + ".")]
                self._part(block.name, members, partial(self._calls, chain, block), journal)
                self._run(chain.advance(), block.name)
            rest = [(c, q) for c, q in self.work.plan.chosen if c.name not in self.work.report.quantized]
            self._part("", rest, chain.finish, journal)

    def _part(
        self,
        name: str,
        members: Sequence[tuple[Candidate, QuantConfig]],
        passes: Callable[[], Iterator[Any]],
        journal: Journal,
    ) -> None:
        """Quantizes the weights of one block, or takes them as an interrupted run left them."""
        found = journal.load(name)
        if found is not None:
            self._run(iter(self.batches), name)
            for candidate, config in members:
                self.work.put(candidate, config, found["weights"][candidate.name])
            self.work.warn(*found["warnings"])
            return
        before = len(self.work.report.warnings)
        stats = self._observe(name, members, passes)
        weights = {c.name: self.work.quantize(c, config, stats.get(c.name)) for c, config in members}
        journal.save(name, {"weights": weights, "warnings": list(self.work.report.warnings[before:])})

    def _observe(
        self, name: str, members: Sequence[tuple[Candidate, QuantConfig]], passes: Callable[[], Iterator[Any]]
    ) -> Mapping[str, InputStats]:
        """What the weights of one block meet."""
        asked = [(c, self.fields[c.name]) for c, _ in members if c.name in self.fields]
        if not asked:
            self._run(iter(self.batches), name)
            return {}
        watch = Watch(self.model, asked, self.observer)
        with Capture(watch.watched):
            self._run(passes(), name)
        stats, warnings = watch.stats()
        self.work.warn(*warnings)
        return weighed(stats, {c.name: self.given[c.name] for c, _ in asked if c.name in self.given})

    def _calls(self, chain: Chain, block: Block) -> Iterator[Any]:
        return (call(block.module) for call in chain.calls())

    def _run(self, passes: Iterator[Any], name: str) -> None:
        for _ in passes:
            if self.progress:
                self.progress(self.steps, self.total, name)
            self.steps += 1


@contextmanager
def _restored_on_error(model: nn.Module, work: InPlace) -> Iterator[None]:
    """Puts the weights of a model back if it cannot be quantized to the end."""
    before = {c.fqns: model.get_parameter(c.name) for c, _ in work.plan.chosen}
    try:
        yield
    except BaseException:
        for fqns, parameter in before.items():
            put_parameter(model, fqns, parameter)
        raise
