"""`make demo`: a real model, several recipes, one table of what each costs; `make table`: every recipe and format.

Every recipe is quantized from disk to disk, loaded back through `AutoModelForCausalLM.from_pretrained`, and compared
with the 16-bit checkpoint. Weights are measured as loaded (bfloat16 where not quantized); logits are computed in
float32, so that the differences are those of the weights and not of rounded activations.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from smollm2 import write_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmquant.checkpoint.stream import quantize_checkpoint
from llmquant.cli.console import progress_bar, size
from llmquant.config.recipe import list_recipes, to_config
from llmquant.convert.calibrated import Calibrating, Reading
from llmquant.formats import FORMATS
from llmquant.measure.evaluate import Evaluation, Protocol, backends, evaluate
from llmquant.measure.memory import Footprint, footprint
from llmquant.measure.record import build_record, machine, versions
from llmquant.measure.reference import Reference
from llmquant.measure.text import load_text
from llmquant.measure.windows import make_windows, tokenize

RECIPES = ("int8", "float8", "mixed-4-6-8", "int4-g32", "a8-int4-g32", "int4-g64", "int3-g32")
COLUMNS = ("recipe", "perplexity", "change", "KL", "top-1", "disk", "memory", "bits", "bits (q)", "s")
NOTE = (
    "The 16-bit model comes from a file of four-bit codes (Q4_1, groups of 32), so its weights lie on such a grid: "
    "rows with asymmetric four-bit groups of 32 look better than they would on another model."
)


def main() -> None:
    """Makes the checkpoints, measures them, prints the table and writes it to `results.json` and `table.md`."""
    options = parse()
    started = time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console(width=max(Console().width, 120))  # the table is not cut when the output is no terminal
    original = write_checkpoint(options.folder / "SmolLM2-135M")
    text = load_text(options.text)
    ids, bos = tokenize(AutoTokenizer.from_pretrained(original), text.content)
    windows = make_windows(ids, options.context, options.windows, bos)

    def protocol(model: Any) -> Protocol:
        return Protocol.describe(text, windows, bos, "float32", backends(model))

    records = []
    model, sizes = open_model(original)
    with progress_bar("16 bits: evaluate") as progress:
        reference = Reference.compute(model, windows, progress)
    with reference:
        records.append(record("16 bits", original, protocol(model), evaluate(model, windows, reference), sizes, 0.0))
        del model
        for name in every_recipe() if options.recipes == ["all"] else options.recipes:
            folder, seconds = quantized(original, options.folder / name, name)
            model, sizes = open_model(folder)
            with progress_bar(f"{name}: evaluate") as progress:
                measured = evaluate(model, windows, reference, progress)
            records.append(record(name, original, protocol(model), measured, sizes, seconds))
            del model
            gc.collect()

    show(console, records)
    console.print(f"{time.perf_counter() - started:.0f} s in all", highlight=False)
    (options.folder / "results.json").write_text(json.dumps(records, indent=2))
    (options.folder / "table.md").write_text(markdown(records))


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where the checkpoints go")
    parser.add_argument("--text", default="builtin", help="builtin, wikitext2 or a path")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help="names, paths or schemes; or all")
    return parser.parse_args()


def every_recipe() -> list[str]:
    """Every shipped recipe, and a scheme for each format that none of them is about."""
    shipped = [recipe.name for recipe in list_recipes()]
    return [*shipped, *(name for name in FORMATS if not any(recipe.split("-g")[0] == name for recipe in shipped))]


def open_model(folder: Path) -> tuple[Any, Footprint]:
    """A checkpoint as `from_pretrained` loads it, its sizes, and then its plain tensors in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    sizes = footprint(model, folder)
    return model.to(torch.float32), sizes


def quantized(original: Path, folder: Path, recipe: str) -> tuple[Path, float]:
    """The quantized folder and the seconds it took."""
    stats = Calibrating(str(original), to_config(recipe), Reading()).stats()
    with progress_bar(f"{recipe}: quantize") as progress:
        report = quantize_checkpoint(original, folder, recipe, stats=stats, overwrite=True, progress=progress)
    return folder, report.seconds


def record(
    name: str, original: Path, protocol: Protocol, measured: Evaluation, sizes: Footprint, seconds: float
) -> dict[str, Any]:
    """The evaluation's record, with the recipe and the seconds to quantize."""
    found = build_record(
        model=name,
        baseline=original.name,
        protocol=protocol,
        evaluation=measured,
        footprint=sizes,
        versions=versions(),
        machine=machine(),
    )
    return {**found, "seconds_to_quantize": seconds}


def cells(found: dict[str, Any]) -> list[str]:
    """One row of the table."""
    perplexity, sizes = found["perplexity"], found["bytes"]
    bits = sizes["bits_per_quantized_weight"]
    return [
        found["model"],
        f"{perplexity['value']:.2f} ± {perplexity['stderr']:.2f}",
        f"{perplexity['change']:+.1%}",
        f"{found['kl']['mean']:.4f}",
        f"{found['top1']:.1%}",
        size(sizes["disk"]),
        size(sizes["weights"]),
        f"{sizes['bits_per_weight']:.2f}",
        f"{bits:.2f}" if bits else "",
        f"{found['seconds_to_quantize']:.1f}" if bits else "",
    ]


def show(console: Console, records: list[dict[str, Any]]) -> None:
    """The table for people."""
    table = Table(title="SmolLM2-135M-Instruct", header_style="bold")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "recipe" else "right", no_wrap=True)
    for found in records:
        table.add_row(*map(escape, cells(found)))
    console.print(table)
    console.print(describe(records[-1]["protocol"]), NOTE, sep="\n", highlight=False)


def describe(protocol: dict[str, Any]) -> str:
    """The protocol in one line."""
    return (
        "text {text} ({text_sha256:.12}), {windows} windows of {context} tokens, {tokens_scored} scored, BOS {bos}, "
        "{dtype} logits ({backend} kernels); KL in nats to the 16-bit logits; bits (q): per quantized weight, scales "
        "and zero points counted; s: seconds to quantize"
    ).format(**protocol)


def markdown(records: list[dict[str, Any]]) -> str:
    """The table for the README."""
    rows = [COLUMNS, ["---"] + ["---:"] * (len(COLUMNS) - 1), *map(cells, records)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


if __name__ == "__main__":
    main()
