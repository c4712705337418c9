"""A calibration run: the plain model reads some tokens, and observers take note of what its weights meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.calibrate.capture import Capture, Watched
from llmquant.calibrate.data import calibration_windows, tokenized
from llmquant.calibrate.observers import Observer, observer_factory
from llmquant.config.recipe import to_config
from llmquant.errors import CalibrationError
from llmquant.measure.evaluate import inference
from llmquant.measure.text import BUILTIN
from llmquant.primitives.stats import InputStats
from llmquant.quantize import Progress, make_plan

Batches = Iterable[Tensor | Mapping[str, Any]]
"""Token ids [B, T], or the keyword arguments of the model's forward."""


@dataclass(frozen=True)
class Calibration(Mapping[str, InputStats]):
    """FQN of a weight -> what a calibration run saw of its inputs: the `stats` of `quantize_`.

    Attributes:
        stats: the same as a plain mapping.
        tokens: how many tokens the model read.
        warnings: what the user should look at, for instance experts that no token chose.
    """

    stats: Mapping[str, InputStats]
    tokens: int
    warnings: tuple[str, ...] = ()

    def __getitem__(self, fqn: str) -> InputStats:
        return self.stats[fqn]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stats)

    def __len__(self) -> int:
        return len(self.stats)

    def __str__(self) -> str:
        lines = [f"inputs of {len(self)} weights seen on {self.tokens} tokens"]
        return "\n".join(lines + [f"  warning: {warning}" for warning in self.warnings])


def collect_stats(
    model: nn.Module,
    config: Any,
    data: str | Sequence[str] | Tensor | Batches = BUILTIN,
    *,
    tokenizer: Any = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    observer: str | Callable[[], Observer] = "minmax",
    progress: Progress | None = None,
    **windows: int,
) -> Calibration:
    """Runs a plain model on some tokens and collects what a config needs to know about the inputs of its weights.

        stats = collect_stats(model, "s8-int8", "builtin", tokenizer=tokenizer)
        quantize_(model, "s8-int8", stats=stats)

    The model is as it was afterwards, also if the run is interrupted.

    Args:
        model: the model that `quantize_` is to be called with.
        config: what `quantize_` takes; its static activations say which weights are watched.
        data: the name or path of a text (see `calibration_windows`), texts, token ids [W, T] (a window at a time), or
            batches: ids [B, T] or mappings of the model's arguments. Texts need the tokenizer.
        tokenizer: that of the model.
        filter_fn: as for `quantize_`.
        observer: what watches a weight, or an expert: `minmax`, `average` (moving averages), `channel`, `percentile`
            (or `percentile-99.9`), `histogram` (the range of least squared error), or a function that makes one.
        progress: called before each batch, with batches done and in all.
        **windows: `tokens`, `context` and `seed` of `calibration_windows`; of texts, `context`.

    Raises:
        CalibrationError: if the config needs no run, or the run does not say enough: a weight that no token reached,
            inputs that are not finite.
        ConfigError: for an unknown observer, and as `quantize_`.
        NothingToQuantizeError, AlreadyQuantizedError, TextError: as `quantize_` and `load_text`.
    """
    plan = make_plan(model, to_config(config), filter_fn)
    watched = [
        _watch(model, candidate, observer_factory(observer, chosen.activation))
        for candidate, chosen in plan.calibrated.values()
    ]
    if not watched:
        raise CalibrationError("the config has no static activation that needs a calibration run", hint="s8-int8")
    batches = _batches(data, tokenizer, windows)
    tokens = 0
    with inference(model), _one_by_one(model), Capture(watched):
        for index, batch in enumerate(batches):
            if progress:
                progress(index, len(batches), "")
            tokens += _run(model, batch)
    if progress:
        progress(len(batches), len(batches), "")
    return _calibration(watched, tokens)


def _watch(model: nn.Module, candidate: Any, observer: Callable[[], Observer]) -> Watched:
    matrices = candidate.shape[0] if len(candidate.shape) == 3 else 1
    return Watched(candidate, model.get_parameter(candidate.name).detach(), [observer() for _ in range(matrices)])


def _batches(data: Any, tokenizer: Any, windows: Mapping[str, int]) -> Sequence[Tensor | Mapping[str, Any]]:
    if isinstance(data, Tensor):
        return list(data.split(1))
    found: list[Any] = [data] if isinstance(data, str) else list(data)
    if not found:
        raise CalibrationError("there is nothing to calibrate on", hint="a text, or batches of token ids")
    if not all(isinstance(item, str) for item in found):
        return found
    if tokenizer is None:
        raise CalibrationError("texts need a tokenizer", hint="collect_stats(model, config, data, tokenizer=tokenizer)")
    if isinstance(data, str):
        return list(calibration_windows(tokenizer, data, **windows).split(1))
    return list(tokenized(tokenizer, found, **windows))


@contextmanager
def _one_by_one(model: Any) -> Iterator[None]:
    """Experts of a transformers model take their tokens one expert at a time, so that each product can be seen."""
    if not hasattr(model, "get_experts_implementation"):
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _run(model: nn.Module, batch: Tensor | Mapping[str, Any]) -> int:
    """Shows the model one batch; returns how many tokens it has."""
    device = next(model.parameters()).device
    if isinstance(batch, Tensor):
        model(batch.to(device))
        return batch.numel()
    model(**{name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()})
    return int(batch["input_ids"].numel()) if "input_ids" in batch else 0


# --- from observers to statistics -----------------------------------------------------------------------


def _calibration(watched: Sequence[Watched], tokens: int) -> Calibration:
    unseen = [w.candidate.name for w in watched if not any(o.tokens for o in w.observers)]
    if unseen:
        more = f" and {len(unseen) - 3} more" if len(unseen) > 3 else ""
        raise CalibrationError(
            "the calibration run never multiplied by these weights",
            where=", ".join(unseen[:3]) + more,
            hint="more or other tokens, or a scheme without static activations for them",
        )
    warnings = tuple(filter(None, map(_idle_experts, watched)))
    return Calibration({w.candidate.name: _stats(w) for w in watched}, tokens, warnings)


def _stats(watched: Watched) -> InputStats:
    """Ranges [] or [experts]; experts that met no token get the widest range of the others."""
    ends = torch.stack([torch.stack(o.bounds()) for o in watched.observers if o.tokens])  # [seen, 2]
    if not ends.isfinite().all():
        raise CalibrationError(
            "the inputs of a weight are not finite",
            where=watched.candidate.name,
            hint="a wider dtype for the model, or a check of its weights",
        )
    if len(watched.candidate.shape) == 2:
        return InputStats(low=ends[0, 0], high=ends[0, 1])
    low = torch.full((len(watched.observers),), float(ends[:, 0].min()))
    high = torch.full((len(watched.observers),), float(ends[:, 1].max()))
    seen = torch.tensor([bool(o.tokens) for o in watched.observers])
    low[seen], high[seen] = ends[:, 0], ends[:, 1]
    return InputStats(low=low, high=high)


def _idle_experts(watched: Watched) -> str | None:
    idle = [i for i, observer in enumerate(watched.observers) if not observer.tokens]
    if not idle:
        return None
    named = ", ".join(map(str, idle[:8])) + (f" and {len(idle) - 8} more" if len(idle) > 8 else "")
    return (
        f"{watched.candidate.name}: no token chose {len(idle)} of {len(watched.observers)} experts ({named}); "
        "their inputs get the widest range of the others"
    )
