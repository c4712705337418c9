"""The noise floor: how far a model moves from itself when it is only computed a little differently.

A divergence below it says nothing: other kernels, another order of additions, another machine would do as much. It is
found by running the reference again with noise the size of bfloat16's rounding on the output of every module without
children (embeddings, linears, norms, the head). The noise is normal, with the standard deviation that rounding has,
1 / sqrt(12) of a step. It keeps its size when it is rounded itself: it passes half a step, and so moves a bfloat16
value by one, in 8.3 % of cases, which again is a variance of 1 / 12. So the floor is the same idea whether the
reference is computed in bfloat16 or in more bits; running the model in bfloat16 would show nothing where it is in
bfloat16 already. Residual additions are not modules, so theirs is left out.

SmolLM2-135M: 4e-4 nats computed in float32, 1.9e-3 in bfloat16; the same weights in the two dtypes are 1.2e-3 apart.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.measure.evaluate import Evaluation, Progress, score, summarize
from llmquant.measure.reference import Reference

_BITS = 8  # significant ones of bfloat16


def noise_floor(
    model: nn.Module, windows: Tensor, reference: Reference, progress: Progress | None = None, seed: int = 0
) -> Evaluation:
    """Evaluate the reference's own model with noise on windows [W, T].

    Each window is met by the same noise, so that it does not matter which windows are run here and which elsewhere.

    Raises:
        LlmQuantError: windows that are not the reference's.
    """
    start = time.perf_counter()
    with bfloat16_noise(model, seed):
        tokens, rows = score(model, windows, reference, progress)
    return summarize(tokens, rows, time.perf_counter() - start)


@contextmanager
def bfloat16_noise(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Within, the floating-point outputs of all modules without children carry noise, the same at every call."""
    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    with ExitStack() as stack:
        for place, module in enumerate(leaves):
            stack.callback(module.register_forward_hook(_hook(seed * len(leaves) + place)).remove)
        yield


def _hook(seed: int) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        generator = torch.Generator(output.device).manual_seed(seed)
        return (output.float() + _noise(output, generator)).to(output.dtype)

    return hook


def _noise(values: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise [...] in float32, of the standard deviation that rounding these values to bfloat16 has."""
    step = torch.frexp(values.float()).exponent.sub_(_BITS)  # as a power of two: values are 0.5 to 1 times 2^exponent
    noise = torch.randn(values.shape, generator=generator, device=values.device).div_(math.sqrt(12))
    return torch.ldexp(noise, step)
