"""What a conversion will take of memory and disk, and what there is: told in a plan, refused before the long part."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmquant.checkpoint.crew import Crew
from llmquant.errors import NoSpaceError, NotEnoughMemoryError

_UNLIMITED = 2**60  # version 1 of control groups writes no limit as a number near 2**63


@dataclass(frozen=True)
class Needs:
    """Bytes that a conversion will take, and that there are.

    Attributes:
        peak_memory: what the process will come to take (`VmHWM`), with what it has now.
        memory: what it will take beyond what it has now.
        memory_free: what it can still have; None where the system does not say.
        disk: what will be written beside the output.
        disk_free: room on that disk.
        download: what must come from the hub.
        cache: room that this will take in the hub's cache at a time.
        cache_free: room on that disk.
        cache_shared: whether both are one disk.
    """

    peak_memory: int
    memory: int
    memory_free: int | None
    disk: int
    disk_free: int
    download: int = 0
    cache: int = 0
    cache_free: int = 0
    cache_shared: bool = False

    def check(self, target: Path, *, ignore_memory: bool = False) -> None:
        """Raises `NoSpaceError` or, unless told to ignore it, `NotEnoughMemoryError` where there is too little."""
        both = self.cache if self.cache_shared else 0
        if self.disk_free < self.disk + both:
            also = f" and the downloaded shards {both / 1e9:.2f} GB" if both else ""
            raise NoSpaceError(
                f"the result needs {self.disk / 1e9:.2f} GB{also}, and the disk has {self.disk_free / 1e9:.2f} GB free",
                where=str(target),
                hint="free some room, or choose an output on another disk" + (", or --drop-shards" if both else ""),
            )
        if self.cache and self.cache_free < self.cache:
            raise NoSpaceError(
                f"the shards need {self.cache / 1e9:.2f} GB in the hub's cache, whose disk has "
                f"{self.cache_free / 1e9:.2f} GB free",
                where=str(cache_folder()),
                hint="--drop-shards deletes each after its last use; HF_HOME names another place",
            )
        if not ignore_memory and self.memory_free is not None and self.memory_free < self.memory:
            raise NotEnoughMemoryError(
                f"the largest weights need {self.memory / 1e9:.2f} GB of memory more, "
                f"and {self.memory_free / 1e9:.2f} GB can be had",
                hint="fewer --jobs; end other programs; or --ignore-memory to try all the same",
            )


def memory_needed(held: Sequence[int], crew: Crew) -> int:
    """Bytes that tasks take at most: the largest ones, as many as run at a time."""
    return sum(sorted(held, reverse=True)[: crew.size])


def resident() -> tuple[int, int]:
    """Bytes that the process takes now, and the most it ever took."""
    try:
        text = Path("/proc/self/status").read_text()
        now, most = (int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) * 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[index]
    except (OSError, TypeError):
        return 500_000_000, 500_000_000  # what imports take, about
    return now, most


def memory_free(root: Path = Path("/")) -> int | None:
    """Bytes that the process can still have: what the system has, within the limits of its control groups.

    Pages of files count as free: the system gives them back. `root` stands for `/` in tests.
    """
    found = [*_system_free(root), *_group_free(root)]
    return max(min(found), 0) if found else None


def disk_free(folder: Path) -> int:
    """Bytes free on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def same_disk(one: Path, two: Path) -> bool:
    """Whether two folders, which need not exist yet, are on one disk."""
    return os.stat(_existing(one)).st_dev == os.stat(_existing(two)).st_dev


def cache_folder() -> Path:
    """Where huggingface_hub keeps what it downloads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(p for p in (folder, *folder.parents) if p.exists())


def _system_free(root: Path) -> Iterator[int]:
    found = re.search(r"MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo"))
    if found:
        yield int(found[1]) * 1024


def _group_free(root: Path) -> Iterator[int]:
    """What is left within each limit, of the process's own control group and of those around it."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        own = top / path.lstrip("/")
        for group in (own, *(p for p in own.parents if p.is_relative_to(top))):
            limit, used = (_text(group / name).strip() for name in names)
            if limit.isdigit() and used.isdigit() and int(limit) < _UNLIMITED:
                yield int(limit) - int(used) + _file_pages(group)


def _file_pages(group: Path) -> int:
    """Bytes of files that a group keeps in memory and would give back first."""
    found = re.search(r"^(?:total_)?inactive_file (\d+)$", _text(group / "memory.stat"), re.MULTILINE)
    return int(found[1]) if found else 0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
