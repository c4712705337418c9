"""Bytes: of a model's tensors, of its files, and of this process.

`VmHWM` is the peak of all resident memory, memory-mapped files included; `RssAnon` is memory without files.
Both come from the process's own `/proc/self/status`, never from `ru_maxrss`, which a child inherits from its parent.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all distinct parameters and buffers; tied ones count once, quantized ones at their packed size."""
    return sum(tensor.nbytes for tensor in _distinct(chain(model.parameters(), model.buffers())))


@dataclass(frozen=True)
class WeightCounts:
    """Elements and bytes of a model's distinct parameters, of the quantized among them, and of its embeddings.

    Embeddings are the weights with a row for every token or position: those of each `nn.Embedding`, and the head.
    """

    elements: int
    bytes: int
    quantized_elements: int
    quantized_bytes: int
    embedding_elements: int
    embedding_bytes: int

    @property
    def bits_per_weight(self) -> float | None:
        """Over all parameters, embeddings, norms and scales included; None for a model without any."""
        return _bits(self.bytes, self.elements)

    @property
    def bits_per_weight_without_embeddings(self) -> float | None:
        """Over all parameters but embeddings and head; None for a model without others."""
        return _bits(self.bytes - self.embedding_bytes, self.elements - self.embedding_elements)

    @property
    def bits_per_quantized_weight(self) -> float | None:
        """Over quantized parameters, scales included; None without any."""
        return _bits(self.quantized_bytes, self.quantized_elements)


def weight_counts(model: nn.Module) -> WeightCounts:
    """Count a model's distinct parameters. Quantized are those with an attribute `qdata`."""
    every = list(_distinct(model.parameters()))
    quantized = [tensor for tensor in every if hasattr(tensor, "qdata")]
    return WeightCounts(*_totals(every), *_totals(quantized), *_totals(list(_distinct(_embeddings(model)))))


def _embeddings(model: nn.Module) -> Iterator[Tensor]:
    """The weights of all embeddings and of the head, as transformers names it."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for module in (*model.modules(), head):
        if module is head or isinstance(module, nn.Embedding):
            yield from () if module is None else module.parameters(recurse=False)


def _totals(tensors: list[Tensor]) -> tuple[int, int]:
    return sum(tensor.numel() for tensor in tensors), sum(tensor.nbytes for tensor in tensors)


def _bits(count: int, elements: int) -> float | None:
    return 8 * count / elements if elements else None


def _distinct(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Tensors without those that show the same memory as an earlier one."""
    return iter({_identity(tensor): tensor for tensor in tensors}.values())


def _identity(tensor: Tensor) -> Hashable:
    """What tied tensors share: where the data begins and how long it is. A tensor without memory is itself."""
    data = getattr(tensor, "qdata", tensor)
    return (data.device, data.data_ptr(), data.nbytes) if data.data_ptr() else id(tensor)


def disk_bytes(folder: str | Path) -> int | None:
    """Bytes of a model folder's weight files: `*.safetensors`, or else `*.bin`; None where there are none."""
    for pattern in ("*.safetensors", "*.bin"):
        if sizes := [file.stat().st_size for file in Path(folder).glob(pattern)]:
            return sum(sizes)
    return None


@dataclass(frozen=True)
class Footprint:
    """Sizes in bytes, and bits per weight; None is unknown (`disk`, `peak_rss`) or not there (the bits).

    Attributes:
        disk: the model folder's weight files.
        weights: distinct parameters and buffers in memory.
        peak_rss: `VmHWM`, this process's peak resident memory, memory-mapped files included.
        bits_per_weight, bits_per_weight_without_embeddings, bits_per_quantized_weight: as in `WeightCounts`.
    """

    disk: int | None
    weights: int
    peak_rss: int | None
    bits_per_weight: float | None
    bits_per_weight_without_embeddings: float | None
    bits_per_quantized_weight: float | None


def footprint(model: nn.Module, folder: str | Path | None = None) -> Footprint:
    """A model's sizes, with those of its folder if it has one."""
    counts = weight_counts(model)
    return Footprint(
        disk=None if folder is None else disk_bytes(folder),
        weights=weight_bytes(model),
        peak_rss=peak_rss(),
        bits_per_weight=counts.bits_per_weight,
        bits_per_weight_without_embeddings=counts.bits_per_weight_without_embeddings,
        bits_per_quantized_weight=counts.bits_per_quantized_weight,
    )


def peak_rss() -> int | None:
    """Peak resident memory of this process in bytes, mapped files included (`VmHWM`); None where it is not known."""
    return _status("VmHWM")


def reset_peak_rss() -> bool:
    """Let `peak_rss` start anew from what is resident now, where the system allows it (Linux: `clear_refs`, 5)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def rss_anon() -> int | None:
    """Resident memory of this process now, in bytes, without mapped files (`RssAnon`); None where it is not known."""
    return _status("RssAnon")


def _status(key: str) -> int | None:
    """A size in bytes from /proc/self/status, whose lines read `VmHWM:     1234 kB`."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


class RssAnonSampler:
    """Context manager that samples `RssAnon` in a thread. A peak shorter than the interval can be missed.

    Attributes:
        baseline: bytes on entry; None where it is not known.
        peak: the most bytes seen so far, entry and exit included; None where it is not known.
    """

    def __init__(self, interval: float = 0.002) -> None:
        self.baseline: int | None = None
        self.peak: int | None = None
        self._interval = interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="llmquant-rss", daemon=True)

    def __enter__(self) -> RssAnonSampler:
        self.baseline = self.peak = rss_anon()
        if self.baseline is not None:
            self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        self._look()

    def _sample(self) -> None:
        while not self._done.wait(self._interval):
            self._look()

    def _look(self) -> None:
        now = rss_anon()
        self.peak = now if self.peak is None or now is None else max(self.peak, now)
