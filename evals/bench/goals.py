"""`make bench`: the figures that issue texts and the README promise, each measured and held against its goal.

Every figure is taken in a process of its own, so that none sees another's memory or imports. Times are the minimum of
several runs, taken in turns; memory is anonymous resident memory (RssAnon), sampled.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

MB = 1e6


class Figure(NamedTuple):
    """A measured value; `goal` is (smallest, largest), either None."""

    name: str
    value: float
    unit: str
    goal: tuple[float | None, float | None]

    @property
    def met(self) -> bool:
        """Whether the value lies within the goal."""
        low, high = self.goal
        return (low is None or self.value >= low) and (high is None or self.value <= high)


def accuracy() -> list[Figure]:
    """Signal to noise of `search` on N(0, 0.02) weights in groups of 32, and bits per weight of real shapes."""
    import torch

    from llmquant import compute_error, quantize_weight
    from llmquant.config.schemes import parse_scheme

    torch.manual_seed(0)
    weight = torch.randn(2048, 2048) * 0.02
    found = []
    for scheme, goal in (("int4-g32", 21.5), ("int4-g32-asym", 22.1), ("int1-g32", 4.4)):
        config = parse_scheme(scheme)
        assert config is not None
        error = compute_error(weight, quantize_weight(weight, config).dequantize())
        found.append(Figure(f"SQNR {scheme}", float(error), "dB", (goal, None)))
    return found


def sizes(folder: Path) -> list[Figure]:
    """SmolLM2-135M: bits per quantized weight, shrinkage of the tied model in int8, bit-equal reload and re-save."""
    import torch
    from smollm2 import write_checkpoint
    from transformers import AutoModelForCausalLM

    import llmquant
    from llmquant.checkpoint.inspect import inspect_checkpoint
    from llmquant.checkpoint.stream import quantize_checkpoint
    from llmquant.measure.memory import disk_bytes

    original = write_checkpoint(Path("demo/SmolLM2-135M"))
    found = []
    for scheme, goal in (("int4-g64", 4.26), ("int4-g64-asym", 4.33)):
        quantize_checkpoint(original, folder / scheme, scheme)
        bits = inspect_checkpoint(folder / scheme).totals()["bits_per_quantized_weight"]
        found.append(Figure(f"bits per quantized weight, {scheme}", float(bits or 0), "bits", (None, goal)))
    quantize_checkpoint(original, folder / "int8", "int8")
    shrunk = 1 - (disk_bytes(folder / "int8") or 0) / (disk_bytes(original) or 1)
    found.append(Figure("int8 shrinks the tied model by", 100 * shrunk, "%", (48, None)))

    ids = torch.arange(64).unsqueeze(0)
    in_memory = AutoModelForCausalLM.from_pretrained(original)
    llmquant.quantize_(in_memory, "int8")
    reloaded = AutoModelForCausalLM.from_pretrained(folder / "int8")
    reloaded.save_pretrained(folder / "again", max_shard_size="20MB")
    again = AutoModelForCausalLM.from_pretrained(folder / "again")
    with torch.inference_mode():
        logits = [model(ids).logits for model in (in_memory, reloaded, again)]
    equal = all(torch.equal(logits[0], other) for other in logits[1:])
    return [*found, Figure("reload and re-save give bit-equal logits", float(equal), "", (1, None))]


def import_time() -> list[Figure]:
    """What `import llmquant` adds to `import torch`, and what it prints and pulls in."""
    code = "import time, torch; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
    seconds = [float(_python(code.format("import llmquant"))) for _ in range(7)]
    pulled = _python("import sys, llmquant; print(sum(m in sys.modules for m in ('transformers', 'triton')))")
    return [
        Figure("import llmquant adds to import torch (median of 7)", statistics.median(seconds), "s", (None, 0.3)),
        Figure("of transformers and triton, import llmquant pulls in", float(pulled), "", (None, 0)),
    ]


def load_time(folder: Path) -> list[Figure]:
    """What loading 600 quantized tensors adds to reading them."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, logging

    import llmquant

    logging.disable_progress_bar()
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=86,  # 7 linears a layer: 602 quantized tensors
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=256,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "plain")
    llmquant.quantize_(model, llmquant.Int4WeightOnlyConfig(64, algorithm="rtn"))
    model.save_pretrained(folder / "quantized")

    def seconds(action: Callable[[], object]) -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    runs = [
        (
            seconds(lambda: AutoModelForCausalLM.from_pretrained(folder / "plain")),
            seconds(lambda: AutoModelForCausalLM.from_pretrained(folder / "quantized")),
            seconds(lambda: load_file(folder / "quantized" / "model.safetensors")),
        )
        for _ in range(5)
    ]
    plain, quantized, read = (min(column) for column in zip(*runs, strict=True))
    return [
        Figure("loading 602 quantized tensors, over the same model in 16 bits", quantized - plain, "s", (None, 0.3)),
        Figure("(all of from_pretrained, over reading the file's tensors)", quantized - read, "s", (None, None)),
    ]


