"""Time of linear layers with quantized weights, beside dense ones and beside a plain read of as many bytes.

A model goes through its weights in turn, so none is in a cache when its turn comes. A benchmark that calls one weight
again and again measures the cache instead. Here copies of each weight rotate, and all contestants take turns, round by
round, so that a busy moment of the machine hits them alike.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmquant.kernels import cpu
from llmquant.tensor.base import QuantizedTensor


@dataclass(frozen=True)
class Contestant:
    """A weight to time.

    Attributes:
        name: what results call it.
        weight: [N, K], quantized or plain.
        dtype: of its inputs.
        kernel: what serves it.
    """

    name: str
    weight: Tensor
    dtype: torch.dtype
    kernel: str

    @property
    def dense(self) -> bool:
        """Whether the weight is a plain tensor, which the others are compared with."""
        return not isinstance(self.weight, QuantizedTensor)


@dataclass(frozen=True)
class Rotation:
    """How many copies of a weight rotate.

    Attributes:
        megabytes: at least so many in all copies together, to outgrow the caches; None: two copies, which may stay.
    """

    megabytes: float | None = 160.0

    def copies(self, weight: Tensor) -> list[Tensor]:
        """Copies of a weight, at least two, each with memory of its own."""
        enough = 2 if self.megabytes is None else math.ceil(self.megabytes * 1e6 / weight.nbytes)
        return [weight.clone() for _ in range(max(enough, 2))]

    def bytes_to_read(self, weight: Tensor) -> int:
        """Bytes of the plain read that tells what a rotation could reach: all its bytes, in whole 8-byte words."""
        total = 2 * weight.nbytes if self.megabytes is None else int(self.megabytes * 1e6)
        return max(total // 8, 1) * 8


@dataclass(frozen=True)
class Timing:
    """Seconds of one turn, over the rounds."""

    minimum: float
    median: float


@dataclass(frozen=True)
class Result:
    """One weight at one number of inputs.

    Attributes:
        shape: (N, K) of the weight.
        tokens: rows of the input (M).
        weight, kernel: the contestant's name and what served it.
        dense: whether it is a plain tensor.
        bytes: of one weight, scales included.
        copies: weights in rotation.
        seconds, median: of one call, the least and the median over rounds.
        bandwidth: bytes of the weight per second, at the least time.
        read_bandwidth: bytes per second of the plain read in the same rounds, at its least time.
        times_faster: than each dense contestant, by the least times; below 1 is slower.
    """

    shape: tuple[int, int]
    tokens: int
    weight: str
    kernel: str
    dense: bool
    bytes: int
    copies: int
    seconds: float
    median: float
    bandwidth: float
    read_bandwidth: float
    times_faster: dict[str, float]

    @property
    def share_of_read(self) -> float:
        """The part of the read bandwidth that it reached: about 1 where memory is the limit."""
        return self.bandwidth / self.read_bandwidth


Progress = Callable[[int, int, str], None]


def time_linears(
    contestants: Sequence[Contestant],
    tokens: Sequence[int],
    rotation: Rotation,
    rounds: int,
    progress: Progress | None = None,
) -> list[Result]:
    """`F.linear` of weights of one shape on 1, 4, ... inputs, all contestants in turns.

    Args:
        contestants: all [N, K]; names are distinct.
        tokens: the numbers of inputs (M).
        rotation: how many copies of each.
        rounds: turns that each contestant takes at each M.
        progress: called with rounds done, rounds in all, and what is timed.
    """
    _, read = read_method()
    copies = {c.name: rotation.copies(c.weight) for c in contestants}
    sizes = {c.name: rotation.bytes_to_read(c.weight) for c in contestants}
    buffer = torch.ones(max(sizes.values()), dtype=torch.uint8)
    results = []
    for index, count in enumerate(tokens):

        def step(done: int, before: int = index * rounds, count: int = count) -> None:
            if progress:
                progress(before + done, len(tokens) * rounds, f"M = {count}")

        runs = {f"read {size}": _read_turn(read, buffer[:size]) for size in set(sizes.values())}
        runs |= {c.name: _linear_turn(_inputs(c, count), copies[c.name]) for c in contestants}
        with torch.inference_mode():
            timings = take_turns(runs, rounds, warm=rotation.megabytes is None, progress=step)
        found = {c.name: _per_call(timings[c.name], len(copies[c.name])) for c in contestants}
        for c in contestants:
            speed = sizes[c.name] / timings[f"read {sizes[c.name]}"].minimum
            results.append(_result(c, count, len(copies[c.name]), found, speed, contestants))
    return results


def take_turns(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Timing]:
    """Times each run once a round, in order, after one round that does not count.

    Args:
        runs: name -> what to time.
        rounds: how often.
        warm: do each run once untimed before it is timed, so that it finds the caches as it left them.
        progress: called with the rounds done.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            if warm:
                run()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
        if progress:
            progress(number)
    counted = {name: values[1:] or values for name, values in seconds.items()}
    return {name: Timing(min(values), statistics.median(values)) for name, values in counted.items()}


def read_method() -> tuple[str, Callable[[Tensor], object]]:
    """How the read bandwidth is measured here, in words, and the function that reads a contiguous uint8 tensor.

    The native read fetches ahead, as the kernels do; without it a sum by torch, which may fall short of the limit.
    """
    if cpu.missing() is None:
        return "prefetching read", cpu.read_bytes
    return "torch sum", lambda data: data.view(torch.int64).sum()


def _inputs(contestant: Contestant, count: int) -> Tensor:
    """[M, K]"""
    return torch.randn(count, contestant.weight.shape[1]).to(contestant.dtype)


def _linear_turn(x: Tensor, weights: Sequence[Tensor]) -> Callable[[], None]:
    def turn() -> None:
        for weight in weights:
            F.linear(x, weight)

    return turn


def _read_turn(read: Callable[[Tensor], object], data: Tensor) -> Callable[[], object]:
    return lambda: read(data)


def _per_call(timing: Timing, copies: int) -> Timing:
    return Timing(timing.minimum / copies, timing.median / copies)


def _result(
    contestant: Contestant,
    count: int,
    copies: int,
    timings: Mapping[str, Timing],
    read_bandwidth: float,
    contestants: Sequence[Contestant],
) -> Result:
    own = timings[contestant.name]
    rows, columns = contestant.weight.shape
    return Result(
        shape=(rows, columns),
        tokens=count,
        weight=contestant.name,
        kernel=contestant.kernel,
        dense=contestant.dense,
        bytes=contestant.weight.nbytes,
        copies=copies,
        seconds=own.minimum,
        median=own.median,
        bandwidth=contestant.weight.nbytes / own.minimum,
        read_bandwidth=read_bandwidth,
        times_faster={c.name: timings[c.name].minimum / own.minimum for c in contestants if c.dense},
    )
