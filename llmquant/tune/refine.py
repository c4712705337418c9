"""Refinement: codes stay as they are, scales learn to make a model say what its 16-bit original says.

Known as DWQ (mlx-lm) and as the second phase of EfficientQAT (arXiv:2407.11062): Adam on the KL divergence from the
original's predictions. Zero points are codes and stay, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmquant.errors import CalibrationError, LlmQuantError, NothingToQuantizeError
from llmquant.measure.reference import Reference
from llmquant.primitives.affine import stored
from llmquant.tensor import QuantizedTensor
from llmquant.tune.batches import drawn

Progress = Callable[[int, int], object]
"""Called with steps done and steps in all."""

_CHECKS = 8  # times that a run is judged on the held-out windows


@dataclass
class RefineReport:
    """What refinement did.

    Attributes:
        kl_before, kl_after: mean divergence from the original on the held-out windows, in nats.
        best_step: after how many steps it was least; 0 where none was better than the start, which is then kept.
        trained: FQNs of the weights whose scales learned.
        kept: FQN -> why a quantized weight's scales stayed as they were.
        history: (step, divergence on the held-out windows), the start first.
        seconds: wall time.
    """

    kl_before: float
    kl_after: float
    best_step: int
    trained: list[str]
    kept: dict[str, str]
    history: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def refine_(
    model: nn.Module,
    teacher: nn.Module | Reference,
    windows: Tensor,
    *,
    steps: int = 200,
    lr: float = 1e-3,
    batch: int = 1,
    held_out: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> RefineReport:
    """Trains the scales of a quantized model in place, towards the predictions of its 16-bit original.

    Each scale is multiplied by a factor that Adam learns; every step computes with scales rounded as they are stored.
    The rate falls linearly to zero. What did best on held-out windows is kept, and nothing if nothing was better.

    Args:
        model: quantized, from `quantize_` or loaded; called with ids [B, T], it returns `.logits`.
        teacher: the original, or a `Reference` of its logits over these very windows.
        windows: ids [W, T] int64, at least two; the last ones are held out.
        steps: how many.
        lr: of Adam on the factors, so as a share of each scale.
        batch: windows a step.
        held_out: how many windows to judge by, at most half of them.
        seed: of the order of windows.
        progress: called after each step.

    Raises:
        NothingToQuantizeError: for a model without a scale that can learn.
        CalibrationError: for fewer than two windows, and for windows that are not the reference's.
        LlmQuantError: for logits that do not compare. The model is then as it was, also if the run is interrupted.
    """
    started = time.perf_counter()
    weights, kept = _trainable(model)
    _check(windows, teacher)
    count = len(windows) - max(min(held_out, len(windows) // 2), 1)
    with _learning(model, weights) as scales:
        best = scales.stored()
        history = [(0, _divergence(model, teacher, windows, count))]
        optimizer = torch.optim.Adam(scales.factors, lr=lr)
        for step, chosen in enumerate(drawn(count, batch, steps, seed), start=1):
            optimizer.param_groups[0]["lr"] = lr * (1 - (step - 1) / steps)
            with scales.watched():
                for index in chosen:
                    _loss(model, teacher, windows, index).backward()
            optimizer.step()
            if step % max(steps // _CHECKS, 1) == 0 or step == steps:
                scales.put(scales.stored())
                history.append((step, _divergence(model, teacher, windows, count)))
                if history[-1][1] < min(found for _, found in history[:-1]):
                    best = scales.stored()
            if progress:
                progress(step, steps)
        scales.put(best)
    step, least = min(history, key=lambda found: found[1])
    return RefineReport(history[0][1], least, step, list(weights), kept, history, time.perf_counter() - started)


class _Scales:
    """The scales of some weights, each its start times a factor that learns."""

    def __init__(self, weights: Mapping[str, QuantizedTensor]) -> None:
        self.weights = list(weights.values())
        self.start = [w.scale for w in self.weights]
        self.factors = [torch.ones_like(scale, dtype=torch.float32) for scale in self.start]

    def stored(self) -> list[Tensor]:
        """Scales as they would be stored now."""
        pairs = zip(self.start, self.factors, strict=True)
        return [stored(scale.float() * factor, scale.dtype) for scale, factor in pairs]

    def put(self, scales: Sequence[Tensor]) -> None:
        for weight, scale in zip(self.weights, scales, strict=True):
            weight.scale = scale

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While it is entered, weights have scales of which gradients are kept; then these are the factors'."""
        leaves = [scale.float().requires_grad_() for scale in self.stored()]
        self.put(leaves)
        yield
        for leaf, factor, scale in zip(leaves, self.factors, self.start, strict=True):
            factor.grad = torch.zeros_like(factor) if leaf.grad is None else leaf.grad * scale.float()