def weight_memory() -> list[Figure]:
    """Peak memory of quantizing one weight beyond its result, as a fraction of the weight; a process a scheme."""
    code = """
import torch
from llmquant import quantize_weight
from llmquant.config.schemes import parse_scheme
from llmquant.measure.memory import RssAnonSampler
weight = torch.randn(4096, 4096, dtype=torch.bfloat16)
config = parse_scheme({scheme!r})
quantize_weight(weight[:4].clone(), config)  # imports and thread pools are not the weight's
with RssAnonSampler() as sampler:
    result = quantize_weight(weight, config)
print((sampler.peak - sampler.baseline - result.nbytes) / weight.nbytes)
"""
    schemes = ("int4-g64", "int4-g64-asym", "int3-g32", "int8", "float8", "int8-tensor")
    return [
        Figure(f"memory beyond the result, {s}", float(_python(code.format(scheme=s))), "of the weight", (None, 0.5))
        for s in schemes
    ]


def load_memory() -> list[Figure]:
    """Peak anonymous memory of quantizing SmolLM2 while loading, above bare imports."""
    from smollm2 import write_checkpoint

    original = write_checkpoint(Path("demo/SmolLM2-135M"))
    code = f"""
import torch, transformers, llmquant, json
from transformers import AutoModelForCausalLM
transformers.logging.disable_progress_bar()
import llmquant.integrations.transformers, transformers.models.llama.modeling_llama
from llmquant.measure.memory import RssAnonSampler
torch.ones(512, 512) @ torch.ones(512, 512)
with RssAnonSampler() as sampler:
    model = AutoModelForCausalLM.from_pretrained({str(original)!r}, quantization_config=llmquant.LlmQuantConfig("int8"))
size = sum(p.nbytes for p in model.parameters())
largest = max(p.numel() * 2 for p in model.parameters())
print(json.dumps([sampler.peak - sampler.baseline, size, largest]))
"""
    peak, size, largest = json.loads(_python(code).splitlines()[-1])
    name = (
        f"peak above imports ({peak / MB:.0f} MB; quantized {size / MB:.0f} MB, largest tensor {largest / MB:.0f} MB)"
    )
    return [Figure(name, (peak - size) / largest, "largest tensors beyond the quantized size", (None, 2))]


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.strip()


SECTIONS = {
    "accuracy": accuracy,
    "sizes": sizes,
    "import": import_time,
    "load": load_time,
    "weight-memory": weight_memory,
    "load-memory": load_memory,
}


def run_section(name: str) -> list[Figure]:
    """One section in this process."""
    section = SECTIONS[name]
    if name not in ("sizes", "load"):
        return section()  # type: ignore[operator]
    with tempfile.TemporaryDirectory() as folder:
        return section(Path(folder))  # type: ignore[operator]


def main() -> int:
    """Runs the sections that are named (all without a name), each in a process; 1 if a goal is missed."""
    if sys.argv[1:2] == ["--child"]:
        print("\n" + json.dumps(run_section(sys.argv[2])))
        return 0
    missed = 0
    for name in sys.argv[1:] or SECTIONS:
        command = [sys.executable, __file__, "--child", name]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        for figure in (Figure(*row) for row in json.loads(out.splitlines()[-1])):
            low, high = figure.goal
            goal = f"at least {low:g}" if low is not None else f"at most {high:g}" if high is not None else "no goal"
            missed += not figure.met
            print(
                f"{'ok  ' if figure.met else 'MISS'} {figure.name}: {figure.value:.4g} {figure.unit} ({goal})",
                flush=True,
            )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
