"""`--dry-run` and the progress of `llmquant quantize`, through the real command line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from models import Folders
from rich.console import Console

from llmquant.cli.main import main
from llmquant.cli.progress import Rate, describe, duration, lines
from llmquant.quantize import Item


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of a command."""
    monkeypatch.setattr("sys.argv", ["llmquant", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
        raise SystemExit(0)
    out = capsys.readouterr()
    return int(end.value.code or 0), out.out, out.err


def test_a_dry_run_writes_nothing(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    arguments = ("quantize", str(folders("llama-tied")), "-o", out, "--recipe", "int4-g32", "--dry-run")
    status, text, _ = run(capsys, monkeypatch, *arguments)
    assert status == 0 and not list(tmp_path.iterdir())
    for word in ("int4-g32", "in float", "kept in float:", "memory:", "disk:", "1 files"):
        assert word in text
    status, text, _ = run(capsys, monkeypatch, *arguments, "--json", "-")
    plan = json.loads(text)
    assert status == 0 and plan["bytes_after"] < plan["bytes_before"] and plan["needs"]["disk"] == plan["bytes_after"]


@pytest.mark.parametrize("options", [("--bits", "4"), ("--rotate", "hadamard")])
def test_what_a_dry_run_cannot_know_is_refused(
    options: tuple[str, str], folders: Folders, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, _, text = run(
        capsys, monkeypatch, "quantize", str(folders("llama")), "-o", "never-made", "--dry-run", *options
    )
    assert status == 2 and "--dry-run" in text


class Clock:
    """A clock that is moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_line_has_bytes_tensors_rate_and_time_left() -> None:
    clock = Clock()
    rate = Rate(clock)
    assert describe(0, 4_000_000_000, Item("a", 0, 200), rate) == "0%  0 B of 4.00 GB, 0 of 200 tensors"
    clock.now = 10.0
    text = describe(1_000_000_000, 4_000_000_000, Item("b", 50, 200), rate)
    assert text == "25%  1.00 GB of 4.00 GB, 50 of 200 tensors, 100.0 MB/s, 30 s left"
    assert describe(3, 4, "step", Rate(clock)) == "75%"


def test_what_an_earlier_run_did_is_no_speed() -> None:
    clock = Clock()
    rate = Rate(clock)
    rate.at(900, 1000)
    clock.now = 10.0
    assert rate.at(950, 1000) == (5.0, 10.0)


def test_lines_are_no_flood() -> None:
    clock, text = Clock(), io.StringIO()
    with lines("Quantizing", Console(file=text, width=200), clock) as report:
        for i in range(10_000):
            clock.now += 0.01  # 100 s in all
            report(i, 10_000, f"w{i}")
    found = text.getvalue().splitlines()
    assert 9 <= len(found) <= 11
    assert all(line.startswith("Quantizing: ") and " left" in line for line in found)


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59, 61, 3599, 3600, 11_220)] == [
        "0 s",
        "59 s",
        "1:01 min",
        "59:59 min",
        "1:00 h",
        "3:07 h",
    ]
