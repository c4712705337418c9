"""How long it takes to load a quantized checkpoint beside the plain one: `python evals/bench/load.py PLAIN QUANTIZED`.

Each load is a process of its own, in turns, after a first one of each that brings the files into the page cache.
Imports are not counted; `from_pretrained` is, and what lays each weight out for its kernel, which the first product
with it does otherwise. The last line is JSON: seconds of the clock and of processors, medians, and their ratios.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any


def main() -> None:
    """Measures both in turns and prints ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plain", type=Path)
    parser.add_argument("quantized", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--forward", action="store_true", help="count the first token, too: a plain file is only mapped"
    )
    parser.add_argument("--profile", action="store_true", help="print where the time of QUANTIZED goes, and end")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one or options.profile:
        one(options.quantized, options.threads, options.profile, options.forward)
        return
    found: dict[str, list[dict[str, float]]] = {"plain": [], "quantized": []}
    for number in range(options.rounds + 1):
        for name, runs in found.items():
            run = in_process(getattr(options, name), options.threads, options.forward)
            if number:  # the first fills the page cache
                runs.append(run)
                print(f"{name:>10}: {run['seconds']:.3f} s, {run['cpu_seconds']:.3f} s of processors", flush=True)
    print(json.dumps(summary(found)))


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians, and how many times as long the quantized checkpoint takes."""
    result: dict[str, Any] = {}
    for kind in ("seconds", "cpu_seconds"):
        plain, quantized = (median(run[kind] for run in found[name]) for name in ("plain", "quantized"))
        result[kind] = {"plain": plain, "quantized": quantized, "ratio": quantized / plain}
    return result


def in_process(folder: Path, threads: int | None, forward: bool) -> dict[str, float]:
    """One load in a fresh process."""
    command = [sys.executable, __file__, "-", str(folder), "--one", *(["--threads", str(threads)] if threads else [])]
    command += ["--forward"] * forward
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def one(folder: Path, threads: int | None, profiled: bool, forward: bool) -> None:
    """Loads a checkpoint in this process, lays its weights out, and perhaps makes a token."""
    import cProfile

    import torch
    import transformers
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  # the import is not counted
    from transformers.utils import logging

    import llmquant.integrations.transformers  # noqa: F401
    from llmquant.kernels.cpu import matrix_of
    from llmquant.tensor import QuantizedTensor

    logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    if threads:
        torch.set_num_threads(threads)
    profile = cProfile.Profile(time.process_time)
    if profiled:
        profile.enable()
    started = time.perf_counter(), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(folder)
    for weight in model.parameters():
        if isinstance(weight, QuantizedTensor):
            weight.kernel()
            matrix_of(weight.packed())
    if forward:
        with torch.inference_mode():
            model(torch.tensor([[1]]))
    seconds, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
    if profiled:
        profile.disable()
        profile_text(profile)
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu}))


def profile_text(profile: Any) -> None:
    """Prints where time goes, callees included."""
    import pstats

    pstats.Stats(profile).sort_stats("cumulative").print_stats(45)


if __name__ == "__main__":
    main()
