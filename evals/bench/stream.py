"""Peak memory and speed of `llmquant quantize` on a large checkpoint: `python evals/bench/stream.py FOLDER --size 1b`.

Writes a Llama with random weights into FOLDER, shard by shard, unless it is there; quantizes it in a process of its
own; then measures what could not be done without: reading the same bytes from the disk, and the search alone, on
tensors that lie in memory. The share is the time of these two over the time of the run; `cpu_share` is the search's
processor time over that of the run, for machines on which others are at work. Both count the import of transformers
against the run. Peak memory is `VmHWM` of the process, mapped file pages included.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from llmquant.checkpoint.shards import Component, ShardWriter, Spec, index_json, lay_out
from llmquant.config.recipe import to_config
from llmquant.quantize import make_plan, quantize_weight

SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=2, tie_word_embeddings=True)
    | dict(num_attention_heads=4, num_key_value_heads=2),
    "1b": dict(vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16)
    | dict(num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True),
    "8b": dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    | dict(num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False),
}
"""The shapes of Llama models of about so many weights."""


def main() -> None:
    """Writes, quantizes, measures, prints JSON."""
    options = parse()
    if options.worker:
        worker(options.worker)
        return
    if not (options.folder / "config.json").is_file():
        write_model(options.folder, options.size)
    result = {"size": options.size, "recipe": options.recipe, "threads": torch.get_num_threads()}
    result |= measure(options)
    print(json.dumps(result, indent=2))
    if options.remove:
        shutil.rmtree(options.folder)


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="of the checkpoint; the result goes beside it and away")
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--recipe", default="int4-g32")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--remove", action="store_true", help="remove the checkpoint afterwards")
    parser.add_argument("--worker", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_model(folder: Path, size: str) -> None:
    """A checkpoint of random bfloat16 weights, of which one tensor is in memory at a time."""
    import transformers

    config = transformers.LlamaConfig(**SIZES[size], max_position_embeddings=4096, dtype="bfloat16")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    tied = set(model.all_tied_weights_keys)
    specs: dict[str, Spec] = {
        name: (torch.bfloat16, tuple(t.shape)) for name, t in model.state_dict().items() if name not in tied
    }
    folder.mkdir(parents=True)
    layouts = lay_out([{name: spec} for name, spec in specs.items()], {"format": "pt"}, 4_000_000_000)
    writer = ShardWriter(folder, layouts)
    for seed, (name, (_, shape)) in enumerate(specs.items()):
        write_random(writer.component(name), shape, seed)
    writer.finish()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    assert len(layouts) == 1 or json.loads(index_json(layouts))["weight_map"].keys() == specs.keys()


def write_random(component: Component, shape: tuple[int, ...], seed: int) -> None:
    """N(0, 0.02) weights, and norms of 1, some rows at a time."""
    generator = torch.Generator().manual_seed(seed)
    if len(shape) == 1:
        component.write(torch.ones(shape, dtype=torch.bfloat16))
        return
    for start in range(0, shape[0], 2048):
        rows = min(2048, shape[0] - start)
        component.write((torch.randn(rows, *shape[1:], generator=generator) * 0.02).bfloat16())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The run, and what it could not do without."""
    out = options.folder.with_name(options.folder.name + "-quantized")
    for file in options.folder.glob("*.safetensors"):
        drop(file)
    arguments = ["quantize", str(options.folder), "-o", str(out), "--recipe", options.recipe, "--overwrite"]
    command = [sys.executable, __file__, "--worker", *arguments, "--jobs", str(options.jobs)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(out)
    reading, size = read_alone(options.folder)
    search, cpu = search_alone(options.folder, options.recipe)
    return found | {
        "read_seconds": reading,
        "read_bytes": size,
        "search_seconds": search,
        "search_cpu_seconds": cpu,
        "share": (reading + search) / found["seconds"],
        "cpu_share": cpu / found["cpu_seconds"],
    }


def worker(arguments: list[str]) -> None:
    """`llmquant` in this process; prints its peak memory, its time, and its processor time."""
    sys.argv = ["llmquant", *arguments]
    imported = time.process_time()
    started = time.perf_counter()
    try:
        runpy.run_module("llmquant", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
    lines = Path("/proc/self/status").read_text().splitlines()
    status = {line.split(":")[0]: line.split(":")[1].split()[0] for line in lines if line.startswith("Vm")}
    cpu = time.process_time() - imported
    print(
        json.dumps(
            {"seconds": time.perf_counter() - started, "cpu_seconds": cpu, "peak_bytes": int(status["VmHWM"]) * 1024}
        )
    )


def read_alone(folder: Path) -> tuple[float, int]:
    """Seconds to read all shards from the disk, and their bytes."""
    buffer, total = memoryview(bytearray(2**26)), 0
    for path in folder.glob("*.safetensors"):
        drop(path)
    started = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return time.perf_counter() - started, total


def search_alone(folder: Path, recipe: str) -> tuple[float, float]:
    """Seconds, and those of processors, that `quantize_weight` takes for all weights; each shape is timed once."""
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    timed: dict[Any, tuple[float, float]] = {}
    wall = cpu = 0.0
    for candidate, config in make_plan(model, to_config(recipe)).chosen:
        kind = (candidate.shape, config)
        if kind not in timed:
            weight = torch.empty(candidate.shape, dtype=torch.bfloat16)
            for rows in weight.split(2048):
                rows.copy_(torch.randn(rows.shape).mul_(0.02))
            started = time.perf_counter(), time.process_time()
            quantize_weight(weight, config)
            timed[kind] = time.perf_counter() - started[0], time.process_time() - started[1]
        wall, cpu = wall + timed[kind][0], cpu + timed[kind][1]
    return wall, cpu


def drop(path: Path) -> None:
    """Lets the system forget what it keeps of a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
