"""The headers of safetensors files, read strictly and within limits.

A file is: 8 bytes with the length n of the header (unsigned, little end first), n bytes of JSON, the tensors' bytes
(https://github.com/huggingface/safetensors#format). The header is an object: name -> `{"dtype", "shape",
"data_offsets"}`, and `__metadata__`, texts by text. Whoever wrote it may mean harm, so nothing is believed: it is cut
into single descriptions before a parser sees one, and every number is held against the file and the others. What is
read takes no more memory than the header's length and 64 MB.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmquant.documents import check_regular, unique
from llmquant.errors import CheckpointError, DocumentError, HeaderError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()}
_BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}  # torch reads none of these here

LONGEST_HEADER = 100_000_000  # as in the safetensors library
MOST_TENSORS = 100_000
MOST_METADATA = 10_000
LONGEST_METADATA = 8_000_000
LONGEST_NAME = 1_000
HIGHEST_RANK = 16
_LONGEST_ENTRY = 4_000  # bytes of one description; numbers of a rank of 16 take less
_LARGEST = 2**63 - 1

_TEXT = rb'"(?:[^"\\\x00-\x1f]++|\\[^\x00-\x1f])*+"'
_SPACE = rb"[ \t\r\n]*+"
_FIELD = rb"%(s)s(?P<name>%(t)s)%(s)s:%(s)s(?P<value>%(v)s)%(s)s(?P<next>[,}])"
_PARTS = {b"s": _SPACE, b"t": _TEXT}
_TENSORS = re.compile(_FIELD % {**_PARTS, b"v": rb"\{(?:[^{}\"]++|%s)*+\}" % _TEXT})
_TEXTS = re.compile(_FIELD % {**_PARTS, b"v": _TEXT})
_SPACES = re.compile(_SPACE)
_EMPTY = re.compile(rb"\{%(s)s\}%(s)s" % {b"s": _SPACE})


class Header(NamedTuple):
    """A safetensors header.

    Attributes:
        metadata: texts by text.
        tensors: name -> (dtype, shape); dtype None if torch has none of that name.
        places: name -> (begin, end) of its bytes, counted from the start of the file.
    """

    metadata: dict[str, str]
    tensors: dict[str, tuple[torch.dtype | None, tuple[int, ...]]]
    places: dict[str, tuple[int, int]]


def read_header(path: Path) -> Header:
    """The header of a safetensors file.

    Raises:
        HeaderError: for a file that is missing, truncated or foreign, and for a header that says anything impossible.
    """
    try:
        check_regular(path)
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return parse_header(_header_bytes(file, size), size)
    except FileNotFoundError as error:
        raise HeaderError("a shard is missing", where=str(path), hint="copy or save the model again") from error
    except DocumentError as error:
        raise damaged(path, error.what) from error
    except OSError as error:
        raise HeaderError(f"the file cannot be read: {error.strerror}", where=str(path)) from error
    except ValueError as error:
        raise damaged(path, str(error)) from error


def damaged(path: Path, why: str) -> CheckpointError:
    """The error for a file that is not what a header, or its own, promises."""
    what = f"the file is truncated or is no safetensors file: {why}"
    return HeaderError(what, where=str(path), hint="copy or save the model again")


def parse_header(text: bytes, size: int) -> Header:
    """The header of a file of `size` bytes from its own bytes. Raises `ValueError` for anything impossible."""
    metadata: dict[str, str] | None = None
    tensors: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {}
    places: dict[str, tuple[int, int]] = {}
    begin = 8 + len(text)
    for name, value in _members(text, _TENSORS):
        if name in tensors or (name == "__metadata__" and metadata is not None):
            raise ValueError(f"{name!r} stands twice")
        if name == "__metadata__":
            metadata = _metadata(value)
            continue
        if len(tensors) == MOST_TENSORS:
            raise ValueError(f"it has more than {MOST_TENSORS:,} tensors")
        tensors[name], (start, end) = _tensor(name, value)
        places[name] = (begin + start, begin + end)
    _check_places(places, begin, size)
    return Header(metadata or {}, tensors, places)


def _header_bytes(file: Any, size: int) -> bytes:
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise ValueError("the header is longer than the file")
    if length > LONGEST_HEADER:
        raise ValueError(f"the header has {length:,} bytes, and may have {LONGEST_HEADER:,}")
    text: bytes = file.read(length)
    if len(text) != length:
        raise ValueError("the header is longer than the file")
    return text


def _members(text: bytes, pattern: re.Pattern[bytes]) -> Iterator[tuple[str, bytes]]:
    """Name and value of every member of an object, as they stand."""
    if _EMPTY.fullmatch(text):
        return
    if not text.startswith(b"{"):
        raise ValueError("the header does not begin with {")
    position, more = 1, True
    while more:
        found = pattern.match(text, position)
        if found is None:
            raise ValueError(f"it is no list of tensors, nor of texts by text, at byte {position} of {len(text):,}")
        yield _name(found["name"]), found["value"]
        position, more = found.end(), found["next"] == b","
    if not _SPACES.fullmatch(text, position):
        raise ValueError("something follows the end of the header")


def _name(quoted: bytes) -> str:
    if len(quoted) > LONGEST_NAME:
        raise ValueError(f"a name has {len(quoted):,} bytes, and may have {LONGEST_NAME:,}")
    name: str = json.loads(quoted)
    if not name.isprintable() or not name:
        raise ValueError(f"the name {name!r} is empty or cannot be printed")
    return name


def _metadata(value: bytes) -> dict[str, str]:
    if len(value) > LONGEST_METADATA:
        raise ValueError(f"its metadata have {len(value):,} bytes, and may have {LONGEST_METADATA:,}")
    found: dict[str, str] = {}
    for name, text in _members(value, _TEXTS):
        if name in found or len(found) == MOST_METADATA:
            raise ValueError(f"its metadata have {name!r} twice, or more than {MOST_METADATA:,} entries")
        found[name] = json.loads(text)
    return found


def _tensor(name: str, value: bytes) -> tuple[tuple[torch.dtype | None, tuple[int, ...]], tuple[int, int]]:
    """((dtype, shape), (begin, end)), the place counted from the end of the header."""
    plain = len(value) <= _LONGEST_ENTRY and value.count(b"[") <= 8  # two lists: nothing nests deep
    described = json.loads(value, object_pairs_hook=unique) if plain else {}
    if described.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} is not described by dtype, shape and data_offsets")
    kind, shape, offsets = described["dtype"], described["shape"], described["data_offsets"]
    if not isinstance(kind, str) or kind not in _BITS:
        raise ValueError(f"{name!r} has the unknown dtype {kind!r}")
    if not _counts(shape) or len(shape) > HIGHEST_RANK or math.prod(shape) > _LARGEST:
        raise ValueError(f"{name!r} has the impossible shape {shape!r:.200}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name!r} has the impossible place {offsets!r:.200}")
    bits, length = _BITS[kind] * math.prod(shape), offsets[1] - offsets[0]
    if bits != 8 * length:
        raise ValueError(f"{name!r} has {length:,} bytes, and {kind} {tuple(shape)} takes {-(-bits // 8):,}")
    return (DTYPES.get(kind), tuple(shape)), (offsets[0], offsets[1])


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n <= _LARGEST for n in values)


def _check_places(places: Mapping[str, tuple[int, int]], begin: int, size: int) -> None:
    """Tensors lie one behind the other, without a byte between, shared or left over."""
    last = begin
    for name, (start, end) in sorted(places.items(), key=lambda item: item[1]):
        if start != last:
            raise ValueError(f"{name!r} {'overlaps another tensor' if start < last else 'lies behind unused bytes'}")
        last = end
    if last != size:
        raise ValueError(f"it has {size:,} bytes and should have {last:,}")
