"""`prepare` a model for training, `convert` it afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from llmquant.config.base import QuantConfig
from llmquant.config.candidates import Candidate
from llmquant.config.recipe import to_config, with_algorithm
from llmquant.errors import AlreadyQuantizedError, ConfigError, NotPreparedError
from llmquant.formats import METHODS, get_format
from llmquant.primitives.stats import InputStats
from llmquant.qat.hooks import FakeQuantizer, Preparation, fake_quantizers
from llmquant.qat.report import PreparationReport, PreparedWeight
from llmquant.quantize import (
    AFTER_QUANTIZE,
    Plan,
    Progress,
    QuantizationReport,
    check_stats,
    check_weight,
    make_plan,
    replace_weight,
    report_weight,
)


def prepare(
    model: nn.Module,
    config: Any,
    *,
    algorithm: str | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    stats: Mapping[str, InputStats] | None = None,
) -> PreparationReport:
    """Makes a model compute as if it were quantized, and keeps it trainable.

    While a module runs, its weight is what `quantize_` would make of it, and its inputs are quantized where the config
    says so: outputs are those of the quantized model on the reference backend, bit for bit. Gradients go straight
    through the rounding (see `qat.straight`). Between forwards parameters are the plain floats that they were: any
    training loop runs unchanged, optimizers may be made before or after, a state dict has the keys and values of the
    plain model, and `save_pretrained` writes one.

    Codes and scales are made anew in every forward, also in eval mode and under gradient checkpointing. `search` takes
    about ten times as long for that as `rtn`; to train long, ask for `algorithm="rtn"`. In 16 bits steps smaller than
    1/256 of a weight vanish: train in float32, with autocast if you like.

    Args:
        model: any module with linear, Conv1D, embedding or expert weights, in floats.
        config: what `quantize_` takes.
        algorithm: replaces the config's, in every weight whose format has it; `convert` uses the same.
        filter_fn: as for `quantize_`.
        stats: as for `quantize_`; static activations need the range of their inputs (`collect_stats`). It stays as it
            is while the model trains.

    Returns:
        A report of every weight. All checks are made before anything changes.

    Raises:
        ConfigError: for an algorithm that needs a calibration run, which would have to come before every step.
        AlreadyQuantizedError: for a model that is quantized, or prepared, already.
        NothingToQuantizeError, BadWeightError, CalibrationError: as `quantize_`.
    """
    if is_prepared(model):
        raise AlreadyQuantizedError(
            "the model is prepared already",
            where=next(fake_quantizers(model))[0],
            hint="convert() it first; one FqnToConfig can hold several schemes",
        )
    resolved = to_config(config)
    resolved = with_algorithm(resolved, algorithm) if algorithm else resolved
    plan = make_plan(model, resolved, filter_fn)
    _check(model, plan, stats)
    report = _report(model, plan)
    preparation = Preparation(resolved, report.skipped, report.warnings)
    for candidate, chosen in plan.chosen:
        for fqn in candidate.fqns:
            owner, *around = _readers(model, fqn)
            own = (stats or {}).get(candidate.name)
            FakeQuantizer(candidate, owner, fqn.rpartition(".")[2], chosen, own, preparation).attach(owner, *around)
    _run_experts_one_by_one(model)
    return report


def convert(model: nn.Module, *, progress: Progress | None = None) -> QuantizationReport:
    """Quantizes a prepared model in place, as it is now, with the configs that `prepare` was given.

    Codes and scales are those of the last forward, unless weights changed since; then those that the next one would
    have had. The result is what `quantize_` gives, ready to be saved.

    Args:
        model: that of `prepare`, a deep copy of it, or a module around it.
        progress: called before each weight.

    Raises:
        NotPreparedError: for any other model.
        BadWeightError: for weights that training made NaN or infinite; the model is as it was then.
    """
    started = time.perf_counter()
    found = _by_weight(model)
    for fqns, quantizers in found.values():
        check_weight(model.get_parameter(fqns[0]), quantizers[0].config, fqns[0])
    preparation = next(iter(found.values()))[1][0].preparation
    report = QuantizationReport(
        skipped=dict(preparation.skipped),
        warnings=preparation.warnings + _unused(found),
        bytes_before=_parameter_bytes(model),
    )
    total, done = sum(model.get_parameter(fqns[0]).numel() for fqns, _ in found.values()), 0
    for fqns, quantizers in found.values():
        if progress:
            progress(done, total, fqns[0])
        weight = model.get_parameter(fqns[0])
        quantized = quantizers[0].quantize(weight)
        for quantizer in quantizers:
            quantizer.detach()
        replace_weight(model, fqns, quantized)
        report.quantized[fqns[0]] = report_weight(fqns, quantized, quantizers[0].config, weight.nbytes)
        done += weight.numel()
    if progress:
        progress(total, total, "")
    report.bytes_after = _parameter_bytes(model)
    report.seconds = time.perf_counter() - started
    for callback in AFTER_QUANTIZE:
        callback(model, preparation.config, report)
    return report


def is_prepared(model: nn.Module) -> bool:
    """Whether a model has weights from `prepare` that were not converted yet."""
    return next(fake_quantizers(model), None) is not None


# --- preparing ------------------------------------------------------------------------------------------


def _check(model: nn.Module, plan: Plan, stats: Mapping[str, InputStats] | None) -> None:
    for candidate, config in plan.chosen:
        if METHODS[config.algorithm or "rtn"].needs:
            raise ConfigError(
                f"{config.algorithm} cannot be repeated at every step of a training",
                where=candidate.name,
                hint='algorithm="rtn", or another of ' + ", ".join(_repeatable(config)),
            )
    check_stats(plan, stats)
    for candidate, config in plan.chosen:
        check_weight(model.get_parameter(candidate.name), config, candidate.name)


def _repeatable(config: QuantConfig) -> list[str]:
    return [name for name in get_format(config.format).algorithms if not METHODS[name].needs]


def _report(model: nn.Module, plan: Plan) -> PreparationReport:
    prepared = {c.name: _prepared(c, config, model.get_parameter(c.name)) for c, config in plan.chosen}
    small = [c.name for c, _ in plan.chosen if c.dtype in (torch.bfloat16, torch.float16) and prepared[c.name].trains]
    warnings = tuple(plan.resolution.warnings)
    if small:
        warnings += (f"{len(small)} weights learn in 16 bits, where small steps vanish; float32 keeps them",)
    return PreparationReport(prepared, plan.skipped(model), warnings)


def _prepared(candidate: Candidate, config: QuantConfig, weight: Tensor) -> PreparedWeight:
    return PreparedWeight(
        candidate.fqns, candidate.shape, config.scheme, config.algorithm or "", trains=weight.requires_grad
    )


def _readers(model: nn.Module, fqn: str) -> list[nn.Module]:
    """The owner of a parameter, and the module around it."""
    path = fqn.rpartition(".")[0]
    return [model.get_submodule(p) for p in ([path, path.rpartition(".")[0]] if path else [""])]


def _run_experts_one_by_one(model: nn.Module) -> None:
    """The grouped product of transformers knows no packed weights; `convert` leaves models so, too."""
    if hasattr(model, "set_experts_implementation"):
        cast(Any, model).set_experts_implementation("eager")


# --- converting -----------------------------------------------------------------------------------------

_Found = dict[int, tuple[tuple[str, ...], list[FakeQuantizer]]]


def _by_weight(model: nn.Module) -> _Found:
    """Each prepared weight: its names as they are now, the one of `prepare`'s report first, and its hooks."""
    names: dict[int, list[str]] = {}
    found: dict[int, list[FakeQuantizer]] = {}
    for fqn, quantizer in fake_quantizers(model):
        parameter = model.get_parameter(fqn)
        names.setdefault(id(parameter), []).append(fqn)
        found.setdefault(id(parameter), []).append(quantizer)
    if not found:
        raise NotPreparedError(
            "the model was not prepared", hint="llmquant.qat.prepare(model, config) before training; else quantize_"
        )
    ordered = {key: tuple(sorted(names[key], key=_leads(found[key][0].candidate.name))) for key in found}
    return {key: (ordered[key], found[key]) for key in found}


def _leads(canonical: str) -> Callable[[str], bool]:
    """A sort key that puts a name first, also where the model is inside of another now."""
    return lambda fqn: not (fqn == canonical or fqn.endswith("." + canonical))


def _unused(found: _Found) -> tuple[str, ...]:
    """A warning about weights that no module read as quantized ones."""
    idle = [fqns[0] for fqns, quantizers in found.values() if not any(q.reads for q in quantizers)]
    if not idle:
        return ()
    more = f" and {len(idle) - 3} more" if len(idle) > 3 else ""
    return (f"no forward since prepare() read {', '.join(idle[:3])}{more}: plainly quantized",)


def _parameter_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())
