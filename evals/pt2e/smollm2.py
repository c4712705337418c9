"""A SmolLM2-135M forward in graph mode: what runs in int8, its perplexity, its speed, and its ONNX file.

python evals/pt2e/smollm2.py demo/SmolLM2-135M --text wiki.test.raw --calib valid.txt
"""

from __future__ import annotations

import argparse
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import frozen, onnx_session
from graphs import converted, exported, print_times
from torch import Tensor, fx, nn

from llmquant.measure.perplexity import token_nll
from llmquant.measure.windows import make_windows, tokenize
from llmquant.primitives.metrics import compute_error
from llmquant.pt2e import _ops
from llmquant.pt2e.compilation import compile
from llmquant.pt2e.export.onnx import export_onnx
from llmquant.pt2e.lowering import lower

CALL = re.compile(r"torch\.ops\.(onednn\.\w+_pointwise|llmquant\.linear_int8)\.\w+\(")


class Logits(nn.Module):
    """The model as a function of ids alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def windows_of(path: str, tokenizer: Any, context: int, count: int) -> Tensor:
    """[W, context] ids from the start of a text."""
    ids, bos = tokenize(tokenizer, Path(path).read_text(encoding="utf-8"))
    return make_windows(ids, context, count, bos)


def perplexity(function: Callable[[Tensor], Tensor], windows: Tensor) -> float:
    """Of disjoint windows, first tokens unscored."""
    nll = [token_nll(function(window[None])[0], window) for window in windows]
    return math.exp(float(torch.cat(nll).mean()))


def is_outside(head: bool) -> Callable[[str], bool]:
    """Which products stay float: the embedding, and the head unless it is asked for."""
    return lambda name: "embed_tokens" in name or ("lm_head" in name and not head)


def int8_calls(compiled: Callable[..., Any], x: Tensor) -> Counter[str]:
    """How often the code that Inductor generates calls each int8 kernel."""
    _, code = _ops.run_and_get_code(compiled, x)
    return Counter(CALL.findall("\n".join(code)))


def stability(graph: fx.GraphModule, ids: Tensor, change: float) -> float:
    """dB between a graph and itself with its float parameters (norms, embedding) changed by so small a share.

    Programs that sum floats in other orders differ as much at every operator. Where a number lies at the border of two
    codes, the last bit decides, and thirty layers carry it on: no two of them can be expected to agree better.
    """
    before, generator = graph(ids), torch.Generator().manual_seed(0)
    kept = {p: p.detach().clone() for p in graph.parameters() if p.is_floating_point()}
    for parameter in kept:
        parameter.mul_(1 + change * torch.randn(parameter.shape, generator=generator))
    after = graph(ids)
    for parameter, value in kept.items():
        parameter.copy_(value)
    return float(compute_error(before, after))


def measure_onnx(plain: fx.GraphModule, graph: fx.GraphModule, ids: Tensor, threads: int, rounds: int) -> None:
    """Size, agreement and speed of the integer file beside the float one."""
    for change in (1e-7, 1e-6, 1e-5):
        found = stability(graph, ids, change)
        print(f"  the torch graph against itself, floats changed by {change:g}: {found:.1f} dB", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for name, m, form in (("ort fp32", plain, "qdq"), ("ort int8", graph, "integer")):
            report = export_onnx(m, (ids,), Path(folder) / f"{name}.onnx", form)
            runs[name] = onnx_session(report.path, ids, threads)
            sqnr = float(compute_error(m(ids), torch.from_numpy(runs[name]()[0])))
            counted = f"{report.integer} int8 products, {len(report.floating)} of floats"
            print(
                f"  {name}: {report.bytes / 1e6:.0f} MB, {counted}, {sqnr:.1f} dB against the torch graph", flush=True
            )
        print_times(runs, rounds, ("ort fp32",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--calib-windows", type=int, default=8)
    parser.add_argument("--modes", default="token,dynamic,static")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--head", action="store_true", help="the head in int8, too")
    parser.add_argument("--compile", action="store_true", help="count int8 calls in generated code, and time it")
    parser.add_argument("--onnx", action="store_true", help="the static graph in ONNX Runtime; with --dtype float32")
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    net = Logits(model)
    calib = windows_of(options.calib, tokenizer, options.context, options.calib_windows)
    more = [(window[None],) for window in calib[1:]]
    text = windows_of(options.text, tokenizer, options.context, options.windows) if options.text else None
    ids = calib[:1]
    with torch.no_grad():
        plain = exported(net, ids)
        base = perplexity(plain, text) if text is not None else None
        print(f"{options.dtype}: perplexity {base}", flush=True)
        runs: dict[str, Callable[[], Any]] = {options.dtype: lambda: plain(ids)}
        if options.compile:
            runs[f"{options.dtype} compiled"] = frozen(plain, ids)
        for mode in options.modes.split(","):
            graph = converted(net, ids, mode=mode, skip=is_outside(options.head), more=more)
            lowered, report = lower(graph, strict=True)
            print(f"{mode}: lowered {dict(report.kernels)}, floats: {list(report.floating)}", flush=True)
            if text is not None and base is not None:
                found = perplexity(lowered, text)
                print(f"  perplexity {found:.3f} ({found / base - 1:+.2%})", flush=True)
            runs[f"int8 {mode}, eager"] = lambda m=lowered: m(ids)
            if options.compile:
                made = compile(lowered)
                print(f"  generated code calls {dict(int8_calls(made, ids))}", flush=True)
                runs[f"int8 {mode}, compiled"] = lambda m=made: m(ids)
            if options.onnx and mode != "token":
                measure_onnx(plain, graph, ids, options.threads, options.rounds)
        print_times(runs, options.rounds, tuple(name for name in runs if not name.startswith("int8")))


if __name__ == "__main__":
    main()
