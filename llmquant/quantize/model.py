"""Quantizes the weights of a model in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from llmquant.config.fqn import FqnToConfig
from llmquant.config.recipe import to_config
from llmquant.primitives.stats import InputStats
from llmquant.quantize.plan import check_stats, make_plan
from llmquant.quantize.report import QuantizationReport, report_weight
from llmquant.quantize.weight import check_weight, quantize_weight

Progress = Callable[[int, int, str], None]
"""Called with elements done, elements in all, and the FQN at work."""


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
    started = time.perf_counter()
    resolved = to_config(config)
    plan = make_plan(model, resolved, filter_fn)
    check_stats(plan, stats)
    for candidate, chosen in plan.chosen:
        check_weight(model.get_parameter(candidate.name), chosen, candidate.name)
    report = QuantizationReport(
        skipped=plan.skipped(model), warnings=plan.resolution.warnings, bytes_before=_parameter_bytes(model)
    )
    total, done = sum(model.get_parameter(c.name).numel() for c, _ in plan.chosen), 0
    for candidate, chosen in plan.chosen:
        if progress:
            progress(done, total, candidate.name)
        weight = model.get_parameter(candidate.name)
        done += weight.numel()
        found = stats.get(candidate.name) if stats else None
        quantized = quantize_weight(weight.reshape(candidate.shape), chosen, found, transposed=candidate.transposed)
        replace_weight(model, candidate.fqns, quantized)
        report.quantized[candidate.name] = report_weight(candidate.fqns, quantized, chosen, weight.nbytes)
    if progress:
        progress(total, total, "")
    report.bytes_after = _parameter_bytes(model)
    report.seconds = time.perf_counter() - started
    for callback in AFTER_QUANTIZE:
        callback(model, resolved, report)
    return report


AFTER_QUANTIZE: list[Callable[[nn.Module, FqnToConfig, QuantizationReport], None]] = []
"""Called after a model was quantized in place. Integrations register here."""


def replace_weight(model: nn.Module, fqns: tuple[str, ...], weight: Tensor) -> None:
    """Puts one parameter under all of its names, so that tied weights stay tied."""
    parameter = nn.Parameter(weight, requires_grad=False)
    for fqn in fqns:
        path, _, name = fqn.rpartition(".")
        setattr(model.get_submodule(path), name, parameter)


def _parameter_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())
