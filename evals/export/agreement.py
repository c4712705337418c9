"""How often llama.cpp, on an exported file, and the quantized model here name the same next token.

    llmquant export OUT --to gguf -o OUT.gguf
    python evals/export/agreement.py OUT OUT.gguf --llama PYTHON --text wiki.test.raw

Our logits are those of the reference backend in float32. llama.cpp rounds inputs of products to eight bits in groups of
32, so that a little disagreement is its own; `--text` is cut into windows from its start.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

import llmquant
from llmquant.kernels import registry

WORKER = Path(__file__).with_name("llama_logits.py")


def main() -> None:
    """Prints top-1 agreement, the mean KL, and how many tokens were compared, as JSON."""
    options = parse()
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(options.folder)(options.text.read_text(encoding="utf-8")[:400_000]).input_ids
    windows = np.array(ids[: options.windows * options.context], dtype=np.int64).reshape(-1, options.context)
    theirs = llama_logits(options.llama, options.gguf, windows)
    print(json.dumps(compare(own_logits(options.folder, windows), theirs), indent=2))


def own_logits(folder: Path, windows: np.ndarray) -> np.ndarray:
    """[W, T, vocabulary] float32, by the reference."""
    model = llmquant.load(folder, dtype=torch.float32).eval()
    with torch.inference_mode(), registry.force("reference"):
        return np.stack([model(torch.from_numpy(window)[None]).logits[0].numpy() for window in windows])


def llama_logits(python: str, gguf: Path, windows: np.ndarray) -> np.ndarray:
    """The same by llama.cpp."""
    with tempfile.TemporaryDirectory() as folder:
        ids, out = Path(folder, "ids.npy"), Path(folder, "logits.npy")
        np.save(ids, windows)
        done = subprocess.run([python, WORKER, gguf, ids, out], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return np.load(out)


def compare(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Top-1 agreement and mean KL(ours | theirs) in nats."""
    a, b = (torch.from_numpy(x).log_softmax(-1) for x in (ours, theirs))
    kl = (a.exp() * (a - b)).sum(-1)
    return {
        "top1": float((a.argmax(-1) == b.argmax(-1)).float().mean()),
        "kl": float(kl.mean()),
        "tokens": ours.shape[0] * ours.shape[1],
    }


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what llmquant quantized")
    parser.add_argument("gguf", type=Path, help="the same, exported")
    parser.add_argument("--llama", required=True, help="a Python that has llama-cpp-python")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--windows", type=int, default=4)
    return parser.parse_args()


if __name__ == "__main__":
    main()
