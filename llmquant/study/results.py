"""What a study found, as the lines of results.jsonl: the contract with `llmquant.report`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmquant.study.keys import STUDY_SCHEMA
from llmquant.study.plan import Line, Plan
from llmquant.study.spec import Study
from llmquant.study.store import Store

_SIZES = (
    *("disk", "weights", "peak_rss", "bits_per_weight", "bits_per_weight_without_embeddings"),
    "bits_per_quantized_weight",
)
_PERPLEXITY = ("value", "stderr", "baseline", "change", "change_stderr")

Found = Mapping[str, Any]


def build_results(study: Study, plan: Plan, store: Store) -> list[dict[str, Any]]:
    """All lines whose parts are finished, or failed; figures that do not exist are null."""
    known: dict[str, Found | None] = {}
    failed: dict[str, Found] = {}
    for key in dict.fromkeys(key for line in plan.lines for key in line.parts()):
        known[key] = store.read(key)
        if known[key] is None and (error := store.read_failure(key)):
            failed[key] = error
    finished = [line for line in plan.lines if line.error or all(known[k] or k in failed for k in line.parts())]
    return [_result(study, line, known, failed) for line in finished]


def _result(study: Study, line: Line, known: Mapping[str, Found | None], failed: Mapping[str, Found]) -> dict[str, Any]:
    parts: dict[str, Found] = {part: known.get(key) or {} for part, key in line.keys.items()}
    error = line.error or next((failed[key] for key in line.parts() if key in failed), None)
    candidate, quality = line.candidate, parts.get("quality") or parts.get("reference") or {}
    performance, quantize = parts.get("performance", {}), parts.get("quantize", {})
    return {
        "schema": STUDY_SCHEMA,
        "study": study.name,
        "model": line.model,
        "label": line.label,
        "kind": line.kind,
        "recipe": candidate.recipe if candidate else None,
        "algorithm": candidate.algorithm if candidate else None,
        "bits_budget": candidate.bits if candidate else None,
        "text": line.text,
        "status": "failed" if error else "done",
        "error": dict(error) if error else None,
        "protocol": quality.get("protocol"),
        "perplexity": {name: (quality.get("perplexity") or {}).get(name) for name in _PERPLEXITY},
        "kl": quality.get("kl"),
        "top1": quality.get("top1"),
        "delta_p_rms": quality.get("delta_p_rms"),
        "nonfinite": _nonfinite(quality),
        "bytes": {name: (performance.get("bytes") or {}).get(name) for name in _SIZES},
        "speed": performance.get("speed"),
        "layers": quantize.get("layers", []) if study.measures("layers") else [],
        "tasks": parts.get("tasks", {}).get("tasks"),
        "seconds": {"quantize": quantize.get("seconds"), "evaluate": quality.get("seconds")},
        "versions": quality.get("versions") or quantize.get("versions") or {},
        "machine": quality.get("machine") or quantize.get("machine") or {},
        "keys": {"model": line.keys["model"], "cell": _cell(line)},
    }


def _cell(line: Line) -> str | None:
    """The key that two lines share if they are the same."""
    return next((line.keys[part] for part in ("quality", "reference", "quantize") if part in line.keys), None)


def _nonfinite(quality: Found) -> Found | None:
    """The counts; none for a reference, whose logits must all be finite, and null where nothing was measured."""
    return quality.get("nonfinite") if quality.get("perplexity") else None
