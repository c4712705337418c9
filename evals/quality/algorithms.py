"""What each algorithm makes of one model: perplexity, divergence, real bits and seconds, one table.

    python evals/quality/algorithms.py MODEL --calib valid.txt --text wiki.test.raw --scheme int4-g64 int3-g64

With --refine N each row is followed by one of the same codes with refined scales.

Models are quantized in the checkpoint's dtype and measured in float32. All linear layers but the head are quantized.
Rows are printed as they come and kept in a JSON file, so that an interrupted run loses none.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from llmquant import quantize_, quantize_with_data_, refine_, rotate_
from llmquant.calibrate.data import calibration_windows
from llmquant.checkpoint.source import open_source
from llmquant.cli.console import progress_bar
from llmquant.config.recipe import to_config, with_algorithm
from llmquant.integrations.loading import load_tokenizer
from llmquant.measure.evaluate import evaluate
from llmquant.measure.memory import footprint
from llmquant.measure.reference import Reference
from llmquant.measure.text import load_text
from llmquant.measure.windows import make_windows, tokenize
from llmquant.quantize import make_plan
from llmquant.tune.sequential import runs_by_blocks

ALGORITHMS = ("rtn", "search", "hqq", "gptq", "signround")
COLUMNS = ("scheme", "algorithm", "rotated", "bits (q)", "perplexity", "of 16 bits", "KL", "top-1", "seconds")


def main() -> None:
    """Measures every combination that the command line asks for."""
    options = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source = open_source(options.model)
    tokenizer = load_tokenizer(source.folder)
    ids, bos = tokenize(tokenizer, load_text(options.text).content)
    windows = make_windows(ids, options.context, options.windows, bos)
    read = calibration_windows(tokenizer, options.calib, tokens=options.tokens, seed=options.seed)
    rows: list[dict[str, Any]] = []
    with progress_bar("16 bits") as progress:
        reference = Reference.compute(source.load().to(torch.float32), windows, progress)
    with reference:
        base = float(reference.nll.mean().exp())
        print(f"16 bits: perplexity {base:.3f}, {windows.shape[0]} windows of {windows.shape[1]}", flush=True)
        for rotate in [False, True] if options.rotate == "both" else [options.rotate == "yes"]:
            for scheme in options.scheme:
                for algorithm in options.algorithm:
                    for row in measured(source, scheme, algorithm, rotate, read, options, windows, reference):
                        rows.append(row | {"of 16 bits": row["perplexity"] / base})
                        print({name: rounded(value) for name, value in rows[-1].items()}, flush=True)
                        options.json.write_text(json.dumps(rows, indent=2))
                    gc.collect()
    show(rows)


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a plain checkpoint")
    parser.add_argument("--scheme", nargs="+", default=["int4-g64", "int3-g64"], help="or recipes (.yaml)")
    parser.add_argument("--algorithm", nargs="+", default=ALGORITHMS)
    parser.add_argument("--rotate", choices=["no", "yes", "both"], default="no", help="by a Hadamard matrix first")
    parser.add_argument("--calib", default="builtin", help="the text that algorithms read")
    parser.add_argument("--tokens", type=int, default=65536, help="of it, in windows of 512")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50, help="of signround")
    parser.add_argument("--refine", type=int, default=0, help="steps of refinement behind each algorithm")
    parser.add_argument("--text", default="builtin", help="the text that is measured on")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--json", type=Path, default=Path("algorithms.json"), help="where rows are kept")
    return parser.parse_args()


def measured(
    source: Any,
    scheme: str,
    algorithm: str,
    rotate: bool,
    read: torch.Tensor,
    options: argparse.Namespace,
    windows: torch.Tensor,
    reference: Reference,
) -> Iterator[dict[str, Any]]:
    """Quantizes a fresh copy of the model and measures it; once more behind refinement, where it is asked for."""
    model = source.load()
    if rotate:
        rotate_(model, "hadamard")
    asked = scheme if scheme.endswith(".yaml") else {"_head": None, "_default": scheme}
    config = with_algorithm(to_config(asked), algorithm)
    started = time.perf_counter()
    with progress_bar(f"{scheme} {algorithm}") as progress:
        if runs_by_blocks(make_plan(model, config)):
            report = quantize_with_data_(model, config, read, steps=options.steps, progress=progress)
        else:
            report = quantize_(model, config, progress=progress)
    seconds = time.perf_counter() - started
    for warning in report.warnings:
        print(f"  {warning}")
    about = {"scheme": scheme, "rotated": rotate}
    yield about | {"algorithm": algorithm, "seconds": seconds} | measure(model, windows, reference)
    if options.refine:
        with progress_bar("refining") as progress:
            refined = refine_(model, source.load(), read, steps=options.refine, progress=progress)
        row = about | {"algorithm": f"{algorithm}+refine", "seconds": seconds + refined.seconds}
        yield row | measure(model, windows, reference)


def measure(model: Any, windows: torch.Tensor, reference: Reference) -> dict[str, float]:
    """The figures of a quantized model, in float32; it is afterwards in the dtype it had."""
    dtype = model.dtype
    bits = footprint(model).bits_per_quantized_weight
    with progress_bar("measuring") as progress:
        found = evaluate(model.to(torch.float32), windows, reference, progress)
    model.to(dtype)
    assert found.kl is not None and found.top1 is not None
    return {"bits (q)": bits, "perplexity": found.perplexity.value, "KL": found.kl.mean, "top-1": found.top1}


def rounded(value: Any) -> Any:
    """Floats with four digits."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def show(rows: list[dict[str, Any]]) -> None:
    """The table for people."""
    table = Table(*COLUMNS, box=None)
    for row in rows:
        table.add_row(*(str(rounded(row[name])) for name in COLUMNS))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
