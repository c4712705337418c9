"""One evaluation split over processes: `accelerate launch -m llmquant eval ...`, `torchrun -m llmquant eval ...`.

Both set `RANK`, `WORLD_SIZE` and where to meet in each process's environment. Every process runs its share of the
windows, by the baseline and by the model; only numbers per token are exchanged. Windows know nothing of each other, so
the result is that of one process, bit for bit where each computes with as many threads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmquant.errors import LlmQuantError
from llmquant.measure.tokens import Tokens

PATIENCE = timedelta(hours=1)
"""How long to wait for another process to reach the same point. One that has died is noticed at once."""

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that share an evaluation.

    Attributes:
        rank: 0 is the one that reports.
        count: of all.
    """

    rank: int = 0
    count: int = 1

    def share(self, windows: Tensor) -> Tensor:
        """The windows of this process, [W / count, T] of [W, T]: a run of neighbours, the first processes one more.

        Raises:
            LlmQuantError: fewer windows than processes.
        """
        if len(windows) < self.count:
            what = f"{len(windows)} windows cannot be shared out to {self.count} processes"
            raise LlmQuantError(what, where="--windows", hint="more windows, a longer text, or fewer processes")
        return windows.tensor_split(self.count)[self.rank]

    def join(self, tokens: Tokens) -> Tokens:
        """The tokens of all processes, in the order of the windows, in every process."""
        return Tokens.join(self.everyones(tokens))

    def everyones(self, value: T) -> list[T]:
        """The values of all processes, by rank, in every process.

        Raises:
            LlmQuantError: another process has failed, or did not come within `PATIENCE`.
        """
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        try:
            torch.distributed.all_gather_object(values, value)
        except RuntimeError as error:
            what = f"process {self.rank} waited for the others in vain: {str(error).splitlines()[0]}"
            raise LlmQuantError(what, hint="see what the other processes printed, or use fewer of them") from error
        return values


@contextmanager
def processes() -> Iterator[Processes]:
    """Meet the processes that this one was started with, if there are any.

    Raises:
        LlmQuantError: some are missing.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    began = not torch.distributed.is_initialized()
    if began:
        try:
            torch.distributed.init_process_group("gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise LlmQuantError(f"the {count} processes did not meet: {str(error).splitlines()[0]}") from error
    try:
        yield Processes(torch.distributed.get_rank(), count)
    finally:
        if began:
            torch.distributed.destroy_process_group()
