"""AWQ (Lin et al., arXiv:2306.00978): channels that carry much get finer steps, for their weights are scaled up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmquant.calibrate.collect import Batches, as_batches
from llmquant.config.base import QuantConfig, config_of
from llmquant.config.recipe import to_config
from llmquant.errors import NothingToQuantizeError
from llmquant.formats import METHODS
from llmquant.measure.text import BUILTIN
from llmquant.quantize import Progress, make_plan, quantize_weight
from llmquant.tune.channels import Channels, each_block
from llmquant.tune.sites import MigrationReport, Site, find_sites, matrices
from llmquant.tune.structure import find_structure

GRID = 20


class Choice(NamedTuple):
    """scale [C] float32, the exponent that it comes from, and the output error in parts of that without scales."""

    scale: Tensor
    alpha: float
    error: float


@torch.no_grad()
def awq_(
    model: nn.Module,
    config: Any,
    data: str | Sequence[str] | Tensor | Batches = BUILTIN,
    *,
    tokenizer: Any = None,
    progress: Progress | None = None,
    **windows: int,
) -> MigrationReport:
    """Scales the channels of a plain model in place, so that its weights lose less when they are quantized.

        awq_(model, "int4-g64", tokenizer=tokenizer)
        quantize_(model, "int4-g64")

    Each site gets s_c = mean|x_c|^alpha, over its geometric middle, with the alpha in 0, 1/20, .. 19/20 for which
    what its readers give, quantized as the config says, is nearest to what they give now. alpha = 0 changes nothing,
    so no site ends worse under this measure. The function stays the same, up to rounding in the model's dtype, also
    if the run is interrupted. Algorithms that read a text themselves are stood in for by round to nearest.

    Args:
        model: a transformers model of a known family (`tune/families.py`), not quantized.
        config: what `quantize_` will be called with.
        data, tokenizer: what the model reads, as for `collect_stats`.
        progress: called with steps done, steps in all and the block at work.
        **windows: `tokens`, `context` and `seed` of `calibration_windows`.

    Raises:
        ConfigError, NothingToQuantizeError, UnknownArchitectureError, AlreadyQuantizedError, BadWeightError,
        CalibrationError, TextError.
    """
    started = time.perf_counter()
    structure = find_structure(model)
    configs = {c.name: _weight_only(found) for c, found in make_plan(model, to_config(config)).chosen}
    sites, skipped = find_sites(model, structure)
    chosen = [site for site in sites if any(weight.name in configs for weight in site.readers)]
    if not chosen:
        raise NothingToQuantizeError("no weight that the config quantizes reads channels that can be scaled")
    report = MigrationReport(skipped=skipped | {s.source: "no reader is quantized" for s in sites if s not in chosen})
    for found in each_block(model, chosen, as_batches(data, tokenizer, windows), gram=True, progress=progress):
        for site, channels in found:
            if channels.tokens:
                choice = choose_scale(model, site, channels, configs)
                site.apply(model, choice.scale)
                report.scaled[site.source] = f"alpha {choice.alpha:.2f}, output error x {choice.error:.3f}"
                report.tokens = max(report.tokens, channels.tokens)
    unmet = {site.source: "no token reached it" for site in chosen if site.source not in report.scaled}
    report.skipped |= unmet
    report.seconds = time.perf_counter() - started
    return report


def choose_scale(model: nn.Module, site: Site, channels: Channels, configs: dict[str, QuantConfig]) -> Choice:
    """The scales of one site with the least output error over the grid of exponents."""
    gram, mean = channels.gram, site.shared(channels.mean).mean(0)
    assert gram is not None
    readers = [(m.float(), configs[w.name]) for w in site.readers if w.name in configs for m in matrices(model, w)]
    plain = sum(output_error(matrix, config, torch.ones_like(channels.mean), gram) for matrix, config in readers)
    best = Choice(torch.ones_like(mean), 0.0, 1.0)
    for step in range(1, GRID):
        scale = awq_scale(mean, step / GRID)
        error = sum(output_error(matrix, config, site.spread(scale), gram) for matrix, config in readers)
        if error < best.error * plain:
            best = Choice(scale, step / GRID, error / plain)
    return best


def awq_scale(mean: Tensor, alpha: float) -> Tensor:
    """mean|x|^alpha [C], over the geometric middle of its largest and its smallest."""
    scale = mean.clamp(min=1e-4).pow(alpha)
    return scale / (scale.max() * scale.min()).sqrt()


def output_error(matrix: Tensor, config: QuantConfig, scale: Tensor, gram: Tensor) -> float:
    """Mean squared change of x W^T, summed over rows, when W [out, in] is quantized with its columns times scale [in].

    With the mean of x x^T it is tr(D G D^T) for the change D of W.
    """
    change = quantize_weight(matrix * scale, config).dequantize().float() / scale - matrix
    return float(((change @ gram) * change).sum())


def _weight_only(config: QuantConfig) -> QuantConfig:
    """The config of the weight alone, by an algorithm that needs no run of the model."""
    own = config.with_algorithm("rtn") if METHODS[config.algorithm or "rtn"].needs else config
    weight = {name: getattr(own, name) for name in ("format", "granularity", "mapping_type", "scale_dtype")}
    return config_of(None, **weight, algorithm=own.algorithm, scale_rule=own.scale_rule)
