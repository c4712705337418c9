"""The scripts about large checkpoints run, and what they print can be believed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EVALS = Path(__file__).parents[2] / "evals"


def run(script: str, *arguments: str) -> list[dict]:
    """The JSON that it prints."""
    command = [sys.executable, str(EVALS / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    text = done.stdout.strip()
    return [json.loads(text)] if text.startswith("{\n") else [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_the_benchmark_of_streaming(tmp_path: Path) -> None:
    (found,) = run("bench/stream.py", str(tmp_path / "m"), "--size", "tiny", "--remove")
    assert 2e8 < found["peak_bytes"] < 8e8 and 0 < found["share"] < 1.2
    assert found["search_seconds"] < found["seconds"] and found["read_bytes"] > 2_000_000
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("full", [[], ["--full"]])
@pytest.mark.parametrize("way", ["stream", "gptq"])
def test_kills(way: str, full: list[str], tmp_path: Path) -> None:
    (found,) = run("robustness/kills.py", "--kills", "3", "--way", way, "--folder", str(tmp_path), *full)
    assert (found["attempts"], found["wrong"]) == (3, 0) and sum(found["found"].values()) >= 3
    assert os.listdir(tmp_path) == []
