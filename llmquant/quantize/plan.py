"""What is to be done to every weight of a model, decided before anything is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from llmquant.config.base import QuantConfig
from llmquant.config.candidates import Candidate, Inventory, Role, find_candidates
from llmquant.config.fqn import FqnToConfig, Resolution, resolve
from llmquant.errors import AlreadyQuantizedError, CalibrationError, NothingToQuantizeError
from llmquant.formats import METHODS, get_format
from llmquant.primitives.stats import InputStats
from llmquant.quantize.weight import CALIBRATE_HINT
from llmquant.tensor import QuantizedTensor

MODEL = "model"
"""What an algorithm needs that runs the model itself."""


class Plan(NamedTuple):
    """What is to be done to a model, before anything is done."""

    inventory: Inventory
    resolution: Resolution

    @property
    def chosen(self) -> list[tuple[Candidate, QuantConfig]]:
        """The weights to quantize, in model order.

        An embedding meets no inputs: where its algorithm would need them, it gets the format's default.
        """
        found: dict[str, Any] = self.resolution.chosen
        pairs = [(c, found[c.name]) for c in self.inventory.candidates if c.name in found]
        return [(c, _uncalibrated(config) if is_embedding(c) else config) for c, config in pairs]

    @property
    def calibrated(self) -> dict[str, tuple[Candidate, QuantConfig]]:
        """Name -> the weights that need a calibration run: for a static activation, or for their algorithm.

        Raises:
            CalibrationError: for a static activation of an embedding, which has no inputs.
        """
        found = {c.name: (c, config) for c, config in self.chosen if needed_stats(config)}
        for candidate, _ in found.values():
            if is_embedding(candidate):
                raise CalibrationError(
                    "an embedding meets no activations that could have a static scale",
                    where=candidate.name,
                    hint="give it the scheme of the weight alone, for instance int8",
                )
        return found

    def skipped(self, model: nn.Module) -> dict[str, str]:
        """FQN -> reason of every weight of two or more dimensions that stays as it is."""
        wide = {name for name, p in model.named_parameters(remove_duplicate=False) if p.dim() >= 2}
        return {**self.resolution.kept, **{n: why for n, why in self.inventory.others.items() if n in wide}}


def make_plan(model: nn.Module, config: FqnToConfig, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> Plan:
    """Decides about every weight of a model (which may lie on the meta device).

    Raises:
        AlreadyQuantizedError: if one of its weights is quantized already.
        NothingToQuantizeError: if no weight would be quantized.
        ConfigError: for keys that do not fit the model.
    """
    done = [name for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)]
    if done:
        raise AlreadyQuantizedError(
            "the model is quantized already", where=done[0], hint="start from the 16-bit model, or dequantize() first"
        )
    inventory = find_candidates(model)
    resolution = resolve(config, inventory)
    if filter_fn is not None:
        resolution = _filtered(model, inventory, resolution, filter_fn)
    if not resolution.chosen:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(resolution.kept.items())[:3])
        raise NothingToQuantizeError(
            "no weight would be quantized", where=reasons or "the model has no linear, embedding or expert weight"
        )
    return Plan(inventory, resolution)


def needed_stats(config: QuantConfig) -> frozenset[str]:
    """What a calibration run must tell of a weight's inputs: fields of `InputStats`, and `model` for an algorithm that
    runs the model itself.
    """
    static = config.activation is not None and config.activation.static
    by_algorithm = METHODS[config.algorithm or "rtn"].needs
    return frozenset(filter(None, ("low" if static else "", by_algorithm)))


def check_stats(plan: Plan, stats: Mapping[str, InputStats] | None) -> None:
    """Raises `CalibrationError` where a static activation or an algorithm lacks what a calibration run tells."""
    stats = stats or {}
    lacking = [
        name
        for name, (_, config) in plan.calibrated.items()
        if any(getattr(stats.get(name), field, None) is None for field in needed_stats(config))
    ]
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise CalibrationError(
            "these weights need a calibration run", where=", ".join(lacking[:3]) + more, hint=CALIBRATE_HINT
        )


def is_embedding(candidate: Candidate) -> bool:
    """Whether a weight is looked up and never multiplied: it meets no inputs."""
    return all(role is Role.embedding for role in candidate.roles)


def _uncalibrated(config: QuantConfig) -> QuantConfig:
    needs = METHODS[config.algorithm or "rtn"].needs
    return config.with_algorithm(get_format(config.format).algorithms[0]) if needs else config


def _filtered(
    model: nn.Module, inventory: Inventory, resolution: Resolution, filter_fn: Callable[[nn.Module, str], bool]
) -> Resolution:
    """The resolution without the weights that the filter refuses under any of their names."""
    kept = dict(resolution.kept)
    for candidate in inventory.candidates:
        modules = [fqn.rpartition(".")[0] for fqn in candidate.fqns]
        if not all(filter_fn(model.get_submodule(path), path) for path in modules):
            kept[candidate.name] = "filter_fn says no"
    chosen = {name: config for name, config in resolution.chosen.items() if name not in kept}
    return replace(resolution, chosen=chosen, kept=kept)
