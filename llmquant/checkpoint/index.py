"""Indexes of shards (`model.safetensors.index.json`), and where the files of a checkpoint may lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmquant.checkpoint.header import LONGEST_NAME, Header, read_header
from llmquant.documents import read_json
from llmquant.errors import CheckpointError, DocumentError, IndexFileError, UnsafePathError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_SHARDS = 10_000


def read_index(path: Path, shards_may_be_missing: bool = False) -> dict[str, str]:
    """Tensor -> file, as an index says; every file lies in the index's folder.

    Raises:
        IndexFileError: for what is no index, and for shards that are not there unless that may be.
        UnsafePathError: for a file elsewhere.
    """
    try:
        content = read_json(path)
    except DocumentError as error:
        raise _unreadable(path, error.what) from error
    weights = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights or not all(isinstance(name, str) for name in weights.values()):
        raise _unreadable(path, "weight_map does not name a file for each tensor")
    _check_size(content.get("metadata"), path)
    names = sorted(set(weights.values()))
    if len(names) > MOST_SHARDS:
        raise _unreadable(path, f"it names {len(names):,} files, and may name {MOST_SHARDS:,}")
    for name in names:
        check_name(name, str(path))
    lost = [name for name in names if not _is_file(path.parent / name)]
    if lost and not shards_may_be_missing:
        where = f"{path.parent}: {', '.join(name[:200] for name in lost[:5])}"
        raise IndexFileError("shards are missing", where=where, hint="copy them again")
    for name in set(names) - set(lost):
        check_inside(path.parent, path.parent / name)
    return weights


def check_shards(folder: Path, files: Iterable[Path]) -> dict[Path, Header]:
    """The headers of the files of a checkpoint, in which every tensor is where the folder's index says, and once.

    A single file has no index, whatever else lies beside it.

    Raises:
        HeaderError, IndexFileError.
    """
    headers = {path: read_header(path) for path in files}
    if [path.name for path in headers] != [SINGLE]:
        check_placement(read_index(folder / INDEX), headers, folder / INDEX)
    return headers


def check_placement(index: Mapping[str, str], headers: Mapping[Path, Header], where: Path) -> None:
    """Raises `IndexFileError` if a tensor is not in the shard that an index names, or lies in two."""
    for _, what in misplaced(index, headers):
        raise IndexFileError(what, where=str(where))


def check_once(headers: Mapping[Path, Header]) -> None:
    """Raises `IndexFileError` if two files hold a tensor of one name."""
    if headers:
        check_placement({}, headers, next(iter(headers)).parent)


def misplaced(index: Mapping[str, str], headers: Mapping[Path, Header]) -> Iterator[tuple[str, str]]:
    """Each tensor that is not in the shard that an index names, or lies in two, and what is the matter."""
    held = {path.name: header.tensors for path, header in headers.items()}
    for key, name in index.items():
        if key not in held.get(name, {}):
            yield key, f"{name} does not hold {key}, as the index says"
    seen: dict[str, str] = {}
    for name, tensors in held.items():
        for key in tensors:
            if seen.setdefault(key, name) != name:
                yield key, f"{key} is in {seen[key]} and in {name}"


def check_name(name: str, where: str) -> None:
    """Raises `UnsafePathError` unless a name can be that of a file in the folder, or in a folder below."""
    parts = name.replace("\\", "/").split("/")
    if (
        len(name) > LONGEST_NAME
        or any(part in ("", ".", "..") for part in parts)
        or not name.isprintable()
        or ":" in parts[0]
    ):
        raise UnsafePathError(f"{name!r:.200} does not lie in the checkpoint's folder", where=where)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the system
        return False


def check_inside(folder: Path, path: Path) -> None:
    """Raises `UnsafePathError` for a file that is a link to somewhere else.

    The hub's cache is no elsewhere: there, files of `snapshots/REVISION` are links to `blobs` beside `snapshots`.
    """
    real, home = path.resolve(), folder.resolve()
    if real.is_relative_to(home):
        return
    if home.parent.name == "snapshots" and real.is_relative_to(home.parent.parent / "blobs"):
        return
    raise UnsafePathError(
        "a file of the checkpoint is a link that leaves its folder",
        where=f"{path} -> {real}",
        hint="copy the file itself into the folder, if you trust it",
    )


def _check_size(metadata: Any, path: Path) -> None:
    """`total_size` is written by many programs, with and without tied weights: no more is asked than a sane number."""
    total = metadata.get("total_size", 0) if isinstance(metadata, dict) else 0 if metadata is None else -1
    if isinstance(total, bool) or not isinstance(total, int | float) or not 0 <= total < 2**63:
        raise _unreadable(path, f"its total_size is {total!r:.100}")


def _unreadable(path: Path, why: str) -> CheckpointError:
    return IndexFileError(f"cannot read the index of the shards: {why}", where=str(path), hint="copy it again")
