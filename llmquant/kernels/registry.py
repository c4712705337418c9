"""Which kernel serves a weight, and why no faster one does."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llmquant.errors import ConfigError
from llmquant.kernels import aten, cpu, reference
from llmquant.kernels.packed import Packed
from llmquant.kernels.triton import TRITON
from llmquant.primitives.dynamic import Activation, StaticScale


class Backend(Protocol):
    """What serves the operators of `kernels.ops`; all tensors were checked before."""

    def refusal(self, format_name: str, block: tuple[int, int], columns: int, device: str) -> str | None:
        """Why it cannot serve such a weight, or None."""

    def linear(self, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""

    def linear_int8(
        self, x: Tensor, weight: Packed, activation: Activation, bias: Tensor | None, static: StaticScale | None = None
    ) -> Tensor:
        """The same with x in int8 codes, by the rule of `primitives.dynamic`."""

    def linear_float8(
        self, x: Tensor, weight: Packed, activation: Activation, bias: Tensor | None, static: StaticScale | None = None
    ) -> Tensor:
        """The same with x as its float8 codes stand for it."""

    def matmul(self, x: Tensor, weight: Packed) -> Tensor:
        """x [..., N] -> x @ weight, [..., K] in x's dtype."""

    def embedding(self, indices: Tensor, weight: Packed, dtype: torch.dtype) -> Tensor:
        """indices [...] -> rows, [..., K] in `dtype`. Raises IndexError."""


BACKENDS: dict[str, Backend] = {**cpu.BACKENDS, "aten": aten, "triton": TRITON, "reference": reference}
"""The first that does not refuse a weight serves it."""

_forced: str | None = None


class Choice(NamedTuple):
    """The backend that serves a weight, and the reason in words."""

    kernel: str
    reason: str


@functools.lru_cache(maxsize=4096)
def choose(format_name: str, block: tuple[int, int], columns: int, device: str) -> Choice:
    """The fastest backend that can serve such a weight, and why it does, or why no faster one can."""
    refusals: dict[str, list[str]] = {}
    for name, backend in BACKENDS.items():
        refused = backend.refusal(format_name, block, columns, device)
        if refused is None:
            if name == "reference" and device == "cpu":
                _warn_if_slow()
            reasons = [f"{', '.join(names)}: {reason}" for reason, names in refusals.items()]
            if name == "aten":
                reasons.insert(0, aten.merit(format_name))
            return Choice(name, "; ".join(reasons) or "the fastest kernel for this weight here")
        refusals.setdefault(refused, []).append(name)
    raise AssertionError("the reference serves everything")


@functools.cache
def _warn_if_slow() -> None:
    """Says once a process that nothing native was installed; `llmquant info` says it too."""
    missing = cpu.missing()
    if missing:
        warnings.warn(f"llmquant runs on its slow reference: {missing}", stacklevel=2)


def backend(weight: Packed) -> Backend:
    """The backend that serves a weight now: the chosen one, or the forced one where it can."""
    if _forced is not None:
        return _forced_backend(weight, _forced)
    found = weight.__dict__.get("backend")
    if found is None:
        name = "reference" if weight.has_real_zeros else choose(*_traits(weight)).kernel
        found = weight.__dict__["backend"] = BACKENDS[name]
    return found


def _forced_backend(weight: Packed, name: str) -> Backend:
    refused = BACKENDS[name].refusal(*_traits(weight))
    if weight.has_real_zeros and name != "reference":
        refused = "its zero points are real numbers"
    if refused:
        raise ConfigError(f"the backend {name} cannot serve this weight: {refused}", where=weight.format)
    return BACKENDS[name]


def _traits(weight: Packed) -> tuple[str, tuple[int, int], int, str]:
    return weight.format, (weight.block[0], weight.block[1]), weight.columns, weight.qdata.device.type


@contextlib.contextmanager
def force(name: str) -> Iterator[None]:
    """Within the block every weight is served by the backend of that name; one that it cannot serve is an error."""
    global _forced
    if name not in BACKENDS:
        raise ConfigError(f"unknown backend {name!r}", hint="one of " + ", ".join(BACKENDS))
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
