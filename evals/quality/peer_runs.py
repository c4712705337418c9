"""What `peers.py` can run: other libraries' ways to quantize, and ours, each under a name and with its settings."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any, NamedTuple

GROUP = 64
OWN = "llmquant"
MODULES = {
    "torchao": "torchao",
    "hqq": "hqq",
    "llama": "llama_cpp",
    "llmcompressor": "llmcompressor",
    "auto-round": "auto_round",
    OWN: "llmquant",
}
"""A family -> the module by which one sees whether an environment has it."""


class Run(NamedTuple):
    """One way to quantize.

    Attributes:
        name: what `--only` and the table call it.
        family: a key of `MODULES`.
        bits: of a code, nominally; those of a mixture are its budget.
        settings: for the family's function.
    """

    name: str
    family: str
    bits: float
    settings: dict[str, Any]


def catalogue(own: Sequence[str]) -> list[Run]:
    """Every run, those that take seconds first."""
    ours = [own_run(text) for text in own]
    quick = [run for run in ours if run.settings["algorithm"] in ("rtn", "search", "hqq")]
    return [*torchao_runs(), *hqq_runs(), *llama_runs(), *quick, *(r for r in ours if r not in quick), *long_runs()]


def torchao_runs() -> list[Run]:
    """Rounding to nearest; scales by HQQ's rule; int8 with one scale a row."""
    runs = [_torchao(8, 0, True)]
    runs += [_torchao(bits, GROUP, symmetric) for bits in (6, 4, 3, 2) for symmetric in (True, False)]
    return [*runs, *(_torchao(bits, GROUP, True, "hqq_scale_only") for bits in (4, 3, 2))]


def hqq_runs() -> list[Run]:
    """Groups along a row (the package's default) and along a column."""
    runs = []
    for axis, suffix in ((1, ""), (0, "-axis0")):
        for bits in (4, 3, 2):
            settings = {"bits": bits, "group": GROUP, "axis": axis}
            runs.append(Run(f"hqq-{bits}-g{GROUP}{suffix}", "hqq", bits, settings))
    return runs


LEGACY = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
K_TYPES = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs")


def llama_runs() -> list[Run]:
    """Types of llama.cpp, without and with an importance matrix (q8_0 makes no use of one)."""
    plain = [_llama(kind, False) for kind in (*LEGACY, *K_TYPES)]
    return plain + [_llama(kind, True) for kind in (*LEGACY, *K_TYPES) if kind != "q8_0"]


def long_runs() -> list[Run]:
    """Those that take minutes to a quarter of an hour each: widest codes first."""
    runs = []
    for bits in (4, 3, 2):
        settings: dict[str, Any] = {"bits": bits, "group": GROUP}
        if bits > 2:
            gptq = {**settings, "method": "gptq", "symmetric": True}
            runs.append(Run(f"llmcompressor-gptq-{bits}-g{GROUP}", "llmcompressor", bits, gptq))
            awq = {**settings, "method": "awq", "symmetric": False}
            runs.append(Run(f"llmcompressor-awq-{bits}-g{GROUP}", "llmcompressor", bits, awq))
        learned = {**settings, "symmetric": True, "iterations": 50}
        runs.append(Run(f"auto-round-{bits}-g{GROUP}", "auto-round", bits, learned))
    return runs


OWN_RUNS = (
    *("int8:search", "int6-g64:search", "int5-g32:search", "int5-g64:search", "int4-g32-asym:search"),
    *("int4-g32:search", "int4-g64-asym:search", "int4-g64:search", "int4-g64:rtn", "int3-g32:search"),
    *("int3-g64:search", "int2-g32:search", "int2-g64:search", "int4-g32-s8:search", "int3-g32-s8:search"),
    *("int2-g32-s8:search", "int4-g64:signround", "int3-g64:signround", "int2-g64:signround", "int5-g64:signround"),
    *("int4-g64:gptq", "int3-g64:gptq", "int2-g64:gptq", "int5-g64:gptq", "int6-g64:gptq"),
    *("int4-g32-s8:gptq", "int3-g32-s8:gptq", "int2-g32-s8:gptq", "int4-g32:signround", "int4-g32-asym:signround"),
    *("int3-g32:signround", "int2-g32:signround", "int5-g32:signround"),
    *("4.25:signround", "3.5:signround", "3.0:signround", "2.5:signround", "4.25:gptq", "3.5:gptq", "3.0:gptq"),
)


def own_run(text: str) -> Run:
    """`SCHEME:ALGORITHM`, or `BITS:ALGORITHM` for a mixture of so many bits. Raises `ValueError` for another text."""
    what, separator, algorithm = text.partition(":")
    if not separator or not what or not algorithm:
        raise ValueError(f"{text!r} is neither SCHEME:ALGORITHM nor BITS:ALGORITHM")
    budget = _number(what)
    settings = {"scheme": None if budget else what, "budget": budget, "algorithm": algorithm}
    name = f"mix{budget:g}" if budget else what
    digits = "".join(c if c.isdigit() else " " for c in what).split()
    return Run(f"{OWN}-{name}-{algorithm}", OWN, budget or (float(digits[0]) if digits else 0.0), settings)


def selected(runs: Sequence[Run], only: Sequence[str], bits: Sequence[float]) -> list[Run]:
    """Those that a name, a pattern or a family asks for, of so many whole bits; nothing asked is all.

    Raises:
        ValueError: for a name that is none of them.
    """
    for pattern in only:
        if not any(_fits(run, pattern) for run in runs):
            raise ValueError(
                f"unknown name {pattern!r}: a family ({', '.join(MODULES)}), a run or a pattern like hqq-*"
            )
    chosen = [run for run in runs if not only or any(_fits(run, pattern) for pattern in only)]
    return [run for run in chosen if not bits or int(run.bits) in [int(b) for b in bits]]


def _fits(run: Run, pattern: str) -> bool:
    return run.family == pattern or fnmatch.fnmatchcase(run.name, pattern)


def _torchao(bits: int, group: int, symmetric: bool, algorithm: str = "affine") -> Run:
    settings = {"bits": bits, "group": group, "symmetric": symmetric, "algorithm": algorithm}
    name = f"torchao-int{bits}-" + (f"g{group}" if group else "row") + ("-sym" if symmetric else "-asym")
    return Run(name if algorithm == "affine" else f"{name}-hqq", "torchao", bits, settings)


def _llama(kind: str, imatrix: bool) -> Run:
    bits = next(int(c) for c in kind if c.isdigit())
    return Run(f"llama-{kind}" + ("-imatrix" if imatrix else ""), "llama", bits, {"type": kind, "imatrix": imatrix})


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
