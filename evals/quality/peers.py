"""Accuracy per byte here and elsewhere: each library quantizes one model, and one harness measures all.

    python evals/quality/peers.py MODEL --calib valid.txt --text wiki.test.raw --out DIR \\
        --peer torchao=PYTHON --peer hqq=PYTHON --peer llama=PYTHON --peer llmcompressor=PYTHON --peer auto-round=PYTHON

Each peer runs in a process of its own, one at a time, in the environment of the Python given for its family (a family
without one is looked for here, and left out with a note). All get the same float32 copy of the model, the same tokens
to calibrate on, and quantize all linear layers but the head. What they make comes back as a plain checkpoint with
decoded weights (`peer_quantizer.py`), and llmquant measures its KL and perplexity in float32.

Every finished run is a line of DIR/results.jsonl; the same command goes on behind them, and tries again what failed.
Sizes are real bytes of all quantized weights with what is stored beside the codes: `stored` as the peer keeps them,
`bits` at best (without gaps between codes, scales in 16 bits), which is what rows are compared at.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from peer_own import quantize_own, write_imatrix
from peer_runs import MODULES, OWN, OWN_RUNS, Run, catalogue, selected
from peer_table import Book, Line, failures, summary, table
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

from llmquant.calibrate.data import calibration_windows
from llmquant.checkpoint.save import save
from llmquant.checkpoint.source import open_source
from llmquant.cli.console import progress_bar
from llmquant.errors import LlmQuantError, ReferenceFileError
from llmquant.integrations.loading import load_tokenizer
from llmquant.measure.evaluate import evaluate
from llmquant.measure.record import machine, versions
from llmquant.measure.reference import Reference
from llmquant.measure.text import load_text
from llmquant.measure.windows import make_windows, tokenize

SCRIPT = Path(__file__).with_name("peer_quantizer.py")


class PeerFailed(Exception):
    """A run that came to no result, in its own words."""


class Ground(NamedTuple):
    """What all runs of one command share.

    Attributes:
        plain: folder of the model in float32.
        windows: [W, T] int64, what is measured on.
        tokens: [W, T] int64, what is calibrated on.
        out: folder of results.
        setting: fingerprint of the model, the windows and the tokens.
        linears: weights that are to be quantized.
        threads: of peers.
    """

    plain: Path
    windows: Tensor
    tokens: Tensor
    out: Path
    setting: str
    linears: frozenset[str]
    threads: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is not finished yet, then prints the table."""
    options = parse(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    runs, pythons = chosen_runs(options), environments(options.peer)
    options.out.mkdir(parents=True, exist_ok=True)
    ground, book = prepare(options), Book(options.out / "results.jsonl")
    if book.cut:
        print(f"{book.cut} lines of {options.out / 'results.jsonl'} were cut off and do not count")
    missing = [family for family in dict.fromkeys(run.family for run in runs) if not pythons[family]]
    for family in missing:
        print(f"left out: {family}: {MODULES[family]} is not installed here (--peer {family}=PYTHON)")
    if not options.table:
        work([run for run in runs if run.family not in missing], pythons, ground, book, options.keep)
    show(book.lines(ground.setting), options.width)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a plain checkpoint")
    parser.add_argument("--peer", action="append", default=[], metavar="FAMILY=PYTHON", help="where a family runs")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="families, runs, patterns like 'llama-*'")
    parser.add_argument("--bits", nargs="+", type=float, default=[], help="only runs with codes of so many bits")
    parser.add_argument("--own", nargs="+", default=OWN_RUNS, metavar="WHAT", help="SCHEME:ALGORITHM, BITS:ALGORITHM")
    parser.add_argument("--calib", default="builtin", help="the text that algorithms read")
    parser.add_argument("--tokens", type=int, default=65536, help="of it, in windows of 512")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", default="builtin", help="the text that is measured on")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, required=True, help="where results are kept")
    parser.add_argument("--keep", action="store_true", help="keep the decoded checkpoints, in DIR/work")
    parser.add_argument("--table", action="store_true", help="run nothing, print what there is")
    parser.add_argument("--width", type=int, default=170, help="of the table")
    return parser.parse_args(arguments)


def chosen_runs(options: argparse.Namespace) -> list[Run]:
    """What the command line asks for; ends the program for a name that is none."""
    try:
        return selected(catalogue(options.own), options.only, options.bits)
    except ValueError as error:
        sys.exit(str(error))


