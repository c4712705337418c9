"""The script that measures quantization-aware training: it runs, and counts right. Its figure is in the README."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "evals" / "quality"
TINY = ["--width", "32", "--steps", "3", "--extra", "2", "--batch", "2", "--context", "16", "--windows", "8"]


def test_a_short_run_says_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import qat as script  # type: ignore[import-not-found]

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    (tmp_path / "test.txt").write_text("pack my box with five dozen liquor jugs\n" * 20)
    result = tmp_path / "results.jsonl"
    options = [
        "--train",
        str(text),
        "--test",
        str(tmp_path / "test.txt"),
        "--scheme",
        "int2-g32",
        "--json",
        str(result),
    ]
    monkeypatch.setattr(sys, "argv", ["qat.py", *options, *TINY])
    script.main()
    found = json.loads(result.read_text())
    assert found["recovered"] == pytest.approx((found["PTQ"] - found["QAT"]) / (found["PTQ"] - found["float"]))
    assert 100 < found["float"] < 400 and len({found[name] for name in ("float", "PTQ", "QAT", "base")}) == 4
    assert f"= {found['recovered']:.3f}" in capsys.readouterr().out


def test_a_text_alone_is_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import qat as script  # type: ignore[import-not-found]

    (tmp_path / "text.txt").write_text("abcde" * 200)
    monkeypatch.setattr(sys, "argv", ["qat.py", "--train", str(tmp_path / "text.txt"), "--context", "10"])
    learned, windows = script.texts(script.parse_options())
    assert len(learned) == 800 and windows.shape == (20, 10)
