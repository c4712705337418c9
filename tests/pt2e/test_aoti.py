"""AOTInductor packages of converted graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from handmade import converted
from test_lowering import Mlp, needs_onednn

from llmquant.errors import ExportError
from llmquant.primitives.metrics import compute_error
from llmquant.pt2e.export.aoti import export_aoti, load_aoti


@needs_onednn
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_a_package_runs_in_int8_and_says_the_same(mode: str, tmp_path: Path) -> None:
    x = torch.randn(4, 48)
    m = converted(Mlp(), x, mode=mode)
    report = export_aoti(m, (x,), tmp_path / "m.pt2")
    assert report.int8 == 2 and report.bytes == (tmp_path / "m.pt2").stat().st_size
    assert compute_error(m(x).detach(), load_aoti(tmp_path / "m.pt2")(x)) > 38
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt2"]


@pytest.mark.parametrize("case", ["token", "signed", "ending"])
def test_what_would_run_as_floats_is_refused(case: str, tmp_path: Path) -> None:
    x = torch.randn(4, 48)
    m = converted(Mlp(), x, mode="token" if case == "token" else "static", signed=case == "signed")
    with pytest.raises(ExportError):
        export_aoti(m, (x,), tmp_path / ("m.so" if case == "ending" else "m.pt2"))
    assert not list(tmp_path.iterdir())
