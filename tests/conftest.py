"""What all tests share: the same random numbers on every run, and the saved tiny models of `models`."""

from __future__ import annotations

import os
import signal

# One thread: on tiny tensors more only wait for each other, on a busy machine for long. Processes that tests start too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from models import folders

# A shell that starts tests in the background has them ignore Ctrl-C, and what they start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)
__all__ = ["folders"]  # saved tiny models of many families, made once

settings.register_profile("llmquant", deadline=None, derandomize=True, database=None)
settings.load_profile("llmquant")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