@contextmanager
def _learning(model: nn.Module, weights: Mapping[str, QuantizedTensor]) -> Iterator[_Scales]:
    """Evaluation mode, and no gradient but those of scales; all of it as before afterwards.

    If it is left by an error, scales are as before, too.
    """
    training = {module: module.training for module in model.modules()}
    needing = [p for p in model.parameters() if p.requires_grad]
    scales = _Scales(weights)
    model.eval().requires_grad_(False)
    try:
        with torch.enable_grad():
            yield scales
    except BaseException:
        scales.put(scales.start)
        raise
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter in needing:
            parameter.requires_grad_()


def _trainable(model: nn.Module) -> tuple[dict[str, QuantizedTensor], dict[str, str]]:
    """FQN -> the weights whose scales can learn, and of the other quantized ones the reason."""
    found: dict[str, QuantizedTensor] = {
        name: p for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)
    }
    kept = {
        name: f"scales stored as {p.format.scale_dtypes[0]} take no small steps".replace("torch.", "")
        for name, p in found.items()
        if p.format.scale_dtypes
    }
    weights = {name: p for name, p in found.items() if name not in kept}
    if not weights:
        raise NothingToQuantizeError(
            "no quantized weight has scales that can learn",
            where="; ".join(f"{name}: {why}" for name, why in list(kept.items())[:3]) or "the model is not quantized",
            hint="quantize it first, with scales of 16 or 32 bits",
        )
    return weights, kept


def _check(windows: Tensor, teacher: nn.Module | Reference) -> None:
    if len(windows) < 2:
        raise CalibrationError("one window to learn from and one to judge by are the least", hint="a longer text")
    if isinstance(teacher, Reference) and not torch.equal(teacher.windows, windows):
        raise CalibrationError("the reference was computed over other windows", hint="compute it over the same ones")


def _loss(model: nn.Module, teacher: nn.Module | Reference, windows: Tensor, index: int) -> Tensor:
    """Mean divergence of one window's predictions from the original's, in nats."""
    wanted = _wanted(teacher, windows, index)
    given = model(windows[index][None], use_cache=False).logits[0]
    if given.shape != wanted.shape:
        raise LlmQuantError(
            "the two models' logits differ in shape",
            where=f"{list(given.shape)} and {list(wanted.shape)}",
            hint="the original of this very model",
        )
    target = wanted.float().log_softmax(-1)
    return F.kl_div(given.float().log_softmax(-1), target, reduction="sum", log_target=True) / len(given)


def _wanted(teacher: nn.Module | Reference, windows: Tensor, index: int) -> Tensor:
    """The original's logits of a window, [T, V]."""
    if isinstance(teacher, Reference):
        return teacher.window(index)[0]
    with torch.no_grad():
        logits: Tensor = teacher(windows[index][None], use_cache=False).logits[0]
    return logits


@torch.no_grad()
def _divergence(model: nn.Module, teacher: nn.Module | Reference, windows: Tensor, first: int) -> float:
    """Mean divergence on the windows from `first` on."""
    found = sum(float(_loss(model, teacher, windows, i)) for i in range(first, len(windows)))
    return found / (len(windows) - first)
