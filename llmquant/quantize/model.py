"""Quantizes the weights of a model in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from llmquant.algorithms import Codes
from llmquant.config.base import QuantConfig
from llmquant.config.candidates import Candidate
from llmquant.config.fqn import FqnToConfig
from llmquant.config.recipe import to_config
from llmquant.primitives.stats import InputStats
from llmquant.quantize.plan import check_stats, make_plan
from llmquant.quantize.report import QuantizationReport, report_weight
from llmquant.quantize.weight import check_weight, quantize_weight
from llmquant.tensor import QuantizedTensor

Progress = Callable[[int, int, str], None]
"""Called with elements done, elements in all, and the FQN at work. Where that is an `Item`, bytes are counted."""


class Item(str):
    """The FQN at work, where what is done and to do are bytes.

    Attributes:
        tensors_done: how many tensors are done.
        tensors: of how many.
    """

    tensors_done: int
    tensors: int

    def __new__(cls, name: str, done: int, total: int) -> Item:
        """The FQN `name`, with the counts of tensors."""
        item = super().__new__(cls, name)
        item.tensors_done, item.tensors = done, total
        return item


def quantize_(
    model: nn.Module,
    config: Any,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    stats: Mapping[str, InputStats] | None = None,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Quantizes the weights of a model in place.

    Args:
        model: any module with linear, Conv1D, embedding or expert weights.
        config: a config, an `FqnToConfig`, a scheme (`"int4-g64"`), or a recipe's name or path.
        filter_fn: called with (module, FQN of the module); weights of modules for which it is false stay as they are.
        stats: FQN of a weight -> what a calibration run saw of its inputs, as `collect_stats` gives it.
        progress: called before each weight.

    Returns:
        A report of every weight. All checks are made before the first weight changes.

    Raises:
        ConfigError, NothingToQuantizeError, AlreadyQuantizedError, BadWeightError, CalibrationError.
    """
    work = InPlace(model, config, filter_fn)
    check_stats(work.plan, stats)
    total, done = sum(model.get_parameter(c.name).numel() for c, _ in work.plan.chosen), 0
    for candidate, chosen in work.plan.chosen:
        if progress:
            progress(done, total, candidate.name)
        done += model.get_parameter(candidate.name).numel()
        work.quantize(candidate, chosen, stats.get(candidate.name) if stats else None)
    if progress:
        progress(total, total, "")
    return work.finish()


AFTER_QUANTIZE: list[Callable[[nn.Module, FqnToConfig, QuantizationReport], None]] = []
"""Called after a model was quantized in place. Integrations register here."""


class InPlace:
    """A model on its way to being quantized, one weight after another, with a report of all.

    Attributes:
        plan: what is to be done. All checks that need no statistics are made before the first weight changes, but for
            those of values without `check`: where weights are not in memory yet, each is checked as it is quantized.
        report: what was done so far.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        filter_fn: Callable[[nn.Module, str], bool] | None = None,
        *,
        check: bool = True,
    ) -> None:
        self._started = time.perf_counter()
        self._model, self._config = model, to_config(config)
        self.plan = make_plan(model, self._config, filter_fn)
        for candidate, chosen in self.plan.chosen if check else []:
            check_weight(model.get_parameter(candidate.name), chosen, candidate.name)
        self.report = QuantizationReport(
            skipped=self.plan.skipped(model),
            warnings=self.plan.resolution.warnings,
            bytes_before=_parameter_bytes(model),
        )

    def quantize(
        self,
        candidate: Candidate,
        config: QuantConfig,
        stats: InputStats | None = None,
        codes: Sequence[Codes] | None = None,
    ) -> QuantizedTensor:
        """Quantizes one weight as `quantize_weight` does, and puts it into the model."""
        weight = self._model.get_parameter(candidate.name).reshape(candidate.shape)
        quantized = quantize_weight(
            weight,
            config,
            stats,
            transposed=candidate.transposed,
            codes=codes,
            note=lambda text: self.warn(f"{candidate.name}: {text}"),
        )
        self.put(candidate, config, quantized)
        return quantized

    def put(self, candidate: Candidate, config: QuantConfig, quantized: QuantizedTensor) -> None:
        """Puts a quantized weight into the model and into the report."""
        before = self._model.get_parameter(candidate.name).nbytes
        replace_weight(self._model, candidate.fqns, quantized)
        self.report.quantized[candidate.name] = report_weight(candidate.fqns, quantized, config, before)

    def warn(self, *warnings: str) -> None:
        """Tells the user in the report."""
        self.report.warnings += warnings

    def finish(self) -> QuantizationReport:
        """The report, after all weights."""
        self.report.bytes_after = _parameter_bytes(self._model)
        self.report.seconds = time.perf_counter() - self._started
        for callback in AFTER_QUANTIZE:
            callback(self._model, self._config, self.report)
        return self.report


def replace_weight(model: nn.Module, fqns: tuple[str, ...], weight: Tensor) -> None:
    """Puts one weight under all of its names, so that tied weights stay tied."""
    put_parameter(model, fqns, nn.Parameter(weight, requires_grad=False))


def put_parameter(model: nn.Module, fqns: tuple[str, ...], parameter: nn.Parameter) -> None:
    """Puts one parameter under all of its names."""
    for fqn in fqns:
        path, _, name = fqn.rpartition(".")
        setattr(model.get_submodule(path), name, parameter)


def _parameter_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())
