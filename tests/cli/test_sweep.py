"""`llmquant sweep` as a user runs it: exit status, table, report, what a dry run says, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_commands import plain, run  # noqa: F401  (plain is a fixture)

from llmquant.study.store import Store

FEW = ("--context", "32", "--windows", "2", "--metrics", "quality,layers", "--threads", "1")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Many ways to say the same in fewer bits. " * 10)
    return path


def test_a_sweep_prints_a_table_and_writes_a_report(plain: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    out, bad = tmp_path / "out", tmp_path / "bad.yaml"
    bad.write_text("llmquant_recipe: 1\nweights: {no.such.weight: int8}\n")
    status, told, errors = run("sweep", plain, "--out", out, "--recipes", "int8,int4-g32", "--text", text, *FEW)
    assert status == 0, errors
    assert "int4-g32" in told and "16 bits" in told and "report.html" in told.replace("\n", "")
    assert (out / "report.html").stat().st_size > 10_000 and (out / "report.md").exists()
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == ["16 bits", "int8", "int4-g32"]
    status, told, errors = run("sweep", plain, "--out", out, "--recipes", f"int8,{bad}", "--text", text, *FEW)
    assert status == 1 and "no.such.weight" in errors and "failed" in told
    assert len(Store(out).journal()) == 1 + 2 * 2, "nothing was computed again"


def test_a_dry_run_lists_and_writes_nothing(plain: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    study, out = tmp_path / "mine.yaml", tmp_path / "out"
    study.write_text(f"models: [{plain}]\nrecipes: [int8, float8-2x4]\ntexts: [{text}]\nmetrics: [quality]\n")
    status, told, errors = run(
        "sweep", study, "--out", out, "--dry-run", "--context", "32", "--algorithms", "search,rtn"
    )
    assert status == 0, errors
    assert "to do: 1 reference, 3 quantize, 3 quality" in told and "float8-2x4 rtn" in told
    assert "left out: float8-2x4 with search" in errors.replace("\n", " ")
    assert "disk: about" in told and not out.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--recipes", "int8", "--engine", "slurm"], "no engine 'slurm'"),
        (["--recipes", "int9"], "unknown scheme"),
        ([], "nothing to try"),
        (["--recipes", "int8", "--metrics", "beauty"], "metrics[0]"),
        (["--recipes", "int8", "--text", "missing.txt"], "texts[0]"),
        (["--recipes", "int8", "--address", "a:1"], "--engine ray"),
    ],
)
def test_what_cannot_be_is_said(plain: Path, tmp_path: Path, options: list[str], said: str) -> None:  # noqa: F811
    status, _, errors = run("sweep", plain, "--out", tmp_path / "out", *options)
    assert status == 2 and said in " ".join(errors.split())


def test_a_locked_folder_says_who_holds_it(plain: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    with Store(tmp_path / "out").opened():
        status, _, errors = run("sweep", plain, "--out", tmp_path / "out", "--recipes", "int8", "--text", text, *FEW)
    assert status == 2 and f"process {os.getpid()}" in errors


@pytest.mark.slow
def test_ctrl_c_ends_workers_and_keeps_what_is_finished(plain: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out"
    options = ["--recipes", "int8,int4-g32", "--algorithms", "gptq", "--calib-tokens", "4096"]
    process = subprocess.Popen(
        [sys.executable, "-m", "llmquant", "sweep", str(plain), "--out", str(out), "--text", str(text), *options, *FEW],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert any(line.rstrip().endswith("reference") for line in process.stderr)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted; what is finished is kept" in rest
    assert [line["kind"] for line in Store(out).journal()] == ["reference"]
    with Store(out).opened():
        assert not list((out / "models").glob(".*"))
