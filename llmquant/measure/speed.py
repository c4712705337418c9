"""Tokens per second of a whole model, reading a prompt (prefill) and generating after it (decode).

Seconds of two runs do not compare: machines warm up and are shared. A model and its reference therefore take turns in
one process, and only their ratio should be believed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.errors import LlmQuantError
from llmquant.measure.forward import inference

Progress = Callable[[int, int], object]  # called with (turns done, turns in all)


@dataclass(frozen=True)
class Speed:
    """Medians of some rounds.

    Attributes:
        threads: torch's.
        prompt, new: tokens read, and tokens generated, greedily.
        prefill, decode: tokens per second of the model: reading the prompt with the choice of a first token, and
            generating the tokens after it.
        prefill_reference, decode_reference: the same of its reference; None without one.
    """

    threads: int
    prompt: int
    new: int
    prefill: float
    prefill_reference: float | None
    decode: float
    decode_reference: float | None


def time_model(
    model: nn.Module,
    reference: nn.Module | None = None,
    *,
    prompt: int = 256,
    new: int = 32,
    rounds: int = 5,
    progress: Progress | None = None,
) -> Speed:
    """Time a model and its reference in turns, after one turn each that is not counted.

    Args:
        model, reference: with `generate`, as transformers' language models have it.
        prompt: random tokens to read, the same in every turn.
        new: tokens to generate, at least 2: the first belongs to reading.
        rounds: counted turns of each.
        progress: called with (done, total) after every turn.

    Raises:
        LlmQuantError: a count that leaves nothing to time.
    """
    if prompt < 1 or new < 2 or rounds < 1:
        what = f"nothing to time with a prompt of {prompt}, {new} new tokens and {rounds} rounds"
        raise LlmQuantError(what, hint="a prompt and a round at least, and two new tokens")
    models = [model] if reference is None else [model, reference]
    turns: list[list[tuple[float, float]]] = [[] for _ in models]
    for done in range((rounds + 1) * len(models)):
        turns[done % len(models)].append(turn(models[done % len(models)], prompt, new))
        if progress:
            progress(done + 1, (rounds + 1) * len(models))
    read, write = zip(*(_medians(found[1:], prompt, new) for found in turns), strict=True)
    other = [None, None] if reference is None else [read[1], write[1]]
    return Speed(torch.get_num_threads(), prompt, new, read[0], other[0], write[0], other[1])


def _medians(turns: Sequence[tuple[float, float]], prompt: int, new: int) -> tuple[float, float]:
    read, write = zip(*turns, strict=True)
    return prompt / statistics.median(read), (new - 1) / statistics.median(write)


def turn(model: Any, prompt: int, new: int) -> tuple[float, float]:
    """Seconds to read a prompt and choose a token, and to generate the `new - 1` tokens after it with `generate`."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0)).to(model.device)
    attention = torch.ones_like(ids)
    never = vocabulary  # to end by length: `min_new_tokens` would look through all logits for every token
    with inference(model):
        moments = _moments(model, ids, attention_mask=attention, max_new_tokens=new, eos_token_id=never, pad_token_id=0)
    assert len(moments) == new + 1
    return moments[1] - moments[0], moments[-1] - moments[1]


def _moments(model: Any, ids: Tensor, **options: Any) -> list[float]:
    """When generation began, and when each token was there."""

    class Clock:
        """What `generate` hands the prompt and then every token to."""

        def put(self, ids: Any) -> None:
            moments.append(time.perf_counter())

        def end(self) -> None: ...

    moments: list[float] = []
    model.generate(ids, **options, do_sample=False, streamer=Clock())
    return moments
