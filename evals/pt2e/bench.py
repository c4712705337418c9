"""One linear layer in graph mode: int8 against bfloat16 and float32, in torch and in ONNX Runtime.

python evals/pt2e/bench.py --threads 1 --threads 2
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from graphs import converted, exported, print_times
from torch import Tensor, nn

from llmquant.primitives.metrics import compute_error
from llmquant.pt2e import _ops
from llmquant.pt2e.compilation import compile
from llmquant.pt2e.export.onnx import export_onnx
from llmquant.pt2e.lowering import lower


def torch_runs(layer: nn.Module, x: Tensor, compiled: bool) -> dict[str, Callable[[], Any]]:
    """Every way to run the layer in torch."""
    low = x.bfloat16()
    plain, half = exported(layer, x), exported(copy.deepcopy(layer).bfloat16(), low)
    runs: dict[str, Callable[[], Any]] = {"fp32": partial(plain, x), "bf16": partial(half, low)}
    if compiled:
        for name, graph, given in (("fp32 compiled", plain, x), ("bf16 compiled", half, low)):
            runs[name] = frozen(graph, given)
    for mode in ("static", "dynamic", "token"):
        lowered, _ = lower(converted(layer, x, mode=mode), strict=True)
        runs[f"int8 {mode}, eager"] = partial(lowered, x)
        if compiled:
            runs[f"int8 {mode}, compiled"] = partial(compile(lowered), x)
    return runs


def frozen(graph: nn.Module, x: Tensor) -> Callable[[], Any]:
    """The graph compiled with the settings that int8 graphs get."""
    made = torch.compile(graph)

    def run() -> Any:
        with _ops.freezing():
            return made(x)

    return run


def onnx_runs(layer: nn.Module, x: Tensor, threads: int, folder: Path) -> dict[str, Callable[[], Any]]:
    """The layer in ONNX Runtime: floats, the QDQ file, and the file of integer products."""
    runs = {}
    graphs = {"ort fp32": (exported(layer, x), "qdq")}
    for mode in ("static", "dynamic"):
        for form in ("qdq", "integer"):
            graphs[f"ort {mode}, {form}"] = (converted(layer, x, mode=mode), form)
    for name, (graph, form) in graphs.items():
        report = export_onnx(graph, (x,), folder / f"{name}.onnx", form)
        runs[name] = onnx_session(report.path, x, threads)
        wanted, found = graph(x).detach(), torch.from_numpy(runs[name]()[0])
        relative = float((found - wanted).norm() / wanted.norm())
        sqnr = float(compute_error(wanted, found))
        print(f"  {name:34} {report.bytes / 1e6:7.2f} MB, off the torch graph by {relative:.1e} ({sqnr:.0f} dB)")
    return runs


def onnx_session(path: Path, x: Tensor, threads: int) -> Callable[[], Any]:
    """Runs a file on one input."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name, array = session.get_inputs()[0].name, x.numpy()
    return lambda: session.run(None, {name: array})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, action="append")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--shape", default="1024x4096", help="inputs x outputs")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true", help="without the runs that need a C++ compiler")
    parser.add_argument("--no-onnx", action="store_true")
    options = parser.parse_args()
    columns, rows = map(int, options.shape.split("x"))
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(columns, rows)), torch.randn(options.tokens, columns)
    for threads in options.threads or [1]:
        torch.set_num_threads(threads)
        print(f"{columns} x {rows}, {options.tokens} tokens, {threads} threads", flush=True)
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            print_times(torch_runs(layer, x, not options.no_compile), options.rounds, ("fp32", "bf16", "bf16 compiled"))
            if not options.no_onnx:
                print_times(onnx_runs(layer, x, threads, Path(folder)), options.rounds, ("ort fp32",))


if __name__ == "__main__":
    main()
