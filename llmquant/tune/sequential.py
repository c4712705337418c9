"""Quantizes a model block by block on some tokens: a block is calibrated on what the quantized ones before it give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from llmquant.algorithms import Codes
from llmquant.calibrate.capture import Capture
from llmquant.calibrate.collect import Batches, as_batches, collect_stats, wanted
from llmquant.calibrate.observers import Observer
from llmquant.calibrate.walk import Batch, Block, Chain, Held, find_blocks, walking
from llmquant.calibrate.watch import HESSIAN, Watch, weighed
from llmquant.config.base import QuantConfig
from llmquant.config.candidates import Candidate
from llmquant.config.fqn import FqnToConfig
from llmquant.config.recipe import to_config, to_pairs
from llmquant.formats import get_format
from llmquant.measure.text import BUILTIN
from llmquant.primitives.stats import InputStats
from llmquant.quantize import InPlace, Plan, Progress, QuantizationReport, make_plan, quantize_
from llmquant.quantize.model import put_parameter
from llmquant.quantize.plan import MODEL, needed_stats
from llmquant.tune.journal import Folder, Nothing, Parts, fingerprint
from llmquant.tune.signround import Learnable, learn_block

DEFAULT_TOKENS, DEFAULT_STEPS = 65_536, 50


def quantize_with_data_(
    model: nn.Module,
    config: Any,
    data: str | Sequence[str] | Tensor | Batches = BUILTIN,
    *,
    tokenizer: Any = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    imatrix: bool | Mapping[str, InputStats] = False,
    observer: str | Callable[[], Observer] = "minmax",
    steps: int = DEFAULT_STEPS,
    journal: str | Path | None = None,
    progress: Progress | None = None,
    **windows: int,
) -> QuantizationReport:
    """Quantizes a model in place after, or while, showing it some tokens.

        quantize_with_data_(model, WeightOnlyConfig("int4", PerGroup(64), algorithm="gptq"), tokenizer=tokenizer)

    Algorithms that need the Hessian of a weight's inputs (gptq) or the model itself (signround) run block by block:
    what a block is calibrated on comes from the already quantized blocks before it. Where only ranges or mean squares
    are needed, the model reads the tokens once, as it is.

    Args:
        model, config, filter_fn: as for `quantize_`.
        data: what the model reads, as for `collect_stats`.
        tokenizer: that of the model; texts need it.
        imatrix: whether errors are weighed by the mean square of each column's inputs: yes, or what another run saw.
        observer: what finds the range of inputs for static activations, as for `collect_stats`.
        steps: of signround, for each block.
        journal: a folder for finished blocks. The same run, interrupted, goes on behind them and ends with equal bits;
            afterwards the folder is gone. None keeps nothing. That of another run is refused (`UnfinishedRunError`).
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
    if not runs_by_blocks(plan):
        seen = collect_stats(
            model, resolved, batches, filter_fn=filter_fn, imatrix=imatrix is True, observer=observer, progress=progress
        )
        report = quantize_(model, resolved, filter_fn=filter_fn, stats=weighed(seen, given), progress=progress)
        report.warnings += seen.warnings
        return report
    work = InPlace(model, resolved, filter_fn)
    run = _Sequential(model, work, batches, imatrix, observer, steps, progress)
    with _kept(journal, lambda: run.fingerprint(to_pairs(resolved))) as parts, _restored_on_error(model, work):
        run(parts)
        return work.finish()


@contextmanager
def _kept(folder: str | Path | None, key: Callable[[], str]) -> Iterator[Parts]:
    """Where finished parts are kept; what is there is removed when the block ends well."""
    if folder is None:
        yield Nothing()
        return
    parts = Folder(Path(folder), key())
    try:
        yield parts
    except BaseException:
        parts.close()
        raise
    parts.remove()


