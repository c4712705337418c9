"""What an evaluation keeps: a few numbers for each token, never its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from llmquant.errors import LlmQuantError
from llmquant.measure.divergence import kl
from llmquant.measure.forward import forward
from llmquant.measure.perplexity import target_nll
from llmquant.measure.reference import Reference
from llmquant.measure.rows import map_rows


@dataclass(frozen=True)
class Tokens:
    """Figures of N scored tokens, all on the CPU.

    A token predicted from logits that are not finite counts as the worst: infinite NLL and KL, no agreement.

    Attributes:
        nll: [N] float64, in nats.
        nonfinite: how many of the logits are NaN or infinite, [N] int64.
        baseline_nll, confidence: the reference's NLL and the probability of its most likely token, [N] float64.
        kl: divergence from the reference, [N] float64.
        agrees: whether both models' most likely token is the same, [N] bool.
    """

    nll: Tensor
    nonfinite: Tensor
    baseline_nll: Tensor | None = None
    confidence: Tensor | None = None
    kl: Tensor | None = None
    agrees: Tensor | None = None

    @classmethod
    def join(cls, parts: Sequence[Tokens]) -> Tokens:
        """The tokens of all parts, in order; all parts have a baseline or none has."""
        columns = ([getattr(part, field.name) for part in parts] for field in fields(cls))
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


def score_window(model: nn.Module, windows: Tensor, index: int, reference: Reference | None) -> tuple[Tokens, int]:
    """Run one of the windows [W, T]: its T - 1 tokens, and how many rows of logits were in memory at once.

    Raises:
        LlmQuantError: logits that do not fit the reference.
    """
    ids, parts, start = windows[index], [], 0
    with forward(model, ids) as run:
        if reference is not None:
            _check_comparable(run.vocabulary, reference.vocabulary)
        others = reference.blocks(index) if reference else iter(lambda: None, 0)
        for logits, other in zip(run.blocks, others, strict=False):
            targets = ids[start + 1 : start + 1 + len(logits)]  # the last row of a window has none
            parts.append(_score(logits[: len(targets)], targets, other))
            start += len(logits)
    found = Tokens.join(parts)
    return (found if reference is None else _compared(found, reference, index)), run.rows


def _score(logits: Tensor, targets: Tensor, other: Tensor | None) -> Tokens:
    """The tokens of some rows [R, V] with targets [R]; `agrees` holds what is most likely until it is compared."""
    bad = map_rows(_nonfinite, logits)
    broken = bad > 0
    nll = target_nll(logits, targets).masked_fill(broken, torch.inf).cpu()
    if other is None:
        return Tokens(nll, bad.cpu())
    divergence = kl(other[: len(targets)].to(logits.device), logits).masked_fill(broken, torch.inf)
    top1 = logits.argmax(-1).masked_fill(broken, -1)
    return Tokens(nll, bad.cpu(), kl=divergence.cpu(), agrees=top1.cpu())


def _nonfinite(logits: Tensor) -> Tensor:
    """Values of each row [R, V] that are NaN or infinite: [R] int64."""
    return logits.isfinite().logical_not_().sum(-1)


def _compared(found: Tokens, reference: Reference, index: int) -> Tokens:
    """A window's tokens with what the reference knows of them."""
    assert found.agrees is not None
    agrees = found.agrees == reference.top1[index]
    nll, confidence = reference.nll[index], reference.confidence[index]
    return Tokens(found.nll, found.nonfinite, nll, confidence, found.kl, agrees)


def _check_comparable(own: int, other: int) -> None:
    if own != other:
        where, hint = f"vocabularies of {own} and {other}", "a baseline with the same vocabulary"
        raise LlmQuantError("the two models' logits differ in shape", where=where, hint=hint)
