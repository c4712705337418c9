"""Converted graphs for the measurements of this folder.

Lowering is measured apart from quantizers: graphs are those of the tests (`tests/pt2e/handmade.py`), min/max ranges for
static activations, int8 weights with a scale a row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "pt2e"))

from handmade import converted, exported

from llmquant.measure.latency import Timing, take_turns

__all__ = ["converted", "exported", "print_times"]


def print_times(runs: dict[str, Callable[[], Any]], rounds: int, baselines: tuple[str, ...]) -> dict[str, Timing]:
    """Times all in turns; prints the least time of each, and how many times faster than the baselines it is."""
    times = take_turns(runs, rounds, warm=True)
    for name, timing in times.items():
        ratios = ", ".join(f"{times[base].minimum / timing.minimum:.2f}x {base}" for base in baselines if base in times)
        print(f"  {name:34} {timing.minimum * 1e3:9.2f} ms (median {timing.median * 1e3:9.2f})  {ratios}", flush=True)
    return times
