"""Time of a quantized linear against torch's own `F.linear`, in one run: `python evals/bench/linear.py --help`.

Weights rotate, so that they come from memory as they do in a model. Each figure is the minimum over rounds in which
all contestants take turns; compare ratios, not milliseconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from llmquant import quantize_weight
from llmquant.config.schemes import parse_scheme


def main() -> None:
    """Prints a table: milliseconds, ratio to F.linear, bytes a second, and the kernel that served."""
    options = parse()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    table = Table(header_style="bold")
    for column in ("M", "weight", "ms", "times faster", "GB/s", "kernel"):
        table.add_column(column, justify="left" if column in ("weight", "kernel") else "right")
    plain = [
        torch.randn(options.rows, options.columns).to(dtype) * 0.02 for _ in range(copies(options, dtype.itemsize))
    ]
    weights = {name: quantized(name, plain[0], options) for name in options.schemes}
    with torch.inference_mode():
        for count in options.inputs:
            x = torch.randn(count, options.columns).to(dtype)
            runs: dict[str, Callable[[], object]] = {"torch": lambda x=x: [F.linear(x, w) for w in plain]}
            for name, group in weights.items():
                runs[name] = lambda x=x, group=group: [F.linear(x, w) for w in group]
            best = fastest(runs, options.rounds)
            times = {"torch": best["torch"] / len(plain)} | {n: best[n] / len(weights[n]) for n in weights}
            for name, seconds in times.items():
                size = plain[0].nbytes if name == "torch" else weights[name][0].nbytes
                kernel = options.dtype if name == "torch" else weights[name][0].kernel().kernel
                ratio = f"{times['torch'] / seconds:.2f}"
                table.add_row(str(count), name, f"{1e3 * seconds:.3f}", ratio, f"{size / seconds / 1e9:.1f}", kernel)
    Console(width=100).print(table)


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--inputs", type=int, nargs="+", default=[1, 4, 16, 128], help="rows of x (M)")
    parser.add_argument("--schemes", nargs="+", default=["int8", "int4-g32", "int4-g128", "int3-g32", "int2-g32"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--megabytes", type=int, default=160, help="of weights in rotation")
    parser.add_argument("--rounds", type=int, default=12)
    return parser.parse_args()


def copies(options: argparse.Namespace, bytes_a_weight: float) -> int:
    """How many weights fill the megabytes in rotation."""
    return max(int(options.megabytes * 1e6 / (options.rows * options.columns * bytes_a_weight)), 1)


def quantized(scheme: str, plain: torch.Tensor, options: argparse.Namespace) -> list[torch.Tensor]:
    """Copies of one quantized weight, each with memory of its own."""
    config = parse_scheme(scheme)
    assert config is not None
    weight = quantize_weight(plain, config.with_algorithm("rtn"))
    return [weight.clone() for _ in range(copies(options, weight.nbytes / weight.numel()))]


def fastest(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least seconds of each, taken in turns."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
