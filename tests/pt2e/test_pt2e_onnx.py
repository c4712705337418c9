"""ONNX files of converted graphs: checked by onnx, run by ONNX Runtime, the same outputs, and really in int8."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import converted, exported
from test_lowering import Convolutions, Mlp, Words
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmquant.errors import ConfigError, ExportError
from llmquant.primitives.metrics import compute_error
from llmquant.pt2e.export.onnx import export_onnx
from llmquant.pt2e.lowering import lower

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")


def run(path: Path, x: Tensor, profile: Path | None = None) -> tuple[Tensor, Counter[str]]:
    """What ONNX Runtime gives, and how often it ran each operator, where a place for its profile is given."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    ran: Counter[str] = Counter()
    if profile is not None:
        events = json.loads(Path(session.end_profiling()).read_text())
        ran.update(e["args"]["op_name"] for e in events if e.get("cat") == "Node" and "op_name" in e.get("args", {}))
    return torch.from_numpy(y), ran


CASES: list[tuple[type[nn.Module], Tensor]] = [
    (Mlp, torch.randn(2, 4, 48, generator=torch.Generator().manual_seed(1))),
    (Mlp, torch.randn(4, 48, generator=torch.Generator().manual_seed(2))),
    (Words, torch.arange(18).reshape(3, 6)),
]


@pytest.mark.parametrize(("model", "x"), CASES, ids=["3d", "2d", "words"])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("form", ["qdq", "integer"])
def test_onnx_runtime_says_what_the_graph_says(
    model: type[nn.Module], x: Tensor, mode: str, form: str, tmp_path: Path
) -> None:
    m = converted(model(), x, mode=mode)
    report = export_onnx(m, (x,), tmp_path / "m.onnx", form)
    proto = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert proto.opset_import[0].version == 21
    assert len(report.floating) == (2 if form == "qdq" else 0) and report.integer == 2 - len(report.floating)
    y, ran = run(tmp_path / "m.onnx", x, tmp_path / "profile" if form == "integer" else None)
    wanted = m(x).detach()
    assert float((y - wanted).abs().max() / wanted.abs().max()) < 1e-3 or compute_error(wanted, y) > 38
    if form == "integer":
        assert ran["MatMulIntegerToFloat"] + ran["DynamicQuantizeMatMul"] == 2
        assert not ran["MatMul"] and not ran["Gemm"] and not ran["FusedMatMul"]
    assert [file.name for file in tmp_path.iterdir() if "profile" not in file.name] == ["m.onnx"]


def test_one_linear_within_a_thousandth(tmp_path: Path) -> None:
    x = torch.randn(16, 96)
    m = converted(nn.Sequential(nn.Linear(96, 64)), x)
    for form in ("qdq", "integer"):
        export_onnx(m, (x,), tmp_path / form, form)
        y, _ = run(tmp_path / form, x)
        wanted = m(x).detach()
        assert float((y - wanted).norm() / wanted.norm()) < 1e-3


class Logits(nn.Module):
    """A small Llama with random weights, as a function of ids."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        self.model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_a_whole_llama_agrees_to_35_db(mode: str, tmp_path: Path) -> None:
    ids = torch.randint(0, 64, (1, 16), generator=torch.Generator().manual_seed(1))
    m = converted(Logits(), ids, mode=mode)
    report = export_onnx(m, (ids,), tmp_path / "m", "integer")
    assert report.integer == 15  # seven products a layer, and the head
    assert compute_error(m(ids).detach(), run(tmp_path / "m", ids)[0]) > 35


def test_convolutions_keep_their_pairs(tmp_path: Path) -> None:
    x = torch.rand(2, 3, 16, 16)
    m = converted(Convolutions(), x)
    report = export_onnx(m, (x,), tmp_path / "m.onnx", "integer")
    assert report.integer == 1 and report.dequantized >= 4
    assert compute_error(m(x).detach(), run(tmp_path / "m.onnx", x)[0]) > 60


def test_codes_are_what_is_on_disk(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)), torch.randn(4, 256)
    plain = sum(p.nbytes for p in model.parameters())
    for form in ("qdq", "integer"):
        report = export_onnx(converted(model, x), (x,), tmp_path / form, form)
        assert report.bytes == report.path.stat().st_size < plain / 3.5


def test_shapes_with_symbols(tmp_path: Path) -> None:
    rows = torch.export.Dim("rows", min=2, max=64)
    m = converted(Mlp(), torch.randn(4, 48), dynamic_shapes=({0: rows},))
    export_onnx(m, (torch.randn(4, 48),), tmp_path / "m", "integer", dynamic_shapes=({0: rows},))
    x = torch.randn(9, 48)
    assert compute_error(m(x).detach(), run(tmp_path / "m", x)[0]) > 60


@pytest.mark.parametrize("case", ["form", "seven bits", "tokens", "lowered", "sixteen bits"])
def test_what_cannot_be_said_is_refused_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    x, options, model = torch.randn(4, 48), {}, Mlp()
    if case == "seven bits":
        options = {"quant_max": 127}
    if case == "tokens":
        options = {"mode": "token"}
    if case == "sixteen bits":
        model, x = model.bfloat16(), x.bfloat16()
    m: Any = converted(model, x, **options)
    if case == "lowered":
        m = lower(m)[0]
    with pytest.raises(ConfigError if case == "form" else ExportError):
        export_onnx(m, (x,), tmp_path / "m.onnx", "other" if case == "form" else "qdq")
    assert not list(tmp_path.iterdir())


def test_a_float_graph_stays_one(tmp_path: Path) -> None:
    x = torch.randn(4, 48)
    m = exported(Mlp(), x)
    report = export_onnx(m, (x,), tmp_path / "m", "integer")
    assert report.integer == report.dequantized == 0 and len(report.floating) == 2
    assert compute_error(m(x).detach(), run(tmp_path / "m", x)[0]) > 90
