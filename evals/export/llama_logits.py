"""Logits of llama.cpp, in its own environment, for `agreement.py` and tests; needs llama-cpp-python and numpy.

`python llama_logits.py MODEL.gguf IDS.npy LOGITS.npy`: int64 windows [W, T] in, float32 [W, T, vocabulary] out.
`python llama_logits.py MODEL.gguf --tokens TEXT`: the numbers of a text's tokens as JSON on the last line.
"""

from __future__ import annotations

import json
import sys

import llama_cpp
import numpy as np


def logits(path: str, windows: np.ndarray) -> np.ndarray:
    """All logits of each window, from an empty context, with one thread."""
    length = windows.shape[1]
    model = llama_cpp.Llama(
        path,
        n_ctx=length,
        n_batch=length,
        n_ubatch=length,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        verbose=False,
    )
    found = []
    for window in windows:
        model.reset()
        model.eval(window.tolist())
        found.append(np.array(model.scores[:length], dtype=np.float32))
    return np.stack(found)


def tokens(path: str, text: str) -> list[int]:
    """The tokens of a text, special ones in front or behind as the file says."""
    model = llama_cpp.Llama(path, vocab_only=True, verbose=False)
    return model.tokenize(text.encode(), add_bos=True, special=True)


if __name__ == "__main__":
    if sys.argv[2] == "--tokens":
        print(json.dumps(tokens(sys.argv[1], sys.argv[3])))
    else:
        np.save(sys.argv[3], logits(sys.argv[1], np.load(sys.argv[2])))
