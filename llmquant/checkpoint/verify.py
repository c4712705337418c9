"""Whether a checkpoint is what was saved: every header, the index, the manifest, the checksums, and every value."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoint.checksums import read_checksums
from llmquant.checkpoint.config_file import read_config
from llmquant.checkpoint.entries import check_entry, scale_dtype
from llmquant.checkpoint.header import Header, read_header
from llmquant.checkpoint.index import INDEX, SINGLE, check_inside, misplaced, read_index
from llmquant.checkpoint.manifest import METHOD, check_component, check_save, promises, shard_metadata
from llmquant.checkpoint.source import locate, weight_files
from llmquant.checkpoint.state import expected, logical_shape
from llmquant.checkpoint.values import Check, check_of
from llmquant.errors import CheckpointError
from llmquant.primitives.blocks import block_counts

Progress = Callable[[int, int, str], object]  # called with (bytes done, bytes in all, what is at work)
_PANEL_BYTES = 1 << 23  # what is read at a time


@dataclass(frozen=True)
class Problem:
    """Something that is wrong.

    Attributes:
        where: the tensor, or the file.
        what: in one sentence.
    """

    where: str
    what: str


@dataclass
class VerifyReport:
    """What was found.

    Attributes:
        folder: of the checkpoint.
        tensors, bytes: how many were read.
        matched: how many tensors have the checksum that was saved with them.
        unverifiable: tensors that no checksum was saved with: nothing says that they are right.
        problems: what is wrong.
        seconds: it took.
    """

    folder: str
    tensors: int = 0
    bytes: int = 0
    matched: int = 0
    unverifiable: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def status(self) -> str:
        """`wrong`, `unverifiable` where nothing wrong was found but not all tensors have checksums, or `right`."""
        return "wrong" if self.problems else "unverifiable" if self.unverifiable or not self.tensors else "right"

    @property
    def ok(self) -> bool:
        """Whether every tensor is known to be right."""
        return self.status == "right"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"status": self.status, **asdict(self)}

    def add(self, where: str, what: str) -> None:
        """Notes a problem."""
        self.problems.append(Problem(where, what))


def verify(model: str | Path, progress: Progress | None = None) -> VerifyReport:
    """Reads a whole checkpoint, quantized by llmquant or not, and names everything that is wrong.

    Headers must fit their files, every tensor lie where the index says, the shards belong to the save that config.json
    describes and hold what it promises; the bytes of each tensor must have the sha256 that was saved with them, packed
    codes no stray bits, codes and scales no NaN or infinity. It takes a few megabytes of memory.

    Args:
        model: local folder, or hub id.
        progress: called before each tensor.

    Raises:
        ModelNotFoundError: for what is no model folder.
        CheckpointError: for a config.json that cannot be used, and for weights as pickles.
    """
    started = time.perf_counter()
    folder = locate(model)
    manifest = read_config(folder).get("quantization_config") or {}
    report = VerifyReport(str(folder))
    headers = _headers(folder, report)
    present = {key: found for header in headers.values() for key, found in header.tensors.items()}
    ours = manifest.get("quant_method") == METHOD
    checks = _check_manifest(manifest, headers, present, report) if ours else {}
    sums = _checksums(folder, manifest, present, report)
    _Reading(headers, checks, sums, report, progress)()
    report.seconds = time.perf_counter() - started
    return report


def _headers(folder: Path, report: VerifyReport) -> dict[Path, Header]:
    """The headers that can be read; a problem for each other, and for tensors that are not where the index says."""
    headers, index = {}, _index(folder, report)
    for name in sorted(set(index.values())) if index is not None else [p.name for p in weight_files(folder)]:
        try:
            check_inside(folder, folder / name)
            headers[folder / name] = read_header(folder / name)
        except CheckpointError as error:
            report.add(name, error.what)
    for key, what in misplaced(index or {}, headers):
        report.add(key, what)
    return headers


def _index(folder: Path, report: VerifyReport) -> dict[str, str] | None:
    """The index, if the folder has one that counts: beside a single file it does not."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return None
    try:
        return read_index(folder / INDEX, shards_may_be_missing=True)
    except CheckpointError as error:
        report.add(INDEX, error.what)
        return {}


