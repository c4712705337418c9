"""What `peers.py` tells a peer and what it gives back; runs in the peer's environment, with numpy alone."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
WEIGHTS = "model.safetensors"


class Order(NamedTuple):
    """What to do.

    Attributes:
        family: a key of `FAMILIES`.
        settings: those of the family's function.
        model: folder of the plain checkpoint, float32, one file.
        out: folder to write.
        tokens: file of numpy, [W, T] int64, to calibrate on.
        imatrix: safetensors file, FQN -> mean squares of the inputs, float32 [K].
        threads: for the peer.
    """

    family: str
    settings: dict[str, Any]
    model: Path
    out: Path
    tokens: Path
    imatrix: Path
    threads: int


class Quantized(NamedTuple):
    """What a peer made.

    Attributes:
        weights: FQN -> [N, K] float32, each quantized weight as the peer decodes it.
        changed: FQN -> other tensors that it changed along with them, for instance norms.
        stored, least: bytes of all quantized weights, as the module's text says.
        package: the peer's name on the package index.
        arithmetic: how the weights were decoded.
        note: what else is worth saying.
    """

    weights: dict[str, Array]
    changed: dict[str, Array]
    stored: int
    least: int
    package: str
    arithmetic: str
    note: str = ""


class Watch:
    """Wall time of the quantizing alone, without loading, decoding and writing, and the peak memory at its end."""

    seconds = 0.0
    peak: int | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """The stretch that counts."""
        started = time.perf_counter()
        yield
        self.seconds, self.peak = time.perf_counter() - started, peak_memory()


def peak_memory() -> int | None:
    """`VmHWM` of this process in bytes, mapped files included; None where it is not known."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")),
        None,
    )


def least_bytes(codes: int, bits: int, scales: int, float_zeros: int = 0, integer_zeros: int = 0) -> int:
    """Bytes of one weight without gaps."""
    return math.ceil(codes * bits / 8) + 2 * (scales + float_zeros) + math.ceil(integer_zeros * bits / 8)


def file_bytes(folder: Path, weights: Iterable[str]) -> int:
    """Bytes of all that safetensors files keep under the modules of some weights, codes, scales and whatever else."""
    modules, total = tuple(f"{fqn.removesuffix('.weight')}." for fqn in weights), 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as content:
            header = json.loads(content.read(int.from_bytes(content.read(8), "little")))
        spans = (entry["data_offsets"] for name, entry in header.items() if name.startswith(modules))
        total += sum(end - start for start, end in spans)
    return total
