"""Quantizes a model by another library, in its own environment, for `peers.py`: `python peer_quantizer.py ORDER.json`.

Needs numpy, safetensors and the peer. The order names a plain float32 checkpoint, a peer and its settings, the tokens
to calibrate on and the mean squares of each weight's inputs. Written are a plain checkpoint with the weights as the
peer understands them, decoded to float32, and `result.json` beside it: sizes, seconds, peak memory, what was quantized,
or `{"failed": reason}`. All linear layers but the head are quantized.

Two sizes are told. `stored`: the bytes of the tensors or the file in which the peer keeps codes, scales and zero
points. `least`: what they would take at best, codes packed without gaps, scales and float zero points in 16 bits,
integer zero points in as many bits as codes. It is the smaller one where a peer keeps a byte for each code, or float32
scales because the model is float32.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from peer_order import WEIGHTS, Order, Quantized, Watch
from safetensors.numpy import load_file, save_file

FAMILIES = {
    "torchao": "peer_torch.torchao",
    "hqq": "peer_torch.hqq",
    "llmcompressor": "peer_calibrated.llmcompressor",
    "auto-round": "peer_calibrated.auto_round",
    "llama": "peer_llama.llama",
}
"""A family -> the module and function that does it."""


def quantize(order: Order, watch: Watch) -> Quantized:
    """By the family's function; only its module is imported."""
    module, _, name = FAMILIES[order.family].partition(".")
    made: Quantized = getattr(importlib.import_module(module), name)(order, watch)
    return made


def write_checkpoint(order: Order, made: Quantized) -> None:
    """The plain checkpoint with the decoded weights in place of its own."""
    tensors = load_file(order.model / WEIGHTS)
    for fqn, array in {**made.weights, **made.changed}.items():
        if tensors[fqn].shape != array.shape:
            raise RuntimeError(f"{fqn} is {array.shape} now, and was {tensors[fqn].shape}")
        tensors[fqn] = array
    save_file(tensors, order.out / WEIGHTS, metadata={"format": "pt"})
    for file in order.model.iterdir():
        if file.name != WEIGHTS:
            shutil.copy2(file, order.out / file.name)


def result(made: Quantized, watch: Watch) -> dict[str, Any]:
    """What `peers.py` wants to know."""
    return {
        "package": made.package,
        "version": importlib.metadata.version(made.package),
        "stored": made.stored,
        "least": made.least,
        "elements": sum(array.size for array in made.weights.values()),
        "quantized": sorted(made.weights),
        "changed": sorted(made.changed),
        "seconds": watch.seconds,
        "peak": watch.peak,
        "arithmetic": made.arithmetic,
        "note": made.note,
    }


def main() -> None:
    """Does what the file says; a failure is a result too."""
    given = json.loads(Path(sys.argv[1]).read_text())
    paths = {name: Path(given[name]) for name in ("model", "out", "tokens", "imatrix")}
    order, watch = (
        Order(given["family"], given["settings"], threads=given["threads"], **paths),
        Watch(),
    )
    try:
        made = quantize(order, watch)
        write_checkpoint(order, made)
        found = result(made, watch)
    except Exception as error:  # whatever it is, the other peers go on
        (order.out / "result.json").write_text(json.dumps({"failed": f"{type(error).__name__}: {error}"}))
        raise
    (order.out / "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
