"""llama.cpp on a whole model, in its own environment, for `generate.py`; needs llama-cpp-python and numpy.

Speaks JSON lines: the first line in is `{"gguf", "prompt", "new", "threads"}`, answered by `{"size"}` (bytes of the
file); every further line is a turn, answered by `{"read", "write", "idle"}`: seconds to read the prompt and choose a
token, seconds for the `new - 1` tokens after it, and the processor time burned since the last turn.

`python llama_worker.py quantize IN OUT q4_0` writes a GGUF file in another type with llama.cpp's own quantizer.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


def quantize(source: str, target: str, kind: str) -> None:
    """As the program llama-quantize does, from any type."""
    kinds = {
        name.removeprefix("LLAMA_FTYPE_MOSTLY_").lower(): value
        for name, value in vars(llama_cpp).items()
        if name.startswith("LLAMA_FTYPE_MOSTLY_")
    }
    if kind.lower() not in kinds:
        sys.exit(f"unknown type {kind}: one of {', '.join(sorted(kinds))}")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = kinds[kind.lower()]
    settings.allow_requantize = True
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)):
        sys.exit(f"llama.cpp cannot quantize {source}")


def measure(model: llama_cpp.Llama, ids: list[int], new: int) -> tuple[float, float]:
    """Seconds to read the prompt and choose a token, and for `new - 1` further greedy tokens."""
    model.reset()
    start = time.perf_counter()
    model.eval(ids)
    token = greedy(model)
    read = time.perf_counter() - start
    for _ in range(new - 1):
        model.eval([token])
        token = greedy(model)
    return read, time.perf_counter() - start - read


def greedy(model: llama_cpp.Llama) -> int:
    """The likeliest next token."""
    logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax())


def main() -> None:
    """Loads what the first line orders, then a turn a line, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what llama.cpp prints must not mix with the answers

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    order = json.loads(sys.stdin.readline())
    prompt, threads = order["prompt"], order["threads"]
    try:
        model = llama_cpp.Llama(
            order["gguf"],
            n_ctx=prompt + order["new"],
            n_batch=max(prompt, 32),
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
    except ValueError as error:
        answer({"failed": str(error)})
        return
    ids = np.random.default_rng(0).integers(model.n_vocab(), size=prompt).tolist()
    measure(model, ids, order["new"])  # warm; a build that cannot run this type fails here
    answer({"size": Path(order["gguf"]).stat().st_size})
    burned = time.process_time()
    for _ in sys.stdin:
        idle = time.process_time() - burned
        read, write = measure(model, ids, order["new"])
        burned = time.process_time()
        answer({"read": read, "write": write, "idle": idle})


if __name__ == "__main__":
    if sys.argv[1:2] == ["quantize"]:
        quantize(*sys.argv[2:])
    else:
        main()