def quantize_by_blocks(
    model: nn.Module,
    config: FqnToConfig,
    batches: Sequence[Batch],
    parts: Parts,
    held: Held,
    *,
    imatrix: Mapping[str, InputStats] = MappingProxyType({}),
    observer: str | Callable[[], Observer] = "minmax",
    steps: int = DEFAULT_STEPS,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Quantizes a model of which a block is in memory at a time, as `quantize_with_data_` does.

    Args:
        model: whose parameters may be on the meta device while nothing uses them.
        parts: what becomes of finished blocks.
        held: called with the FQN of a block, or with "" and the names of weights outside of blocks; has them in memory
            while what it gives is entered.
        config, batches, imatrix, observer, steps, progress: as there.

    Returns:
        The report without sizes. In the end the model is on the meta device; its weights are where `parts` has them.

    Raises:
        CalibrationError, BadWeightError: as there.
    """
    work = InPlace(model, config, check=False)
    run = _Sequential(model, work, batches, imatrix, observer, steps, progress, held)
    run(parts)
    return work.report


def runs_by_blocks(plan: Plan) -> bool:
    """Whether any weight is quantized on what the quantized blocks before it give."""
    return any(needed_stats(config) & {HESSIAN, MODEL} for _, config in plan.chosen)


Members = Sequence[tuple[Candidate, QuantConfig]]


def _all_there(block: str, names: Iterable[str]) -> AbstractContextManager[None]:
    return nullcontext()


class _Sequential:
    """One run over a model's blocks."""

    def __init__(
        self,
        model: nn.Module,
        work: InPlace,
        batches: Sequence[Batch],
        imatrix: bool | Mapping[str, InputStats],
        observer: str | Callable[[], Observer],
        learning_steps: int,
        progress: Progress | None,
        held: Held = _all_there,
    ) -> None:
        self.model, self.work, self.batches, self.observer = model, work, batches, observer
        self.given = imatrix if isinstance(imatrix, Mapping) else {}
        self.asked = {asked.candidate.name: asked for asked in wanted(work.plan, imatrix=imatrix is True)}
        self.learning_steps = learning_steps
        self.learns = any(MODEL in needed_stats(config) for _, config in work.plan.chosen)
        self.progress, self.steps, self.total = progress, 0, 0
        self.held = held

    def fingerprint(self, config: Any) -> str:
        """What two runs must share to end with equal bits."""
        words = [config, {name: sorted(asked.fields) for name, asked in self.asked.items()}, self.learning_steps]
        given = [s.mean_square for _, s in sorted(self.given.items()) if s.mean_square is not None]
        tensors = [t for batch in self.batches for t in (batch.values() if isinstance(batch, Mapping) else [batch])]
        plain = [t for t in tensors if isinstance(t, Tensor)]
        return fingerprint(words, [*given, *plain, *self.model.parameters()])

    def __call__(self, journal: Parts) -> None:
        """Quantizes every block, then what lies outside of them."""
        with walking(self.model):
            blocks = find_blocks(self.model, self.batches[0])
            quantized, plain = (Chain(self.model, blocks, self.batches) for _ in range(2))
            self.total = len(blocks) * (2 * len(self.batches) + self._steps_of_a_block()) + len(self.batches)
            for block in blocks:
                with self.held(block.name, ()):
                    targets = list(self._run(plain.advance(), block.name)) if self.learns else []
                    self._part(block.name, self._members(block), _Passes(quantized, block, targets), journal)
                    self._spend(self._run(quantized.advance(), block.name))
            rest = [(c, _not_learned(q)) for c, q in self.work.plan.chosen if c.name not in self.work.report.quantized]
            with self.held("", [candidate.name for candidate, _ in rest]):
                self._part("", rest, _Passes(quantized, None, []), journal)

    def _members(self, block: Block) -> Members:
        return [(c, q) for c, q in self.work.plan.chosen if c.name.startswith(block.name + ".")]

    def _steps_of_a_block(self) -> int:
        return len(self.batches) + self.learning_steps if self.learns else 0

    def _part(self, name: str, members: Members, passes: _Passes, journal: Parts) -> None:
        """Quantizes the weights of one block, or takes them as an interrupted run left them."""
        start = self.steps
        found = journal.load(name)
        if found is not None:
            for candidate, config in members:
                self.work.put(candidate, config, found.weights[candidate.name])
            self.work.warn(*found.warnings)
        else:
            before = len(self.work.report.warnings)
            stats = self._observe(name, members, passes)
            codes = self._learn(name, members, passes, stats)
            weights = {c.name: self.work.quantize(c, q, stats.get(c.name), codes.get(c.name)) for c, q in members}
            journal.save(name, weights, self.work.report.warnings[before:])
        self.steps = start + len(self.batches) + (self.learning_steps if self.learns and passes.block else 0)

    def _observe(self, name: str, members: Members, passes: _Passes) -> Mapping[str, InputStats]:
        """What the weights of one block meet."""
        asked = [self.asked[c.name] for c, _ in members if c.name in self.asked]
        if not asked:
            return {c.name: self.given[c.name] for c, _ in members if c.name in self.given}
        watch = Watch(self.model, asked, self.observer)
        with Capture(watch.watched):
            self._spend(self._run(passes(), name))
        stats, warnings = watch.stats()
        self.work.warn(*warnings)
        return weighed(stats, {name: self.given[name] for name in stats if name in self.given})

    def _learn(
        self, name: str, members: Members, passes: _Passes, stats: Mapping[str, InputStats]
    ) -> Mapping[str, Sequence[Codes]]:
        """Codes of the weights of one block whose algorithm runs it."""
        chosen = {c.name: Learnable(c, q, stats.get(c.name)) for c, q in members if MODEL in needed_stats(q)}
        if not chosen or passes.block is None:
            return {}
        inside = {found.removeprefix(name + "."): weight for found, weight in chosen.items()}
        inputs = [(call.args, call.kwargs) for call in passes.chain.calls()]
        targets = [output if isinstance(output, Tensor) else output[0] for output in passes.targets]
        codes = learn_block(
            passes.block.module,
            inside,
            inputs,
            targets,
            steps=self.learning_steps,
            progress=lambda done, total: self._tell(name),
        )
        return {f"{name}.{inner}": found for inner, found in codes.items()}

    def _run(self, passes: Iterator[Any], name: str) -> Iterator[Any]:
        for found in passes:
            self._tell(name)
            yield found

    def _spend(self, passes: Iterator[Any]) -> None:
        for _ in passes:
            pass

    def _tell(self, name: str) -> None:
        if self.progress:
            self.progress(self.steps, self.total, name)
        self.steps += 1


@dataclass(frozen=True)
class _Passes:
    """Passes of all batches through one block, or behind the last one: of the quantized model as it is so far.

    Attributes:
        chain: where the batches are.
        block: the next one; None for what lies outside of blocks.
        targets: what the unquantized block gives behind unquantized ones, if that is needed.
    """

    chain: Chain
    block: Block | None
    targets: Sequence[Any]

    def __call__(self) -> Iterator[Any]:
        if self.block is None:
            return self.chain.finish()
        module = self.block.module
        return (call(module) for call in self.chain.calls())


def _not_learned(config: QuantConfig) -> QuantConfig:
    """A config for weights outside of blocks: there is no output of a block to learn from."""
    plain = get_format(config.format).algorithms[0]
    return config.with_algorithm(plain) if MODEL in needed_stats(config) else config


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
