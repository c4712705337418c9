"""A sweep killed at random moments and gone on with finds what an uninterrupted one finds, bit for bit."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llmquant.study.store import Store

KILLS, SEED = 20, 7
QUALITY = ("label", "perplexity", "kl", "top1", "delta_p_rms", "nonfinite", "layers", "protocol", "keys")


def command(plain: Path, text: Path, out: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "llmquant", "sweep", str(plain), "--out", str(out), "--threads", "1"),
        *(
            "--recipes",
            "int8,int4-g32,int3-g32,nf4",
            "--algorithms",
            "search,gptq",
            "--metrics",
            "quality,noise,layers",
        ),
        *("--text", str(text), "--context", "32", "--windows", "3", "--calib", str(text), "--calib-tokens", "256"),
    ]


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def killed(arguments: list[str], seconds: float) -> bool:
    """Whether the sweep was killed, so many seconds after it began to work; else it had ended."""
    process = start(arguments)
    assert process.stderr is not None
    line = next((line for line in process.stderr if b"steps" in line), b"")
    assert line, "it ended before it had a plan"
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    return process.returncode == -9


def quality(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert all(line["status"] == "done" for line in lines)
    return [{name: line[name] for name in QUALITY} for line in lines]


@pytest.mark.slow
def test_twenty_kills_change_no_bit(plain: Path, text: Path, tmp_path: Path) -> None:
    whole = command(plain, text, tmp_path / "whole")
    assert not killed(whole, 600)
    wanted = quality(tmp_path / "whole")
    assert len(wanted) == 10
    moments, kills, rounds, again = random.Random(SEED), 0, 0, Counter[str]()
    while kills < KILLS:
        out = tmp_path / f"killed-{rounds}"
        while kills < KILLS and killed(command(plain, text, out), moments.uniform(0, 12)):
            kills += 1
        assert not killed(command(plain, text, out), 600)
        assert quality(out) == wanted, f"after {kills} kills"
        found = Counter(line["key"] for line in Store(out).journal() if line["kind"] in ("quality", "reference"))
        again.update({key: count for key, count in found.items() if count > 1})
        rounds += 1
    assert not again, "what was finished was computed again"
    with Store(tmp_path / "killed-0").opened():
        pass
