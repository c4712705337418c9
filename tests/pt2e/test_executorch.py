"""ExecuTorch programs, run by its own runtime. Skipped without the package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from handmade import converted, exported
from torch import nn

from llmquant.errors import ExportError, MissingDependencyError
from llmquant.primitives.metrics import compute_error
from llmquant.pt2e.export import executorch


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "executorch", None)
    for name in [name for name in __import__("sys").modules if name.startswith("executorch.")]:
        monkeypatch.setitem(__import__("sys").modules, name, None)
    x = torch.randn(4, 64)
    with pytest.raises(MissingDependencyError, match="executorch"):
        executorch.export_executorch(converted(model(), x, mode="dynamic", signed=True), (x,), tmp_path / "m.pte")
    with pytest.raises(MissingDependencyError, match="executorch"):
        executorch.run_executorch(tmp_path / "m.pte", x)


def test_xnnpack_takes_all_of_it_and_says_the_same(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    net, x = model(), torch.randn(4, 64)
    m = converted(net, x, mode="dynamic", signed=True)
    report = executorch.export_executorch(m, (x,), tmp_path / "m.pte")
    plain = executorch.export_executorch(exported(net, x), (x,), tmp_path / "plain.pte")
    assert report.delegates == 1 and not report.left
    assert report.bytes == (tmp_path / "m.pte").stat().st_size < plain.bytes / 2.5
    (y,) = executorch.run_executorch(tmp_path / "m.pte", x)
    assert compute_error(m(x).detach(), y) > 38 and 28 < compute_error(net(x).detach(), y) < 55


@pytest.mark.parametrize("options", [{}, {"signed": True}], ids=["unsigned", "floats between"])
def test_what_xnnpack_does_not_take_is_refused(options: dict[str, bool], tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    x = torch.randn(4, 64)
    with pytest.raises(ExportError, match="XNNPACK"):
        executorch.export_executorch(converted(model(), x, **options), (x,), tmp_path / "m.pte")
    assert not list(tmp_path.iterdir())
