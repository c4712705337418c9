"""An evaluation as a JSON record: what was measured, how, on what, with which versions."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llmquant.measure.evaluate import Evaluation, Protocol
from llmquant.measure.memory import Footprint
from llmquant.measure.speed import Speed

SCHEMA = 2


def build_record(
    *,
    model: str,
    baseline: str | None,
    protocol: Protocol,
    evaluation: Evaluation,
    footprint: Footprint,
    versions: dict[str, str],
    machine: dict[str, Any],
    noise_floor: Evaluation | None = None,
    speed: Speed | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """The record as plain JSON types. Figures that do not exist or are not finite (an overflow) are null.

    Units: KL in nats per token; top1 and delta_p_rms fractions; bytes in bytes, save for the bits per weight; seconds
    of wall time. `logits_rows` is how many rows of logits were in memory at once; `noise_floor` what `measure.noise`
    found, with the keys that `figures` has; `speed` what `measure.speed` did; `processes` how many shared the windows.
    """
    record = {
        "schema": SCHEMA,
        "model": model,
        "baseline": baseline,
        "protocol": asdict(protocol),
        **figures(evaluation),
        "nonfinite": asdict(evaluation.nonfinite),
        "logits_rows": evaluation.rows,
        "noise_floor": figures(noise_floor) if noise_floor else None,
        "speed": asdict(speed) if speed else None,
        "bytes": asdict(footprint),
        "seconds": evaluation.seconds,
        "processes": processes,
        "versions": versions,
        "machine": machine,
    }
    return {key: _finite(value) for key, value in record.items()}


def figures(evaluation: Evaluation) -> dict[str, Any]:
    """What says how good the model is, as plain JSON: `perplexity`, `kl`, `top1`, `delta_p_rms`.

    `perplexity.change` is relative, with a paired standard error: 0.01 is one percent worse than the baseline.
    """
    own, baseline, change = evaluation.perplexity, evaluation.baseline, evaluation.change
    perplexity = {
        "value": own.value,
        "stderr": own.stderr,
        "baseline": baseline.value if baseline else None,
        "change": change.value if change else None,
        "change_stderr": change.stderr if change else None,
    }
    found = {
        "perplexity": perplexity,
        "kl": asdict(evaluation.kl) if evaluation.kl else None,
        "top1": evaluation.top1,
        "delta_p_rms": evaluation.delta_p_rms,
    }
    return {key: _finite(value) for key, value in found.items()}


def _finite(value: Any) -> Any:
    """The value with NaN and infinity, which JSON does not have, replaced by None, and tuples by lists."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers; `unknown` where a package is not installed."""
    packages = ("torch", "transformers", "llmquant")
    return {"python": platform.python_version()} | {package: _version(package) for package in packages}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def machine() -> dict[str, Any]:
    """The processor, its logical cores, torch's threads and instruction set, the memory in bytes (null: unknown)."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory": _total_memory(),
    }


def _processor() -> str:
    """The marketing name where Linux tells it, otherwise what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def write_record(record: dict[str, Any], path: str | Path) -> None:
    """Write a record as JSON, atomically: a reader sees the old file or the whole new one. Folders are made.

    Raises:
        ValueError: the record holds NaN or infinity; nothing is written.
    """
    path = Path(path)
    content = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(content, encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
