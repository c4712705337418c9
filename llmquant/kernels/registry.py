"""Which kernel serves a weight, and why no faster one does."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

from llmquant.errors import ConfigError
from llmquant.kernels import cpu, reference
from llmquant.kernels.packed import Packed

BACKENDS: dict[str, ModuleType] = {"avx512": cpu, "reference": reference}
"""Name -> module with `linear`, `matmul` and `refusal`; the first that does not refuse a weight serves it."""

_forced: str | None = None


class Choice(NamedTuple):
    """The backend that serves a weight, and the reason in words."""

    kernel: str
    reason: str


@functools.lru_cache(maxsize=4096)
def choose(format_name: str, block: tuple[int, int], columns: int, device: str) -> Choice:
    """The fastest backend that can serve such a weight, and why it does, or why no faster one can."""
    reasons: list[str] = []
    for name, backend in BACKENDS.items():
        refused = backend.refusal(format_name, block, columns, device)
        if refused is None:
            return Choice(name, "; ".join(reasons) or "the fastest kernel for this weight here")
        reasons.append(f"{name}: {refused}")
    raise AssertionError("the reference serves everything")


def backend(weight: Packed) -> ModuleType:
    """The module that serves a weight now: the chosen one, or the forced one where it can."""
    block = (weight.block[0], weight.block[1])
    name = choose(weight.format, block, weight.columns, weight.qdata.device.type).kernel
    if _forced is not None:
        refused = BACKENDS[_forced].refusal(weight.format, block, weight.columns, weight.qdata.device.type)
        if refused:
            raise ConfigError(f"the backend {_forced} cannot serve this weight: {refused}", where=weight.format)
        name = _forced
    return BACKENDS[name]


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
