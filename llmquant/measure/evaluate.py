"""An evaluation: one forward pass per window, scored on its own and against a baseline's `Reference`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmquant.errors import LlmQuantError
from llmquant.measure.divergence import Divergence, delta_p_rms
from llmquant.measure.forward import inference
from llmquant.measure.perplexity import Change, Perplexity
from llmquant.measure.reference import Reference
from llmquant.measure.text import Text
from llmquant.measure.tokens import Tokens, score_window
from llmquant.measure.windows import tokens_scored
from llmquant.tensor import QuantizedTensor

Progress = Callable[[int, int], object]  # called with (windows done, windows in all)


@dataclass(frozen=True)
class Protocol:
    """All that two evaluations must share for their numbers to be comparable.

    Attributes:
        text, text_sha256: name and fingerprint of the text.
        context, windows: tokens per window and number of windows; windows do not overlap.
        bos: id that starts each window, None if the tokenizer adds none.
        tokens_scored: windows * (context - 1), for a window's first token has no context.
        dtype: the unquantized tensors' dtype, such as `bfloat16`.
        backend: the kernels that ran.
    """

    text: str
    text_sha256: str
    context: int
    windows: int
    bos: int | None
    tokens_scored: int
    dtype: str
    backend: str

    @classmethod
    def describe(cls, text: Text, windows: Tensor, bos: int | None, dtype: str, backend: str) -> Protocol:
        """The protocol of a run over these windows, [W, T]."""
        count, context = windows.shape
        return cls(text.name, text.sha256, context, count, bos, tokens_scored(windows), dtype, backend)


def backends(model: nn.Module) -> str:
    """The kernels that serve a model's quantized weights, or `torch` for a plain model."""
    kernels = {p.kernel().kernel for p in model.parameters() if isinstance(p, QuantizedTensor)}
    return ", ".join(sorted(kernels)) or "torch"


@dataclass(frozen=True)
class NonFinite:
    """Logits of scored positions that are NaN or infinite, and the tokens that were predicted from such."""

    logits: int
    tokens: int


@dataclass(frozen=True)
class Evaluation:
    """What a run measured. `baseline`, `change`, `kl`, `top1` and `delta_p_rms` are None without a baseline.

    Attributes:
        perplexity, baseline: of the candidate and of its baseline, on the same tokens.
        kl: divergence from the baseline over the scored tokens, in nats.
        top1: fraction of scored tokens where both models' most likely token is the same.
        delta_p_rms: root mean square change of the true token's probability, 0..1.
        seconds: wall time of the run, without the baseline's.
        change: of perplexity, relative and paired.
        nonfinite: what was not finite. Such a token counts as the worst there is: perplexity and mean KL are infinite.
        rows: rows of logits in memory at once; all of a window's where the model's head cannot be given some only.
    """

    perplexity: Perplexity
    baseline: Perplexity | None
    kl: Divergence | None
    top1: float | None
    delta_p_rms: float | None
    seconds: float
    change: Change | None = None
    nonfinite: NonFinite = NonFinite(0, 0)
    rows: int = 0


def evaluate(
    model: nn.Module, windows: Tensor, reference: Reference | None = None, progress: Progress | None = None
) -> Evaluation:
    """Measure a model on windows [W, T] of ids, against a reference over the same windows if there is one.

    Raises:
        LlmQuantError: logits that do not fit the reference.
        ReferenceFileError: the reference's file was damaged.
    """
    start = time.perf_counter()
    tokens, rows = score(model, windows, reference, progress)
    return summarize(tokens, rows, time.perf_counter() - start)


def score(
    model: nn.Module, windows: Tensor, reference: Reference | None = None, progress: Progress | None = None
) -> tuple[Tokens, int]:
    """The figures of every scored token, of which `summarize` makes an evaluation, and the rows in memory at once.

    Parts of an evaluation made elsewhere, each with a reference over its own windows, join by `Tokens.join`.
    """
    if reference is not None and not torch.equal(reference.windows, windows):
        raise LlmQuantError("the reference was computed over other windows", hint="compute it over the same windows")
    parts, most = [], 0
    with inference(model):
        for index in range(len(windows)):
            part, rows = score_window(model, windows, index, reference)
            parts.append(part)
            most = max(most, rows)
            if progress:
                progress(index + 1, len(windows))
    return Tokens.join(parts), most


def summarize(tokens: Tokens, rows: int, seconds: float) -> Evaluation:
    """The evaluation of all tokens."""
    nonfinite = NonFinite(int(tokens.nonfinite.sum()), int((tokens.nonfinite > 0).sum()))
    perplexity = Perplexity.from_nll(tokens.nll)
    if tokens.baseline_nll is None or tokens.kl is None or tokens.agrees is None:
        return Evaluation(perplexity, None, None, None, None, seconds, None, nonfinite, rows)
    return Evaluation(
        perplexity=perplexity,
        baseline=Perplexity.from_nll(tokens.baseline_nll),
        kl=Divergence.from_kl(tokens.kl, tokens.confidence),
        top1=float(tokens.agrees.double().mean()),
        delta_p_rms=delta_p_rms(tokens.baseline_nll, tokens.nll),
        seconds=seconds,
        change=Change.from_nll(tokens.nll, tokens.baseline_nll),
        nonfinite=nonfinite,
        rows=rows,
    )
