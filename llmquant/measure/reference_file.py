"""The file of a reference: a safetensors file of logits and what was found in them, with a checksum for every block.

`docs/measuring.md` describes it. The logits come first, written as they are computed; all else is known at the end. A
block is read on its own, never mapped: pages of a mapped file would count as this process's memory.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmquant.errors import ReferenceFileError

KIND, VERSION = "llmquant.reference", 1
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16}
"""Of stored logits; uint16 are the codes of `measure.codes`."""
_SIZES = {"BF16": 2, "F16": 2, "U16": 2, "U32": 4, "I32": 4, "I64": 8, "F64": 8}
_ARRAYS = {"U32": "<u4", "I32": "<i4", "I64": "<i8", "F64": "<f8"}
_LONGEST = 1 << 16  # bytes of a header; ours has less than a thousand


@dataclass(frozen=True)
class Layout:
    """Where everything lies.

    Attributes:
        dtype: of stored logits, a key of `DTYPES`.
        shape: windows W, tokens of each T, vocabulary V.
        rows: rows R of a block; the last of a window may have fewer.
    """

    dtype: str
    shape: tuple[int, int, int]
    rows: int

    @property
    def blocks(self) -> int:
        """Blocks in a window."""
        return math.ceil(self.shape[1] / self.rows)

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> dtype and shape, in the order of the file."""
        count, context, _ = self.shape
        scored = (count, context - 1)
        return {
            "logits": (self.dtype, self.shape),
            "windows": ("I64", (count, context)),
            "nll": ("F64", scored),
            "confidence": ("F64", scored),
            "top1": ("I32", scored),
            "checksums": ("U32", (count, self.blocks)),
            "seal": ("U32", (1,)),
        }

    def ends(self) -> dict[str, int]:
        """Name -> where the tensor ends, counted from the first byte of the logits."""
        ends, end = {}, 0
        for name, (dtype, shape) in self.tensors().items():
            end += _SIZES[dtype] * math.prod(shape)
            ends[name] = end
        return ends

    def header(self) -> bytes:
        """The bytes before the first logit; there is only one header for a layout."""
        ends = self.ends()
        starts = dict(zip(ends, [0, *ends.values()], strict=False))
        content: dict[str, Any] = {"__metadata__": {"kind": KIND, "version": str(VERSION), "rows": str(self.rows)}}
        for name, (dtype, shape) in self.tensors().items():
            content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [starts[name], ends[name]]}
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def total(self) -> int:
        """Bytes of the whole file."""
        return len(self.header()) + self.ends()["seal"]

    def block(self, window: int, block: int) -> tuple[int, tuple[int, int]]:
        """Where a block begins in the file, and its shape, [R, V]."""
        _, context, vocabulary = self.shape
        start = block * self.rows
        before = (window * context + start) * vocabulary * _SIZES[self.dtype]
        return len(self.header()) + before, (min(self.rows, context - start), vocabulary)


def checksum(parts: Iterable[Any]) -> int:
    """CRC-32 of the bytes of some arrays, one after the other."""
    found = 0
    for part in parts:
        found = zlib.crc32(part, found)
    return found


def read_block(file: BufferedIOBase, layout: Layout, window: int, block: int, expected: int, where: str) -> Tensor:
    """A block of stored logits, [R, V]. Raises `ReferenceFileError` if it is not what was written."""
    offset, shape = layout.block(window, block)
    content = np.empty(math.prod(shape) * _SIZES[layout.dtype], np.uint8)
    file.seek(offset)
    if file.readinto(content.data) != content.nbytes or checksum([content]) != expected:
        raise damaged(where, f"block {block} of window {window} has another checksum")
    return torch.from_numpy(content).view(DTYPES[layout.dtype]).view(shape)


def write_end(file: BufferedIOBase, layout: Layout, figures: dict[str, Tensor]) -> None:
    """Write what follows the logits, `figures` by name, and the seal over it and the header."""
    arrays = [_array(figures[name], dtype) for name, dtype in _figures(layout)]
    file.seek(len(layout.header()) + layout.ends()["logits"])
    for array in [*arrays, np.array([checksum([layout.header(), *arrays])], "<u4")]:
        file.write(array.data)


def read_end(file: BufferedIOBase, layout: Layout, where: str) -> dict[str, Tensor]:
    """The figures by name. Raises `ReferenceFileError` if they do not have the seal."""
    file.seek(len(layout.header()) + layout.ends()["logits"])
    content = file.read()
    body, seal = content[:-4], content[-4:]
    if struct.pack("<I", checksum([layout.header(), body])) != seal:
        raise damaged(where, "what follows the logits has another checksum")
    figures, shapes, offset = {}, layout.tensors(), 0
    for name, dtype in _figures(layout):
        count = math.prod(shapes[name][1])
        array = np.frombuffer(body, _ARRAYS[dtype], count, offset).reshape(shapes[name][1])
        figures[name] = torch.from_numpy(array.astype(np.int64) if dtype == "U32" else array.copy())
        offset += array.nbytes
    return figures


def _figures(layout: Layout) -> list[tuple[str, str]]:
    return [(name, dtype) for name, (dtype, _) in layout.tensors().items() if name not in ("logits", "seal")]


def _array(values: Tensor, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(values.numpy(force=True).astype(_ARRAYS[dtype]))


def read_layout(file: BufferedIOBase, where: str) -> Layout:
    """The layout of a file that is as long as it should be. Raises `ReferenceFileError` for any other."""
    size = os.fstat(file.fileno()).st_size
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        content = json.loads(file.read(min(length, _LONGEST)))
        metadata, logits = content["__metadata__"], content["logits"]
        if metadata["kind"] != KIND:
            raise ValueError("another kind of file")
        version = metadata["version"]
        layout = Layout(logits["dtype"], tuple(logits["shape"]), int(metadata["rows"]))
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(where, f"its header does not describe a reference ({error})") from error
    if version != str(VERSION):
        hint = "the version of llmquant that wrote it, or compute the reference again"
        raise ReferenceFileError(f"a reference of version {version}; this is {VERSION}", where=where, hint=hint)
    _check_layout(file, layout, where)
    if size != layout.total():
        raise damaged(where, f"it has {size:,} bytes and should have {layout.total():,}")
    return layout


def _check_layout(file: BufferedIOBase, layout: Layout, where: str) -> None:
    """The header must be, byte for byte, the one that this layout has."""
    sizes = (*layout.shape, layout.rows)
    if layout.dtype not in DTYPES or len(sizes) != 4 or not all(type(n) is int and 0 < n < 1 << 40 for n in sizes):
        raise damaged(where, "its header describes impossible logits")
    header = layout.header()
    file.seek(0)
    if file.read(len(header)) != header:
        raise damaged(where, "its header was changed")


def damaged(where: str, why: str) -> ReferenceFileError:
    """The error for a file that is not what `Reference.compute` wrote."""
    hint = "delete it and compute the reference again"
    return ReferenceFileError(f"the reference is cut, damaged or of another kind: {why}", where=where, hint=hint)
