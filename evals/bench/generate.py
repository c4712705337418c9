"""Prefill and decode speed of model folders, taken in turns; `python evals/bench/generate.py PLAIN QUANTIZED ...`."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import llmquant  # noqa: F401  (teaches transformers to load quantized folders)


def main() -> None:
    """Prints tokens a second for each folder, and the ratio to the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="folders; the first is what the others are compared with")
    parser.add_argument("--prompt", type=int, default=256, help="tokens to read")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate, greedily")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    models = {path: AutoModelForCausalLM.from_pretrained(path).eval() for path in options.models}
    best = {path: [float("inf"), float("inf")] for path in models}
    for _ in range(options.rounds):
        for path, model in models.items():
            for i, seconds in enumerate(measure(model, options.prompt, options.new)):
                best[path][i] = min(best[path][i], seconds)
    speeds = {path: (options.prompt / read, (options.new - 1) / write) for path, (read, write) in best.items()}
    first = next(iter(speeds.values()))
    table = Table(header_style="bold")
    for column in ("model", "prefill tokens/s", "times", "decode tokens/s", "times"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for path, (read, write) in speeds.items():
        table.add_row(path, f"{read:.0f}", f"{read / first[0]:.2f}", f"{write:.1f}", f"{write / first[1]:.2f}")
    Console(width=100).print(table)


@torch.inference_mode()
def measure(model: Any, prompt: int, new: int) -> tuple[float, float]:
    """Seconds to read a prompt, and to generate `new - 1` tokens after the first with plain `generate`."""
    torch.manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, prompt))
    attention = torch.ones_like(ids)
    seconds = []
    for count in (1, new):
        start = time.perf_counter()
        model.generate(ids, attention_mask=attention, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        seconds.append(time.perf_counter() - start)
    return seconds[0], seconds[1] - seconds[0]


if __name__ == "__main__":
    main()
