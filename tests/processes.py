"""Two processes on this machine that talk through gloo, and what they bring back."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

COUNT, DEADLINE = 2, 120.0  # seconds; a run takes a few


def run(job: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """What `job(*args)` returns in each of the processes, which are one group; `folder` must be empty."""
    context = mp.start_processes(_work, (job, folder, args), nprocs=COUNT, join=False, start_method="spawn")
    end = time.monotonic() + DEADLINE
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, f"two processes did not end in {DEADLINE} s"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(COUNT)]


def _work(rank: int, job: Callable[..., Any], folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=COUNT)
    result = job(*args)
    torch.save(result, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