def environments(given: Sequence[str]) -> dict[str, str | None]:
    """The Python of each family: as given, or this one if it has the module, or None."""
    pythons = dict(choice.split("=", 1) for choice in given)
    if unknown := set(pythons) - (set(MODULES) - {OWN}):
        sys.exit(
            f"unknown family {', '.join(sorted(unknown))}: one of {', '.join(name for name in MODULES if name != OWN)}"
        )
    here = {family: sys.executable if importlib.util.find_spec(name) else None for family, name in MODULES.items()}
    return here | pythons


# --- what all share -------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace) -> Ground:
    """Tokens to measure and to calibrate on, and the model in float32, which is written once."""
    tokenizer = load_tokenizer(open_source(options.model).folder)
    ids, bos = tokenize(tokenizer, load_text(options.text).content)
    windows = make_windows(ids, options.context, options.windows, bos)
    tokens = calibration_windows(tokenizer, options.calib, tokens=options.tokens, seed=options.seed)
    plain = write_plain(options.model, options.out / "plain")
    parts = [
        checksum(plain / "model.safetensors"),
        _sha256(windows.numpy().tobytes()),
        _sha256(tokens.numpy().tobytes()),
    ]
    setting = _sha256("".join(parts).encode())[:16]
    return Ground(plain, windows, tokens, options.out, setting, linears(plain), options.threads)


def write_plain(model: Path, target: Path) -> Path:
    """The model in float32, in one file, unless it is there already. Raises `OutputExistsError` for another model's."""
    note = {"model": str(model.resolve()), "files": {f.name: checksum(f) for f in sorted(model.glob("*.safetensors"))}}
    if (target / "plain.json").is_file() and json.loads((target / "plain.json").read_text()) == note:
        return target
    source = open_source(model, torch.float32)
    save(source.load(), target, extras=source.extras(), max_shard_size="1TB")
    (target / "plain.json").write_text(json.dumps(note))
    return target


def linears(plain: Path) -> frozenset[str]:
    """FQN of the weight of every linear layer but the head."""
    model: Any = open_source(plain).skeleton
    head = model.get_output_embeddings()
    found = (name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head)
    return frozenset(f"{name}.weight" for name in found)


