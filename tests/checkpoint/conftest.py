"""Saved tiny models, made once, and one thread: it is enough for them, and threads in each other's way are slow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from models import Folders


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
