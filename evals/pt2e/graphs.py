"""Converted graphs for the measurements of this folder, and times taken in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from llmquant.measure.latency import Timing, take_turns
from llmquant.pt2e import X86Quantizer, convert_pt2e, get_default_x86_inductor_quantization_config, prepare_pt2e
from llmquant.pt2e.patterns import fqn_of

MODES = ("static", "dynamic", "token")


def exported(model: nn.Module, *inputs: Any) -> fx.GraphModule:
    """The float graph."""
    return torch.export.export(model.eval(), inputs).module()


def converted(
    model: nn.Module,
    *inputs: Any,
    mode: str = "static",
    skip: Callable[[str], bool] = lambda name: False,
    more: Sequence[tuple[Any, ...]] = (),
) -> fx.GraphModule:
    """The graph with int8 products: `static` (calibrated on `inputs` and `more`), `dynamic`, or a scale a `token`."""
    config = get_default_x86_inductor_quantization_config(is_dynamic=mode != "static", per_token=mode == "token")
    quantizer = X86Quantizer().set_global(config).add_filter(lambda node: not skip(fqn_of(node)))
    prepared = prepare_pt2e(exported(model, *inputs), quantizer)
    for one in (inputs, *more) if mode == "static" else (inputs,):
        prepared(*one)
    return convert_pt2e(prepared)


def print_times(runs: dict[str, Callable[[], Any]], rounds: int, baselines: tuple[str, ...]) -> dict[str, Timing]:
    """Times all in turns; prints the least time of each, and how many times faster than the baselines it is."""
    times = take_turns(runs, rounds, warm=True)
    for name, timing in times.items():
        ratios = ", ".join(f"{times[base].minimum / timing.minimum:.2f}x {base}" for base in baselines if base in times)
        print(f"  {name:34} {timing.minimum * 1e3:9.2f} ms (median {timing.median * 1e3:9.2f})  {ratios}", flush=True)
    return times