def _check_manifest(
    manifest: Mapping[str, Any], headers: Mapping[Path, Header], present: Mapping[str, Any], report: VerifyReport
) -> dict[str, Check]:
    """The check of the values of each component; a problem for all that manifest and headers do not agree on."""
    try:
        promised = promises(manifest)
    except CheckpointError as error:
        report.add(f"config.json: {error.where}", error.what)
        return {}
    for path, header in headers.items():
        with _noting(report, path.name):
            check_save(manifest, path, header)
            if "save_id" not in manifest or not shard_metadata(manifest).items() <= header.metadata.items():
                raise CheckpointError("its metadata are not those that a save writes")
    for key, component in promised.items():
        with _noting(report, key):
            check_component(key, component, present, headers)
    return {
        key: check
        for fqn, described in manifest["weights"].items()
        for key, check in _checks(fqn, described)
        if present.get(key) == promised[key]
    }


@contextmanager
def _noting(report: VerifyReport, where: str) -> Iterator[None]:
    """Turns a `CheckpointError` of a block into a problem."""
    try:
        yield
    except CheckpointError as error:
        report.add(where, error.what)


def _checks(fqn: str, described: Mapping[str, Any]) -> Iterator[tuple[str, Check]]:
    fmt = check_entry(described)
    kind, (*_, rows, columns) = scale_dtype(described, fmt), logical_shape(described)
    along = block_counts(rows, columns, tuple(described["block"]))[1]
    for key in expected(fqn, described):
        name = "qdata" if key == fqn else key.removeprefix(fqn + "_")
        yield key, check_of(name, fmt, kind, columns if name == "qdata" else along)


def _checksums(
    folder: Path, manifest: Mapping[str, Any], present: Mapping[str, Any], report: VerifyReport
) -> dict[str, str]:
    try:
        sums = read_checksums(folder, manifest) or {}
    except CheckpointError as error:
        report.add("checksums", error.what)
        return {}
    for key in sums.keys() - present.keys():
        report.add(key, "it was saved, and no file holds it")
    return sums


class _Reading:
    """Reads every tensor once, by panels of rows."""

    def __init__(
        self,
        headers: Mapping[Path, Header],
        checks: Mapping[str, Check],
        sums: Mapping[str, str],
        report: VerifyReport,
        progress: Progress | None,
    ) -> None:
        self.headers, self.checks, self.sums, self.report, self.progress = headers, checks, sums, report, progress
        self.total = sum(end - begin for header in headers.values() for begin, end in header.places.values())

    def __call__(self) -> None:
        for path, header in self.headers.items():
            for key, (begin, end) in sorted(header.places.items(), key=lambda item: item[1]):
                self._tell(key)
                self._tensor(path, header, key)
                self.report.tensors += 1
                self.report.bytes += end - begin
        self._tell("")

    def _tell(self, key: str) -> None:
        if self.progress:
            self.progress(self.report.bytes, self.total, key)

    def _tensor(self, path: Path, header: Header, key: str) -> None:
        digest, check, wrong = hashlib.sha256(), self.checks.get(key), None
        try:
            for panel in _panels(path, header, key, check.tail if check else 1):
                digest.update(panel.numpy().data)
                wrong = wrong or (check and _wrong(check, panel, *header.tensors[key]))
        except OSError as error:
            self.report.add(key, f"{path.name} cannot be read: {error.strerror}")
            return
        if key not in self.sums:
            self.report.unverifiable.append(key)
        elif digest.hexdigest() == self.sums[key]:
            self.report.matched += 1
        else:
            self.report.add(key, "its bytes are not those that were saved: they have another sha256")
        if wrong:
            self.report.add(key, wrong)


def _wrong(check: Check, panel: Tensor, dtype: torch.dtype | None, shape: tuple[int, ...]) -> str | None:
    """What is wrong with some rows, given as bytes."""
    assert dtype is not None, "a component has a dtype of ours"
    return check.wrong(panel.view(dtype).view(-1, math.prod(shape[-check.tail :])))


def _panels(path: Path, header: Header, key: str, tail: int) -> Iterator[Tensor]:
    """A tensor's bytes, whole rows at a time; the last `tail` dimensions make a row."""
    (begin, end), (_, shape) = header.places[key], header.tensors[key]
    rows = max(1, math.prod(shape[:-tail]))
    size = (end - begin) // rows or 1
    step = max(1, _PANEL_BYTES // size) * size
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        for start in range(begin, end, step):
            panel = torch.empty(min(step, end - start), dtype=torch.uint8)
            read, view = 0, panel.numpy().data
            while count := file.readinto(view[read:]):
                read += count
            if read != len(view):
                raise OSError(0, "it ends too early")
            yield panel
