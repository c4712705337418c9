"""A hub repository read shard by shard: small files first, headers by ranges, each shard when its turn comes.

The layout of the cache and the protocol are those of huggingface_hub; nothing but its public functions is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoint.header import DTYPES
from llmquant.checkpoint.shards import InFile, stored_in
from llmquant.errors import CheckpointError, LlmQuantError, ModelNotFoundError

SMALL = ["*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.md", "LICENSE*", "NOTICE*", "*.tiktoken", "*.jsonl"]
"""What is fetched first: config, index, tokenizer, licence, and code, which nobody runs unless asked to."""


def fetch_small_files(repo: str, revision: str | None) -> Path:
    """The folder of a revision in the cache, with everything but weights. Raises `ModelNotFoundError`."""
    from huggingface_hub import snapshot_download

    with _hub_errors(repo):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=SMALL, ignore_patterns=["original/*"]))


@dataclass(frozen=True)
class InHub:
    """A tensor of a shard that may not be here yet: reading it fetches the shard."""

    shard: str
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    shards: HubShards = field(repr=False, compare=False)

    def read(self, dtype: torch.dtype | None = None, rows: tuple[int, int] | None = None) -> Tensor:
        """Its values, or those of some rows [first, last). Raises `CheckpointError`, `ModelNotFoundError`."""
        return self.shards.tensor(self).read(dtype, rows)


class HubShards:
    """The weight files of one revision of a hub repository.

    Args:
        repo: its id.
        folder: the revision's folder in the cache; its name is the commit.
        names: of the shards.
        drop: whether shards that this object downloads are deleted after their last use.

    Attributes:
        told: called with the name of a shard that is about to be downloaded.
    """

    def __init__(self, repo: str, folder: Path, names: Sequence[str], drop: bool = False) -> None:
        self.repo, self.commit, self.names, self.drop = repo, folder.name, tuple(names), drop
        self.told: Callable[[str], object] | None = None
        self._folder, self._lock = folder, RLock()
        self._downloaded: set[str] = set()
        self._opened: dict[str, dict[str, InFile]] = {}
        self._users: dict[str, set[str]] = {}
        self._stored: dict[str, InHub] = {}
        self.sizes: dict[str, int] = {}

    def stored(self) -> dict[str, InHub]:
        """Key -> tensor, from the headers alone: those of shards that are not here are read by ranges."""
        if not self._stored:
            for name in self.names:
                self._stored |= self._of_shard(name)
        return self._stored

    def missing(self) -> list[str]:
        """The shards that are not in the cache."""
        return [name for name in self.names if self._cached(name) is None]

    def tensor(self, wanted: InHub) -> InFile:
        """The tensor in its file, which is downloaded first if it must be."""
        with self._lock:
            if wanted.shard not in self._opened:
                self._opened[wanted.shard] = stored_in(self._fetch(wanted.shard))
            found = self._opened[wanted.shard].get(wanted.key)
        if found is None or (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
            raise CheckpointError(
                f"{wanted.key} is not what the file's header said before it was downloaded",
                where=f"{self.repo}: {wanted.shard}",
                hint="the cache or the transfer is damaged: delete the file from the cache and run it again",
            )
        return found

    def fetch_all(self) -> None:
        """Downloads what is not here; then the revision's folder is a whole checkpoint."""
        for name in self.names:
            self._fetch(name)

    def expect(self, uses: Mapping[str, Iterable[str]]) -> None:
        """Says which shards each piece of work will read: a shard is dropped when the last of them is done."""
        self._users = {name: {who for who, shards in uses.items() if name in shards} for name in self.names}
        self._drop_unused()

    def done(self, who: str) -> None:
        """A piece of work will read nothing any more."""
        with self._lock:
            for users in self._users.values():
                users.discard(who)
            self._drop_unused()

    def _drop_unused(self) -> None:
        for name in [n for n in self._downloaded if self.drop and not self._users.get(n)]:
            path = self._folder / name
            blob = path.resolve()  # a link in the folder of the revision, the file itself among the blobs
            path.unlink(missing_ok=True)
            blob.unlink(missing_ok=True)
            self._downloaded.discard(name)
            self._opened.pop(name, None)

    def _of_shard(self, name: str) -> dict[str, InHub]:
        cached = self._cached(name)
        if cached is not None:
            self.sizes[name] = cached.stat().st_size
            return {k: InHub(name, k, t.dtype, t.shape, self) for k, t in stored_in(cached).items()}
        return {k: InHub(name, k, dtype, shape, self) for k, dtype, shape in self._remote_header(name)}

    def _remote_header(self, name: str) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        from huggingface_hub import HfApi

        with _hub_errors(self.repo):
            found = HfApi().parse_safetensors_file_metadata(self.repo, name, revision=self.commit)
        self.sizes[name] = max((t.data_offsets[1] for t in found.tensors.values()), default=0)
        for key, tensor in found.tensors.items():
            if tensor.dtype not in DTYPES:
                raise CheckpointError(
                    f"{key} is of the dtype {tensor.dtype}, unknown here", where=f"{self.repo}: {name}"
                )
            yield key, DTYPES[tensor.dtype], tuple(tensor.shape)

    def _cached(self, name: str) -> Path | None:
        path = self._folder / name
        return path if path.is_file() else None

    def _fetch(self, name: str) -> Path:
        with self._lock:
            cached = self._cached(name)
            return cached if cached is not None else self._download(name)

    def _download(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        if self.told:
            self.told(name)
        with _hub_errors(self.repo), _no_bars():
            path = Path(hf_hub_download(self.repo, name, revision=self.commit))
        self._downloaded.add(name)
        return path


def in_order(uses: Mapping[str, Iterable[str]], names: Sequence[str]) -> list[str]:
    """Pieces of work so that shards are needed one after another: by the last shard that each reads, then the first.

    Args:
        uses: piece of work -> names of the shards that it reads.
        names: the shards, in the order in which they are fetched.
    """
    place = {name: i for i, name in enumerate(names)}
    return sorted(uses, key=lambda who: (places := sorted(place[n] for n in uses[who]))[-1:] + places[:1])


def most_held(uses: Mapping[str, Iterable[str]], order: Sequence[str], sizes: Mapping[str, int]) -> int:
    """Bytes of the shards that lie on the disk at once, at most, where each is dropped after its last use."""
    last = {name: i for i, who in enumerate(order) for name in uses[who]}
    held: set[str] = set()
    most = 0
    for i, who in enumerate(order):
        held |= set(uses[who])
        most = max(most, sum(sizes[name] for name in held))
        held = {name for name in held if last[name] > i}
    return most


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turns what huggingface_hub and its HTTP client raise into `ModelNotFoundError`."""
    try:
        yield
    except LlmQuantError:
        raise
    except Exception as error:
        raise ModelNotFoundError(
            f"neither a local folder nor a model that the hub gives out ({type(error).__name__})",
            where=repo,
            hint="check the path; for a hub id, the network, the spelling, the revision and your token",
        ) from error


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keeps the bars of huggingface_hub out of ours."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before: Any = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
