"""Shards by position: tensors read one at a time, and files that are laid out before anything is in them.

Nothing is mapped: what was read or written is in no page of the process, so that its peak memory is that of the tensors
it holds. The bytes are those of the safetensors format: eight bytes with the length of the header, the header as JSON
padded to eight bytes, then the tensors, those of wide numbers first so that each is aligned.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llmquant.checkpoint.header import DTYPES, read_header
from llmquant.errors import CheckpointError

Spec = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a tensor."""

INDEX = "model.safetensors.index.json"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PANEL_BYTES = 2**24  # what is read at a time where it is cast or hashed


def nbytes(spec: Spec) -> int:
    """Bytes of a tensor."""
    return torch.Size(spec[1]).numel() * spec[0].itemsize


class Stored(Protocol):
    """A tensor of a checkpoint that is not read yet."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, dtype: torch.dtype | None = None, rows: tuple[int, int] | None = None) -> Tensor:
        """Its values, or those of some rows (first, and behind the last), perhaps in another dtype."""


@dataclass(frozen=True)
class InFile:
    """A tensor of a safetensors file.

    Attributes:
        path: the file.
        begin: where in it the tensor begins, in bytes.
    """

    path: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    def read(self, dtype: torch.dtype | None = None, rows: tuple[int, int] | None = None) -> Tensor:
        """Its values, or those of some rows [first, last). Raises `CheckpointError` where the file ends too early."""
        shape, begin = self.shape, self.begin
        if rows is not None:
            shape, row = (rows[1] - rows[0], *shape[1:]), nbytes((self.dtype, shape[1:]))
            begin += rows[0] * row
        found = torch.empty(shape, dtype=dtype or self.dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(begin)
            for panel in found.view(-1).split(_PANEL_BYTES // self.dtype.itemsize):
                part = panel if panel.dtype == self.dtype else torch.empty(len(panel), dtype=self.dtype)
                self._fill(part, file)
                if part is not panel:
                    panel.copy_(part)
            forget(file.fileno(), begin, nbytes((self.dtype, shape)))
        return found

    def _fill(self, part: Tensor, file: object) -> None:
        view, done = as_bytes(part), 0
        while done < len(view):
            count = file.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(f"the file ends within {self.key}", where=str(self.path), hint="copy it again")
            done += count


def stored_in(path: Path) -> dict[str, InFile]:
    """The tensors of a safetensors file by key, of which nothing but the header is read. Raises `CheckpointError`."""
    header, found = read_header(path), {}
    for key, (dtype, shape) in header.tensors.items():
        if dtype is None:
            raise CheckpointError(f"{key} is of a dtype that torch lacks", where=str(path))
        found[key] = InFile(path, key, dtype, shape, header.places[key][0])
    return found


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, which are written to where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def forget(file: int, begin: int, count: int) -> None:
    """Lets the system drop what it keeps of a part of a file that will not be needed again."""
    if hasattr(os, "posix_fadvise") and count:
        os.posix_fadvise(file, begin, count, os.POSIX_FADV_DONTNEED)


# ---------------------------------------------------------------------------------- writing


class Place(NamedTuple):
    """Where a tensor lies: the name of its file, its first byte in it, and how many bytes there are."""

    file: str
    begin: int
    size: int


@dataclass(frozen=True)
class Layout:
    """A shard that is to be written.

    Attributes:
        name: of the file.
        header: its first bytes.
        places: key -> where the tensor lies.
        size: of the file.
    """

    name: str
    header: bytes
    places: Mapping[str, Place]
    size: int


def lay_out(units: Iterable[Mapping[str, Spec]], metadata: Mapping[str, str], max_shard_bytes: int) -> list[Layout]:
    """Where every tensor of a checkpoint will lie.

    Args:
        units: tensors that belong together and land in one shard, in order.
        metadata: goes into the header of each shard.
        max_shard_bytes: a shard is closed before its tensors grow past this.
    """
    shards: list[dict[str, Spec]] = [{}]
    held = 0
    for unit in units:
        size = sum(map(nbytes, unit.values()))
        if shards[-1] and held + size > max_shard_bytes:
            shards.append({})
            held = 0
        shards[-1].update(unit)
        held += size
    return [_layout(shard_name(i, len(shards)), shard, metadata) for i, shard in enumerate(shards)]


def shard_name(index: int, count: int) -> str:
    """The name that transformers expects of a shard."""
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def index_json(layouts: Sequence[Layout]) -> str:
    """The index of several shards."""
    weight_map = {key: layout.name for layout in layouts for key in layout.places}
    total = sum(place.size for layout in layouts for place in layout.places.values())
    return _index(total, weight_map)


def _index(total: int, weight_map: Mapping[str, str]) -> str:
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(weight_map)}, indent=2, sort_keys=True)


def _layout(name: str, tensors: Mapping[str, Spec], metadata: Mapping[str, str]) -> Layout:
    content: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end, ends = 0, {}
    for key, spec in sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        begin, end = end, end + nbytes(spec)
        content[key] = {"dtype": _dtype_name(key, spec[0]), "shape": list(spec[1]), "data_offsets": [begin, end]}
        ends[key] = (begin, end - begin)
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    places = {key: Place(name, len(header) + begin, count) for key, (begin, count) in ends.items()}
    return Layout(name, header, places, len(header) + end)


def _dtype_name(key: str, dtype: torch.dtype) -> str:
    if dtype not in _NAMES:
        raise CheckpointError(f"safetensors files have no tensors of {dtype}", where=key)
    return _NAMES[dtype]


def write_shards(
    folder: Path, units: Sequence[Mapping[str, Tensor]], metadata: Mapping[str, str], max_shard_bytes: int
) -> list[Layout]:
    """Writes tensors that lie in memory into shards of an existing folder; those of a unit land in one shard."""
    specs = [{key: (t.dtype, tuple(t.shape)) for key, t in unit.items()} for unit in units]
    layouts = lay_out(specs, metadata, max_shard_bytes)
    writer = ShardWriter(folder, layouts)
    for unit in units:
        for key, tensor in unit.items():
            writer.component(key).write(tensor)
    writer.finish()
    return layouts


class GrowingShards:
    """Writes tensors whose sizes nobody knows beforehand: into shards of a folder as they come, the index at the end.

    Args:
        folder: an existing folder.
        metadata: goes into the header of each shard.
        max_shard_bytes: a shard is closed before it grows past this; it is also the memory that is held.

    Attributes:
        digests: key -> sha256 of every tensor that was added.
        total_bytes: of them all.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, str], max_shard_bytes: int) -> None:
        self.folder, self.metadata, self.max_shard_bytes = folder, metadata, max_shard_bytes
        self.digests: dict[str, str] = {}
        self.total_bytes = 0
        self._held: dict[str, Tensor] = {}
        self._written: list[list[str]] = []

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Adds tensors that belong together; they land in one shard."""
        size = sum(t.nbytes for t in tensors.values())
        if self._held and sum(t.nbytes for t in self._held.values()) + size > self.max_shard_bytes:
            self._flush()
        self._held.update({key: t.contiguous() for key, t in tensors.items()})
        self.total_bytes += size

    def close(self) -> None:
        """Writes the last shard, gives all their final names, and writes the index if there are several."""
        self._flush()
        names = [shard_name(i, len(self._written)) for i in range(len(self._written))]
        for i, name in enumerate(names):
            os.replace(self.folder / f"shard-{i}.tmp", self.folder / name)
        if len(names) > 1:
            weight_map = {key: name for name, keys in zip(names, self._written, strict=True) for key in keys}
            (self.folder / INDEX).write_text(_index(self.total_bytes, weight_map), encoding="utf-8")

    def _flush(self) -> None:
        if not self._held and self._written:
            return
        specs = {key: (t.dtype, tuple(t.shape)) for key, t in self._held.items()}
        writer = ShardWriter(self.folder, [_layout(f"shard-{len(self._written)}.tmp", specs, self.metadata)])
        for key, tensor in self._held.items():
            component = writer.component(key)
            component.write(tensor)
            self.digests[key] = component.finish()
        writer.finish()
        self._written.append(list(self._held))
        self._held = {}


class ShardWriter:
    """Writes tensors to their places in the shards of a folder, in any order and from several threads.

    Args:
        folder: an existing folder. Shards in it that are laid out in the same way are gone on with.
        layouts: where everything is to lie.
    """

    def __init__(self, folder: Path, layouts: Sequence[Layout]) -> None:
        self.folder, self.layouts = folder, layouts
        for layout in layouts:
            self._prepare(layout)

    @cached_property
    def places(self) -> dict[str, Place]:
        """Key -> where the tensor lies."""
        return {key: place for layout in self.layouts for key, place in layout.places.items()}

    def component(self, key: str) -> Component:
        """A tensor that is to be written from its first byte on."""
        return Component(self.folder, self.places[key])

    def digest(self, key: str) -> str:
        """sha256 of the bytes that lie where a tensor belongs."""
        found, place = hashlib.sha256(), self.places[key]
        with (self.folder / place.file).open("rb", buffering=0) as file:
            file.seek(place.begin)
            rest = place.size
            while rest and (block := file.read(min(rest, _PANEL_BYTES))):
                found.update(block)
                rest -= len(block)
            forget(file.fileno(), place.begin, place.size)
        return found.hexdigest()

    def sync(self, files: Iterable[str]) -> None:
        """Returns when what was written to these files is on the disk."""
        for name in sorted(set(files)):
            with (self.folder / name).open("rb+") as file:
                os.fsync(file.fileno())
                forget(file.fileno(), 0, 0x7FFF_FFFF_FFFF)

    def finish(self) -> None:
        """Writes the index, if there are several shards, and returns when all is on the disk."""
        if len(self.layouts) > 1:
            (self.folder / INDEX).write_text(index_json(self.layouts), encoding="utf-8")
        self.sync(layout.name for layout in self.layouts)

    def _prepare(self, layout: Layout) -> None:
        """A file of its full size with its header, unless it is there."""
        path = self.folder / layout.name
        if path.is_file() and path.stat().st_size == layout.size:
            with path.open("rb") as file:
                if file.read(len(layout.header)) == layout.header:
                    return
        with path.open("wb") as file:
            file.write(layout.header)
            file.truncate(layout.size)


class Component:
    """One tensor on its way into a shard, by pieces one after another; its sha256 grows with it."""

    def __init__(self, folder: Path, place: Place) -> None:
        self._path, self._place, self._done = folder / place.file, place, 0
        self._digest = hashlib.sha256()

    def write(self, piece: Tensor) -> None:
        """Writes the next piece."""
        view = as_bytes(piece)
        assert self._done + len(view) <= self._place.size, "a component is larger than it was laid out"
        with _opened(self._path) as file:
            done = 0
            while done < len(view):
                done += os.pwrite(file, view[done:], self._place.begin + self._done + done)
        self._digest.update(view)
        self._done += len(view)

    def finish(self) -> str:
        """The sha256 of the whole tensor, in hex."""
        assert self._done == self._place.size, "a component is smaller than it was laid out"
        return self._digest.hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_WRONLY)
    try:
        yield file
    finally:
        os.close(file)
