"""A calibration run: the plain model reads some tokens, and observers take note of what its weights meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.calibrate.capture import Capture
from llmquant.calibrate.data import calibration_windows, tokenized
from llmquant.calibrate.observers import Observer
from llmquant.calibrate.watch import MEAN_SQUARE, Asked, Watch
from llmquant.config.recipe import to_config
from llmquant.errors import CalibrationError
from llmquant.measure.forward import inference
from llmquant.measure.text import BUILTIN
from llmquant.primitives.stats import InputStats
from llmquant.quantize import Plan, Progress, make_plan
from llmquant.quantize.plan import MODEL, is_embedding, needed_stats

Batches = Iterable[Tensor | Mapping[str, Any]]
"""Token ids [B, T], or the keyword arguments of the model's forward."""


@dataclass(frozen=True)
class Calibration(Mapping[str, InputStats]):
    """FQN of a weight -> what a calibration run saw of its inputs: the `stats` of `quantize_`.

    Attributes:
        stats: the same as a plain mapping.
        warnings: what the user should look at, for instance experts that no token chose.
        tokens: how many tokens the model read.
    """

    stats: Mapping[str, InputStats]
    warnings: tuple[str, ...]
    tokens: int

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
    imatrix: bool = False,
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
        config: what `quantize_` takes; its static activations and algorithms say which weights are watched for what.
        data: the name or path of a text (see `calibration_windows`), texts, token ids [W, T] (a window at a time), or
            batches: ids [B, T] or mappings of the model's arguments. Texts need the tokenizer.
        tokenizer: that of the model.
        filter_fn: as for `quantize_`.
        imatrix: whether the mean square of every column's inputs is wanted too, by which errors are then weighed.
        observer: what watches a weight, or an expert: `minmax`, `average` (moving averages), `channel`, `percentile`
            (or `percentile-99.9`), `histogram` (the range of least squared error), or a function that makes one.
        progress: called before each batch, with batches done and in all.
        **windows: `tokens`, `context` and `seed` of `calibration_windows`; of texts, `context`.

    Raises:
        CalibrationError: if nothing needs a run, or the run does not say enough: a weight that no token reached, inputs
            that are not finite.
        ConfigError: for an unknown observer, and as `quantize_`.
        NothingToQuantizeError, AlreadyQuantizedError, TextError: as `quantize_` and `load_text`.
    """
    asked = wanted(make_plan(model, to_config(config), filter_fn), imatrix)
    if not asked:
        raise CalibrationError(
            "the config has nothing that needs a calibration run", hint="s8-int8, the algorithm gptq, or imatrix=True"
        )
    watch = Watch(model, asked, observer)
    batches = as_batches(data, tokenizer, windows)
    tokens = 0
    with inference(model), one_by_one(model), Capture(watch.watched):
        for index, batch in enumerate(batches):
            if progress:
                progress(index, len(batches), "")
            tokens += run(model, batch)
    if progress:
        progress(len(batches), len(batches), "")
    return Calibration(*watch.stats(), tokens)


def wanted(plan: Plan, imatrix: bool = False) -> list[Asked]:
    """The weights to watch, and what for.

    Raises:
        CalibrationError: for a static activation of an embedding, which has no inputs.
    """
    needing = plan.calibrated
    importance = frozenset([MEAN_SQUARE] if imatrix else [])
    found = [
        Asked(c, importance | (needed_stats(config) - {MODEL} if c.name in needing else frozenset()), config.activation)
        for c, config in plan.chosen
        if not is_embedding(c)
    ]
    return [asked for asked in found if asked.fields]


def as_batches(data: Any, tokenizer: Any, windows: Mapping[str, int]) -> Sequence[Tensor | Mapping[str, Any]]:
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
def one_by_one(model: Any) -> Iterator[None]:
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


def run(model: nn.Module, batch: Tensor | Mapping[str, Any]) -> int:
    """Shows the model one batch; returns how many tokens it has."""
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    if isinstance(batch, Tensor):
        model(batch.to(device))
        return batch.numel()
    model(**{name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()})
    return int(batch["input_ids"].numel()) if "input_ids" in batch else 0