def checksum(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- runs -----------------------------------------------------------------------------------------------


def work(runs: Sequence[Run], pythons: dict[str, str | None], ground: Ground, book: Book, keep: bool) -> None:
    """Does what is not in the book yet."""
    waiting = [run for run in runs if not book.has(key_of(run, ground))]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already", flush=True)
    if not waiting:
        return
    with reference_of(ground) as reference:
        for run in waiting:
            line: Line = {"key": key_of(run, ground), "setting": ground.setting, "run": run.name, "family": run.family}
            line |= {"settings": run.settings, "threads": ground.threads, "machine": machine()}
            try:
                line |= perform(run, pythons[run.family], ground, reference, keep)
            except (PeerFailed, LlmQuantError) as reason:  # the others go on
                line["failed"] = str(reason)
            book.add(line)
            print(describe(line), flush=True)
            gc.collect()


def reference_of(ground: Ground) -> Reference:
    """The plain model's logits, which are computed once and kept."""
    path = ground.out / f"reference-{ground.setting}.safetensors"
    if path.is_file():
        try:
            return Reference.open(path)
        except ReferenceFileError as error:
            print(f"{error}; it is computed anew", flush=True)
    with progress_bar("plain model") as progress:
        return Reference.compute(open_source(ground.plain).load(), ground.windows, progress, path=path)


def key_of(run: Run, ground: Ground) -> str:
    """What a run's line is found by: all that its figures depend on but the versions of the software."""
    return _sha256(json.dumps([run.name, run.settings, ground.setting], sort_keys=True).encode())[:16]


def perform(run: Run, python: str | None, ground: Ground, reference: Reference, keep: bool) -> Line:
    """Quantizes and measures."""
    scratch = ground.out / "work"
    scratch.mkdir(exist_ok=True)
    if run.family == OWN:
        journal = scratch / f"{key_of(run, ground)}.partial"
        own = quantize_own(run.settings, ground.plain, ground.tokens, journal, run.name)
        check_weights(own.facts.pop("quantized"), ground.linears)
        return sized(own.facts) | measure(own.model, reference, run.name)
    assert python is not None
    folder = scratch / run.name
    try:
        facts = quantize_elsewhere(run, python, ground, folder)
        return sized(facts) | measure(open_source(folder, torch.float32).load(), reference, run.name)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def quantize_elsewhere(run: Run, python: str, ground: Ground, folder: Path) -> Line:
    """Lets a peer write its checkpoint. Raises `PeerFailed` if it cannot, or quantizes other weights than asked for."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    order = folder.with_suffix(".json")
    order.write_text(json.dumps(order_of(run, ground, folder)))
    log = ground.out / "logs" / f"{run.name}.log"
    log.parent.mkdir(exist_ok=True)
    print(f"{run.name} is at work; it writes {log}", flush=True)
    with log.open("w") as output:
        status = subprocess.call(
            [python, str(SCRIPT), str(order)], stdout=output, stderr=subprocess.STDOUT, env=variables(python, ground)
        )
    order.unlink()
    answer = folder / "result.json"
    if not answer.is_file():
        raise PeerFailed(f"its process ended with status {status}; {log} says why")
    facts: Line = json.loads(answer.read_text())
    if "failed" in facts:
        raise PeerFailed(facts["failed"])
    check_weights(facts.pop("quantized"), ground.linears)
    return facts | {"bytes": facts.pop("least")}


def order_of(run: Run, ground: Ground, folder: Path) -> dict[str, Any]:
    """What a peer is told. Tokens and the importance matrix are written when the first one asks."""
    tokens, imatrix = ground.out / "tokens.npy", ground.out / f"imatrix-{ground.setting}.safetensors"
    np.save(tokens, ground.tokens.numpy())
    if run.settings.get("imatrix") and not imatrix.is_file():
        write_imatrix(ground.plain, ground.tokens, imatrix)
    paths = {"model": ground.plain, "out": folder, "tokens": tokens, "imatrix": imatrix}
    order = {name: str(path.resolve()) for name, path in paths.items()}
    return {**order, "family": run.family, "settings": run.settings, "threads": ground.threads}


def check_weights(found: Sequence[str], wanted: frozenset[str]) -> None:
    """Raises `PeerFailed` where one quantized more or fewer weights than all linear layers but the head."""
    more, fewer = sorted(set(found) - wanted), sorted(wanted - set(found))
    if more or fewer:
        some = f"{len(more)} more ({', '.join(more[:2])}), {len(fewer)} fewer ({', '.join(fewer[:2])})"
        raise PeerFailed(f"it quantized other weights than all linear layers but the head: {some}")


def variables(python: str, ground: Ground) -> dict[str, str]:
    """A peer's environment: as many threads, and no module path of ours in a foreign one."""
    found = {**os.environ, "OMP_NUM_THREADS": str(ground.threads), "MKL_NUM_THREADS": str(ground.threads)}
    found |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    if python != sys.executable:
        found.pop("PYTHONPATH", None)
    return found


def sized(facts: Line) -> Line:
    """With bits per quantized weight."""
    bits, stored = (8 * facts[name] / facts["elements"] for name in ("bytes", "stored"))
    return {**facts, "bits": bits, "stored_bits": stored}


def measure(model: nn.Module, reference: Reference, name: str) -> Line:
    """The figures of a model, in float32. Raises `PeerFailed` for logits that are not finite."""
    with progress_bar(f"measuring {name}") as progress:
        found = evaluate(model.to(torch.float32), reference.windows, reference, progress)
    if found.nonfinite.tokens:
        raise PeerFailed(f"its model's logits are not finite at {found.nonfinite.tokens} tokens")
    assert found.kl is not None and found.baseline is not None
    return {
        "kl": found.kl.mean,
        "kl_stderr": found.kl.stderr,
        "kl_p99": found.kl.p99,
        "top1": found.top1,
        "perplexity": found.perplexity.value,
        "perplexity_stderr": found.perplexity.stderr,
        "baseline": found.baseline.value,
        "measured_by": versions(),
    }


# --- what is told ---------------------------------------------------------------------------------------


def describe(line: Line) -> str:
    """A line as it comes."""
    if "failed" in line:
        return f"{line['run']} failed: {line['failed']}"
    figures = f"{line['bits']:.3f} bits, KL {line['kl']:.4f}, perplexity {line['perplexity']:.3f}"
    return f"{line['run']}: {figures}, {line['seconds']:.0f} s" + (f" ({line['note']})" if line["note"] else "")


def show(lines: Sequence[Line], width: int) -> None:
    """The table, what failed, and who is nearer."""
    console = Console(width=width)
    console.print(table(lines))
    for line in failures(lines):
        console.print(f"failed: {line['run']}: {escape(line['failed'])}", highlight=False, soft_wrap=True)
    console.print(summary(lines), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
