"""Rows of results, as a sweep would write them, for tests to bend."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmquant.report.read import read_rows
from llmquant.report.rows import Row

PROTOCOL = {
    "text": "wikitext2", "text_sha256": "ab" * 32, "context": 512, "windows": 4, "bos": None, "tokens_scored": 2044,
    "dtype": "bfloat16", "backend": "torch",
}  # fmt: skip
KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def make(
    label: str, kl: float | None = 0.1, size: int = 50_000_000, change: float = 0.02, **fields: Any
) -> dict[str, Any]:
    """A finished candidate; fields of the row replace what is made up here."""
    made: dict[str, Any] = {
        "schema": 1, "study": "tiny", "model": "Tiny", "label": label, "kind": "candidate", "recipe": label,
        "algorithm": None, "bits_budget": None, "text": "wikitext2", "status": "done", "error": None,
        "protocol": PROTOCOL, "top1": 0.873, "delta_p_rms": 0.031, "nonfinite": {"logits": 0, "tokens": 0},
        "perplexity": {
            "value": 20 * (1 + change), "stderr": 0.6, "baseline": 20.0, "change": change, "change_stderr": 0.001,
        },
        "kl": None if kl is None else {
            "mean": kl, "stderr": kl / 50, "median": kl / 2, "p90": 2 * kl, "p99": 4 * kl, "max": 9 * kl,
            "by_confidence": [
                {"low": low / 4, "high": low / 4 + 0.25, "tokens": 511, "mean": kl * (4 - low) / 3} for low in range(4)
            ],
        },
        "bytes": {
            "disk": size, "weights": size - 1000, "peak_rss": size + 10**8, "bits_per_weight": size / 1e8 * 16,
            "bits_per_weight_without_embeddings": 4.5, "bits_per_quantized_weight": 4.25,
        },
        "speed": {
            "threads": 1, "prompt": 128, "prefill": 300.0, "prefill_reference": 250.0, "decode": 42.0,
            "decode_reference": 20.0,
        },
        "layers": [
            {"fqn": f"model.layers.{block}.{kind}.weight", "format": "int4", "bits": 4.25, "sqnr": 20.0 + block}
            for block in range(3) for kind in KINDS
        ],
        "tasks": None, "seconds": {"quantize": 1.5, "evaluate": 2.5}, "versions": {"torch": "2.13.0"},
        "machine": {"processor": "a processor", "cores": 2}, "keys": {"model": "aa", "cell": label},
    }  # fmt: skip
    return made | fields


def reference(**fields: Any) -> dict[str, Any]:
    own = {"recipe": None, "layers": [], "speed": None, "top1": 1.0, "kind": "reference"}
    return make("16 bits", 0.0, 100_000_000, 0.0, **(own | fields))


def noise(kl: float = 0.001, **fields: Any) -> dict[str, Any]:
    return make("noise floor", kl, 100_000_000, 0.0001, **({"kind": "noise", "layers": [], "speed": None} | fields))


def failed(label: str = "broken", **error: Any) -> dict[str, Any]:
    told = {
        "what": "a weight is NaN",
        "where": "lm_head.weight",
        "hint": "another checkpoint",
        "kind": "BadWeightError",
    }
    nothing = dict.fromkeys(("protocol", "perplexity", "kl", "top1", "bytes", "speed", "versions", "machine"))
    return make(label, status="failed", error=told | error, layers=[], **nothing)


def usual() -> list[dict[str, Any]]:
    """A study as they are: reference, noise floor, candidates of which one is beaten, and a failure."""
    candidates = [
        make("int2", 2.5, 20_000_000, 4.0, top1=0.31),
        make("int4-g64", 0.05, 31_000_000, 0.03, top1=0.912),
        make("int5-worse", 0.08, 45_000_000, 0.05, top1=0.871),
        make("int8", 0.0005, 53_000_000, 0.004, top1=0.9934),
    ]
    return [reference(), *candidates, noise(), failed()]


def write(folder: Path, rows: Iterable[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "results.jsonl").write_text(lines, encoding="utf-8")
    return folder


def parse(folder: Path, rows: Iterable[dict[str, Any]]) -> list[Row]:
    return read_rows(write(folder, rows))
