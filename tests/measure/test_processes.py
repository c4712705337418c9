from pathlib import Path
from typing import Any

import processes as two
import pytest
import torch
from models import build
from torch import Tensor

from llmquant.errors import LlmQuantError
from llmquant.measure.evaluate import score, summarize
from llmquant.measure.processes import Processes, processes
from llmquant.measure.reference import Reference


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_windows_are_shared_out_whole_and_in_order(count: int) -> None:
    windows = torch.arange(7 * 3).view(7, 3)
    shares = [Processes(rank, count).share(windows) for rank in range(count)]
    assert torch.equal(torch.cat(shares), windows)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_process_without_windows_is_an_error() -> None:
    with pytest.raises(LlmQuantError, match="2 windows cannot be shared out to 3"):
        Processes(2, 3).share(torch.zeros(2, 3))


def test_one_process_meets_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with processes() as group:
        assert group == Processes(0, 1) and group.everyones("value") == ["value"]
    assert not torch.distributed.is_initialized()


def test_processes_that_never_come_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an environment that says so little that nobody can be met."""
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LlmQuantError, match="2 processes did not meet"), processes():
        pass


def _windows() -> Tensor:
    return torch.randint(3, 128, (5, 24), generator=torch.Generator().manual_seed(0))


def _evaluated(group: Processes) -> Any:
    share = group.share(_windows())
    with Reference.compute(build("llama", seed=1), share) as reference:
        tokens, rows = score(build("llama", seed=2), share, reference)
    return summarize(group.join(tokens), rows, 0.0)


def _shared() -> Any:
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return _evaluated(Processes(rank, count))


@pytest.mark.slow
def test_the_evaluation_of_two_is_that_of_one_in_both(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = _evaluated(Processes())
    finally:
        torch.set_num_threads(threads)
    assert two.run(_shared, tmp_path) == [one, one]
