"""Kills `llmquant quantize` at random instants and goes on: `python evals/robustness/kills.py --kills 200`.

Each attempt is a process that is killed at an instant drawn from the whole length of a run, perhaps again when it goes
on, and then left alone. Every file of the folder that it ends with must be that of a run that nobody killed, byte for
byte; before, there must be no folder, or that one. Processes are forked from one that has imported everything, so that
an attempt takes a second.

`--way stream` quantizes by search, `--way gptq` block by block on a text. With `--full`, attempts are not killed: the
disk is full after a random number of bytes. Prints a line of JSON for each way.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import llmquant.checkpoint.output as output
from llmquant.config.recipe import change_algorithm, to_recipe
from llmquant.convert.calibrated import Reading
from llmquant.convert.job import Conversion
from llmquant.errors import LlmQuantError, NoSpaceError

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "by", "mat", "hill", "and", "then", "it", "was", "gone", "."]
FAILED, FULL = 1, 3


def main() -> None:
    """All attempts; the exit status is 1 if a single one went wrong."""
    options = parse()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="kills-", dir=options.folder))
    wrong = 0
    try:
        model = write_model(root / "model")
        for way in options.way or ["stream", "gptq"]:
            result = Attempts(model, root / way, way, options).run()
            print(json.dumps(result), flush=True)
            wrong += result["wrong"]
    finally:
        shutil.rmtree(root, ignore_errors=True)
    sys.exit(bool(wrong))


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="attempts of each way")
    parser.add_argument("--way", action="append", choices=["stream", "gptq"], help="may repeat; by default both")
    parser.add_argument("--full", action="store_true", help="a full disk in place of kills")
    parser.add_argument("--jobs", type=int, help="tensors at a time, for the way stream")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; by default the system's folder for temporary files")
    return parser.parse_args()


class Attempts:
    """Attempts of one way, and what came of them.

    Args:
        model: folder of the plain model.
        root: an empty place to work in.
        way: `stream` or `gptq`.
        options: of the command line.
    """

    def __init__(self, model: Path, root: Path, way: str, options: argparse.Namespace) -> None:
        self.model, self.root, self.way, self.options = model, root, way, options
        self.random = random.Random(f"{options.seed} {way}")
        self.seen: Counter[str] = Counter()
        root.mkdir(parents=True)

    def run(self) -> dict[str, Any]:
        """Counts by what was found right after the kill, and how many ended otherwise than the run nobody killed."""
        started = time.perf_counter()
        length = self.child(self.root / "straight", 0)
        wanted, size = contents(self.root / "straight"), written(self.root / "straight")
        wrong = sum(not self.attempt(self.root / str(i), wanted, length, size) for i in range(self.options.kills))
        return {
            "way": self.way,
            "attempts": self.options.kills,
            "full_disk": self.options.full,
            "length_of_a_run": round(length, 3),
            "found": dict(sorted(self.seen.items())),
            "wrong": wrong,
            "seconds": round(time.perf_counter() - started, 1),
        }

    def attempt(self, out: Path, wanted: dict[str, str], length: float, size: int) -> bool:
        """Whether one attempt ended as it should."""
        interval = self.random.choice([0.0, output.COMMIT_SECONDS])
        for _ in range(self.random.choice([1, 1, 2, 3])):
            room = self.random.randrange(size) if self.options.full else None
            self.child(out, interval, None if room is not None else self.random.uniform(0, length), room)
            self.seen[state(out, wanted)] += 1
            if out.exists():
                break
        partial = out.with_name(out.name + ".partial")
        done_before = out.exists()  # and perhaps killed while it tidied up
        if not done_before:
            self.child(out, interval)
        right = state(out, wanted) == "complete" and (done_before or not partial.exists())
        for path in (out, partial):
            shutil.rmtree(path, ignore_errors=True)
        return right

    def child(self, out: Path, interval: float, kill_after: float | None = None, room: int | None = None) -> float:
        """One process: its length in seconds. Raises where it ends as it should not."""
        started = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            in_child(lambda: convert(self.model, out, self.way, self.options.jobs), interval, room)
        if kill_after is not None:
            time.sleep(max(kill_after - (time.perf_counter() - started), 0))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        allowed = (
            {0} | ({-signal.SIGKILL} if kill_after is not None else set()) | ({FULL} if room is not None else set())
        )
        if os.waitstatus_to_exitcode(status) not in allowed:
            raise SystemExit(f"{self.way}: a process ended with status {os.waitstatus_to_exitcode(status)}")
        return time.perf_counter() - started


def in_child(do: Callable[[], None], interval: float, room: int | None) -> None:
    """Does it in a process that ends with a status of its own. Does not return."""
    output.COMMIT_SECONDS = interval
    if room is not None:
        fill_up(room)
    try:
        do()
    except NoSpaceError:
        os._exit(FULL)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(FAILED)
    os._exit(0)


def fill_up(room: int) -> None:
    """Makes the disk full after so many bytes of tensors: what still fits is written, then the system's error comes."""
    write, left = os.pwrite, [room]

    def pwrite(file: int, content: memoryview, place: int, /) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = write(file, content[: left[0]], place)
        left[0] -= count
        return count

    os.pwrite = pwrite  # type: ignore[assignment]


def convert(model: Path, out: Path, way: str, jobs: int | None) -> None:
    """`llmquant quantize`, but for the command line."""
    from llmquant.checkpoint.crew import Crew

    recipe = change_algorithm(to_recipe("int4-g32"), "gptq" if way == "gptq" else "search")
    reading = Reading(str(model / "text.txt"), 512) if way == "gptq" else Reading()
    try:
        Conversion(recipe, reading).write(str(model), out, max_shard_bytes=60_000, crew=Crew(jobs))
    except LlmQuantError as error:
        if not isinstance(error, NoSpaceError):
            print(error, file=sys.stderr)
        raise


def contents(folder: Path) -> dict[str, str]:
    """Name -> hash of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def written(folder: Path) -> int:
    """Bytes of all shards."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def state(out: Path, wanted: dict[str, str]) -> str:
    """What there is: `nothing`, `partial` work, the `complete` folder, or a `broken` one."""
    if out.exists():
        return "complete" if contents(out) == wanted else "broken"
    return "partial" if out.with_name(out.name + ".partial").exists() else "nothing"


def write_model(folder: Path) -> Path:
    """A small model with a tokenizer of words, and a text."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    sizes = dict(vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
    config = transformers.LlamaConfig(
        **sizes, num_key_value_heads=2, intermediate_size=112, bos_token_id=0, eos_token_id=1
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=".").save_pretrained(folder)
    text = random.Random(0).choices(WORDS, k=4000)
    (folder / "text.txt").write_text(" ".join(text), encoding="utf-8")
    return folder


if __name__ == "__main__":
    main()
