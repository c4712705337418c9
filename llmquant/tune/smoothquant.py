"""SmoothQuant (Xiao et al., arXiv:2211.10438): outliers of activations are handed to the weights, which bear them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.calibrate.collect import Batches, as_batches
from llmquant.errors import ConfigError
from llmquant.measure.text import BUILTIN
from llmquant.quantize import Progress
from llmquant.tune.channels import Channels, each_block
from llmquant.tune.sites import MigrationReport, Site, find_sites, matrices
from llmquant.tune.structure import find_structure

_SMALLEST = 1e-5


@torch.no_grad()
def smoothquant_(
    model: nn.Module,
    data: str | Sequence[str] | Tensor | Batches = BUILTIN,
    *,
    tokenizer: Any = None,
    alpha: float = 0.5,
    progress: Progress | None = None,
    **windows: int,
) -> MigrationReport:
    """Scales the channels of a plain model in place, so that its activations are easier to quantize.

        smoothquant_(model, tokenizer=tokenizer)
        quantize_(model, "a8-int8")

    Channel k of a site is divided by s_k = max|x_k|^alpha / max|w_k|^(1 - alpha), and what reads it is multiplied by
    it; the function stays the same, up to rounding in the model's dtype, also if the run is interrupted.

    Args:
        model: a transformers model of a known family (`tune/families.py`), not quantized.
        data, tokenizer: what it reads, as for `collect_stats`.
        alpha: how much of the difficulty goes to the weights, 0 to 1.
        progress: called with steps done, steps in all and the block at work.
        **windows: `tokens`, `context` and `seed` of `calibration_windows`.

    Raises:
        ConfigError: for another alpha.
        UnknownArchitectureError, AlreadyQuantizedError, BadWeightError, CalibrationError, TextError.
    """
    started = time.perf_counter()
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha is {alpha}", hint="0 (all to the activations) to 1 (all to the weights)")
    sites, skipped = find_sites(model, find_structure(model))
    report = MigrationReport(skipped=skipped)
    met: set[str] = set()
    for found in each_block(model, sites, as_batches(data, tokenizer, windows), gram=False, progress=progress):
        for site, channels in found:
            if not channels.tokens:
                continue
            met.add(site.source)
            scale = smooth_scale(model, site, channels, alpha)
            site.apply(model, scale)
            report.scaled[site.source] = f"divided by {float(scale.min()):.3g} to {float(scale.max()):.3g}"
            report.tokens = max(report.tokens, channels.tokens)
    report.skipped |= {site.source: "no token reached it" for site in sites if site.source not in met}
    report.seconds = time.perf_counter() - started
    return report


def smooth_scale(model: nn.Module, site: Site, channels: Channels, alpha: float) -> Tensor:
    """s [C] float32; 1 where a channel carries nothing or nothing reads it."""
    columns = torch.stack([m.abs().amax(0).float() for weight in site.readers for m in matrices(model, weight)]).amax(0)
    inputs, weights = (site.shared(found).amax(0) for found in (channels.largest, columns))
    scale = inputs.pow(alpha) / weights.pow(1 - alpha)
    alive = (inputs > _SMALLEST) & (weights > _SMALLEST)
    return torch.where(alive, scale, torch.ones_like(scale)).clamp(min=_SMALLEST)
