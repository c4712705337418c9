"""Our own rows of `peers.py`: a scheme or a mixture under one of the algorithms, on the same plain model and tokens."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import llmquant
from llmquant import quantize_, quantize_with_data_
from llmquant.calibrate.collect import collect_stats
from llmquant.calibrate.imatrix import save_imatrix
from llmquant.checkpoint.source import open_source
from llmquant.cli.console import progress_bar
from llmquant.config.fqn import FqnToConfig
from llmquant.config.recipe import to_config, with_algorithm
from llmquant.measure.memory import peak_rss, reset_peak_rss, weight_counts
from llmquant.quantize import make_plan
from llmquant.tune.budget import choose_mixture
from llmquant.tune.sequential import runs_by_blocks


class Own(NamedTuple):
    """A model that llmquant quantized, and what a line says of it."""

    model: Any
    facts: dict[str, Any]


def quantize_own(settings: dict[str, Any], plain: Path, tokens: Tensor, journal: Path, name: str) -> Own:
    """Quantizes a fresh copy of the plain model.

    Args:
        settings: `scheme` or `budget`, and `algorithm`.
        plain: folder of the float32 checkpoint.
        tokens: [W, T] int64, what algorithms read.
        journal: a folder where finished blocks of an interrupted run are found again.
        name: of the run.
    """
    model = open_source(plain, torch.float32).load()
    reset_peak_rss()
    started = time.perf_counter()
    with progress_bar(name) as progress:
        config, note = config_of(settings, model, tokens, progress)
        if runs_by_blocks(make_plan(model, config)):
            report = quantize_with_data_(model, config, tokens, journal=journal, progress=progress)
        else:
            report = quantize_(model, config, progress=progress)
    seconds, counts = time.perf_counter() - started, weight_counts(model)
    facts = {
        "version": llmquant.__version__,
        "package": "llmquant",
        "quantized": sorted(report.quantized),
        "bytes": counts.quantized_bytes,
        "stored": counts.quantized_bytes,
        "elements": counts.quantized_elements,
        "seconds": seconds,
        "peak": peak_rss(),
        "arithmetic": "float32, by the quantized tensors themselves",
        "note": "; ".join([note, *report.warnings]).strip("; "),
    }
    return Own(model, facts)


def config_of(settings: dict[str, Any], model: Any, tokens: Tensor, progress: Any) -> tuple[FqnToConfig, str]:
    """What is done to each weight, and for a mixture what came out."""
    if settings["budget"] is None:
        return with_algorithm(to_config({"_head": None, "_default": settings["scheme"]}), settings["algorithm"]), ""
    some = tokens[: -(-8192 // tokens.shape[1])]
    mixture = choose_mixture(model, settings["budget"], data=some, fixed={"_head": None}, progress=progress)
    note = (
        f"{'uniform ' + mixture.chosen.name if mixture.is_uniform else 'a mixture'} of {mixture.chosen.bits:.3f} bits"
    )
    return with_algorithm(mixture.config, settings["algorithm"]), note


def write_imatrix(plain: Path, tokens: Tensor, target: Path) -> None:
    """The mean squares of the inputs of all linear layers but the head, for peers that use them."""
    model = open_source(plain, torch.float32).load()
    config = to_config({"_head": None, "_default": "int4-g64"})
    with progress_bar("importance matrix") as progress:
        save_imatrix(collect_stats(model, config, tokens, imatrix=True, progress=progress), target)
