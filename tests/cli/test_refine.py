"""`llmquant refine` through the real command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models import disk
from test_commands import plain, run  # noqa: F401  (a fixture)
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def quantized(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("refine") / "q"
    assert run("quantize", plain, "-o", folder, "--recipe", "int3-g32")[0] == 0
    return folder


def test_scales_change_and_codes_do_not(plain: Path, quantized: Path, tmp_path: Path) -> None:  # noqa: F811
    target, report = tmp_path / "r", tmp_path / "r.json"
    options = ["--calib-tokens", 2048, "--steps", 6, "--lr", "0.01", "--json", report]
    status, out, _ = run("refine", quantized, "--baseline", plain, "-o", target, *options)
    assert status == 0 and str(target) in out
    found = json.loads(report.read_text())
    assert found["best_step"] > 0 and 0 < found["kl_after"] < found["kl_before"]
    before, after = disk(quantized), disk(target)
    changed = {key for key in before if before[key][2] != after[key][2]}
    assert before.keys() == after.keys() and changed
    assert {key.rpartition(".")[2] for key in changed} <= {"weight_scale"}
    assert AutoTokenizer.from_pretrained(target)("abc") == AutoTokenizer.from_pretrained(plain)("abc")
    assert run("inspect", target)[0] == 0


def test_an_existing_folder_is_refused_before_anything_is_done(
    plain: Path,  # noqa: F811
    quantized: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "precious").write_text("x")
    status, _, err = run("refine", quantized, "--baseline", plain, "-o", tmp_path / "r")
    assert status == 2 and "overwrite" in err and (tmp_path / "r" / "precious").exists()


def test_a_plain_model_is_refused(plain: Path, tmp_path: Path) -> None:  # noqa: F811
    status, _, err = run("refine", plain, "--baseline", plain, "-o", tmp_path / "r", "--calib-tokens", 1024)
    assert status == 2 and "not quantized" in err and not (tmp_path / "r").exists()
