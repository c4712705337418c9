"""One line of `results.jsonl`, typed: a candidate, the 16-bit reference or the noise floor, measured on one text."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

SCHEMA = 1


class _Part(BaseModel):
    """Types are strict, NaN is refused, and fields that this version does not know are left out."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class Failure(_Part):
    """Why a cell has no figures: the parts of a `LlmQuantError`, and the name of the exception's class."""

    what: str
    where: str | None = None
    hint: str | None = None
    kind: str | None = None


class Perplexity(_Part):
    """Of the tokens; `change` is relative to the baseline (0.01 is one percent worse), its error that of the pairs."""

    value: float | None = None
    stderr: float | None = None
    baseline: float | None = None
    change: float | None = None
    change_stderr: float | None = None


class Confidence(_Part):
    """Mean KL of the tokens whose likeliest continuation had a probability in [low, high) under the reference."""

    low: float
    high: float
    tokens: int
    mean: float | None = None


class Divergence(_Part):
    """KL from the reference in nats a token."""

    mean: float | None = None
    stderr: float | None = None
    median: float | None = None
    p90: float | None = None
    p99: float | None = None
    max: float | None = None
    by_confidence: tuple[Confidence, ...] = ()


class NonFinite(_Part):
    """Logits that were NaN or infinite, and the tokens that had such."""

    logits: int = 0
    tokens: int = 0


class Bytes(_Part):
    """Bytes, and bits a weight."""

    disk: float | None = None
    weights: float | None = None
    peak_rss: float | None = None
    bits_per_weight: float | None = None
    bits_per_weight_without_embeddings: float | None = None
    bits_per_quantized_weight: float | None = None


class Speed(_Part):
    """Tokens a second of the candidate and of the reference, timed in turns."""

    threads: int | None = None
    prompt: int | None = None
    prefill: float | None = None
    prefill_reference: float | None = None
    decode: float | None = None
    decode_reference: float | None = None


class Layer(_Part):
    """A quantized weight: its SQNR against the 16-bit one in dB, null where that does not exist."""

    fqn: str
    format: str | None = None
    bits: float | None = None
    sqnr: float | None = None


class Metric(_Part):
    """A figure of a task."""

    value: float | None = None
    stderr: float | None = None


class Task(_Part):
    """What the harness found on one task."""

    version: int | float | str | None = None
    metrics: dict[str, Metric] = {}


class Seconds(_Part):
    """Wall time."""

    quantize: float | None = None
    evaluate: float | None = None


class Row(_Part):
    """One cell of a study. Figures that do not exist are None, never NaN."""

    model: str
    label: str
    kind: Literal["candidate", "reference", "noise"] = "candidate"
    text: str = ""
    study: str | None = None
    recipe: str | None = None
    algorithm: str | None = None
    bits_budget: float | None = None
    status: Literal["done", "failed"] = "done"
    error: Failure | None = None
    protocol: dict[str, Any] | None = None
    perplexity: Perplexity | None = None
    kl: Divergence | None = None
    top1: float | None = None
    delta_p_rms: float | None = None
    nonfinite: NonFinite | None = None
    bytes: Bytes | None = None
    speed: Speed | None = None
    layers: tuple[Layer, ...] = ()
    tasks: dict[str, Task] | None = None
    seconds: Seconds | None = None
    versions: dict[str, Any] | None = None
    machine: dict[str, Any] | None = None
    keys: dict[str, Any] | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What names a cell: model, label, text and kind."""
        return self.model, self.label, self.text, self.kind
