"""Time of one int4 linear layer here and elsewhere, in turns: `python evals/bench/peers.py --peer llama=PYTHON ...`.

Each peer runs in a process of its own, in the environment of the Python given for its family (`llama`: the package
llama-cpp-python; `ort`: onnxruntime and onnx; `openvino`); a family without one is looked for here, and left out with a
note if it is missing. All get the same shapes, threads and bytes of weights in rotation, and one is timed at a time.

Threads keep their own habits within a turn: they may spin while work is there. Between turns they must not: ONNX
Runtime is told to stop spinning when a run ends, the OpenMP threads of torch and llama.cpp and OpenVINO's give up by
themselves after some milliseconds, for which the next turn waits. The column `idle` shows what a peer still burned
while the others had their turns, as a part of one core; more than a few percent means that it disturbed them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from worker import Failed, Worker

from llmquant.measure.record import machine, versions, write_record

SCRIPT = Path(__file__).with_name("peer_worker.py")
PEERS = [
    "llama-q4_0",
    "llama-q4_K",
    "llama-q8_0",
    "ort-int4-accuracy4",
    "ort-int4-accuracy0",
    "openvino-u4-dynamic",
    "openvino-u4-bf16",
    "torch-int4pack",
    "torch-bf16",
    "llmquant-int4-g32",
    "llmquant-a8-int4-g32",
]
MODULES = {"llama": "llama_cpp", "ort": "onnxruntime", "openvino": "openvino", "torch": "torch", "llmquant": "llmquant"}


def main() -> None:
    """Prints a table for each shape and M; writes them as JSON."""
    options = parse()
    console, pythons, record = Console(width=110), environments(options.peer), new_record(options)
    for shape in options.shape:
        for count in options.tokens:
            order = {"rows": shape[0], "columns": shape[1], "m": count, "threads": options.threads}
            order["megabytes"] = None if options.in_cache else options.megabytes
            results, failed = compare(options.only, pythons, order, options.rounds)
            record["results"] += results
            record["failed"] |= failed
            if results:
                console.print(table(results))
    for name, reason in record["failed"].items():
        console.print(f"not timed: {name}: {escape(reason)}", highlight=False, soft_wrap=True)
    if options.json:
        write_record(record, options.json)


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], metavar="FAMILY=PYTHON", help="where a family runs")
    parser.add_argument("--only", nargs="+", default=PEERS, choices=PEERS, metavar="NAME", help=", ".join(PEERS))
    parser.add_argument("--shape", nargs="+", type=_shape, default=[(4096, 4096)], metavar="NxK")
    parser.add_argument("--tokens", "-m", nargs="+", type=int, default=[1, 4, 16, 128], help="rows of the input (M)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--megabytes", type=float, default=160, help="of weights in rotation, for each peer")
    parser.add_argument("--in-cache", action="store_true", help="two weights in rotation instead")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


def environments(chosen: list[str]) -> dict[str, str | None]:
    """The Python of each family: as chosen, or this one if it has the module, or None."""
    given = dict(choice.split("=", 1) for choice in chosen)
    if unknown := set(given) - set(MODULES):
        sys.exit(f"unknown family {', '.join(sorted(unknown))}: one of {', '.join(MODULES)}")
    here = {family: sys.executable if importlib.util.find_spec(name) else None for family, name in MODULES.items()}
    return here | given


def compare(
    names: list[str], pythons: dict[str, str | None], order: dict[str, Any], rounds: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """All peers at one shape and M, in turns; what was found, and why others were not timed."""
    peers: dict[str, Worker] = {}
    seconds: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    try:
        for name in names:
            family = name.partition("-")[0]
            python = pythons[family]
            if python is None:
                failed[name] = f"{MODULES[family]} is not installed here (--peer {family}=PYTHON)"
                continue
            try:
                peers[name] = Worker(python, SCRIPT, {"peer": name, **order}, order["threads"])
            except Failed as reason:
                failed[name] = str(reason).splitlines()[0]
        for _ in range(rounds + 1):
            for name, peer in list(peers.items()):
                try:
                    seconds.setdefault(name, []).append(peer.turn()["seconds"])
                except Failed as reason:  # a crash of one is a result, not the end of all
                    failed[name] = str(reason).splitlines()[0]
                    peers.pop(name).close()
    finally:
        for peer in peers.values():
            peer.close()
    return [result(name, peer, seconds[name], order) for name, peer in peers.items()], failed


def result(name: str, peer: Worker, turns: list[float], order: dict[str, Any]) -> dict[str, Any]:
    """What one peer reached, in seconds a call and bytes; its first turn, after set-up, does not count."""
    calls = [seconds / peer.known["copies"] for seconds in turns[1:]]
    return {
        "shape": [order["rows"], order["columns"]],
        "tokens": order["m"],
        "peer": name,
        "seconds": min(calls),
        "median": statistics.median(calls),
        "bandwidth": peer.known["bytes"] / min(calls),
        "idle": statistics.mean(peer.idle[1:]),
        **peer.known,
    }


def table(results: list[dict[str, Any]]) -> Table:
    """The figures of one shape and M, the fastest peer first."""
    found = Table(box=None, header_style="bold", title_justify="left")
    rows, columns = results[0]["shape"]
    found.title = f"{rows}x{columns}, M = {results[0]['tokens']}"
    for name in ("peer", "ms", "median", "x fastest", "GB/s", "error", "idle", "note"):
        found.add_column(name, justify="left" if name in ("peer", "note") else "right", no_wrap=name != "note")
    best = min(r["seconds"] for r in results)
    for r in sorted(results, key=lambda r: float(r["seconds"])):
        found.add_row(
            r["peer"],
            f"{1e3 * r['seconds']:.3f}",
            f"{1e3 * r['median']:.3f}",
            f"{r['seconds'] / best:.2f}",
            f"{r['bandwidth'] / 1e9:.1f}",
            f"{r['error']:.1e}",
            f"{r['idle']:.1%}",
            r["note"],
        )
    return found


def new_record(options: argparse.Namespace) -> dict[str, Any]:
    """The record without results."""
    return {
        "settings": {
            "threads": options.threads,
            "megabytes": None if options.in_cache else options.megabytes,
            "rounds": options.rounds,
        },
        "results": [],
        "failed": {},
        "versions": versions(),
        "machine": machine(),
    }


def _shape(text: str) -> tuple[int, int]:
    rows, columns = (int(part) for part in text.lower().split("x"))
    return rows, columns


if __name__ == "__main__":
    main()
