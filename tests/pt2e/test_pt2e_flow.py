"""From a model to int8 by the public names: quantizers, lowering, files, debugging, together."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lowering import QLINEAR, TOKEN, Convolutions, Words, needs_onednn
from test_pt2e_compare import Two
from torch import Tensor, fx, nn

from llmquant.primitives.metrics import compute_error
from llmquant.pt2e import (
    X86Quantizer,
    XNNPACKQuantizer,
    convert_pt2e,
    get_default_x86_inductor_quantization_config,
    get_symmetric_quantization_config,
    lower,
    prepare_pt2e,
)
from llmquant.pt2e.compare import compare
from llmquant.pt2e.export.executorch import export_executorch, run_executorch
from llmquant.pt2e.export.onnx import export_onnx
from llmquant.pt2e.sensitivity import skip_list


def quantized(model: nn.Module, x: Tensor, quantizer: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The float graph and the converted one."""
    program = torch.export.export(model.eval(), (x,))
    prepared = prepare_pt2e(program.module(), quantizer)
    prepared(x)
    return program.module(), convert_pt2e(prepared)


def x86(**options: Any) -> Any:
    return X86Quantizer().set_global(get_default_x86_inductor_quantization_config(**options))


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("options", "kernel"),
    [({}, QLINEAR), ({"is_dynamic": True}, QLINEAR), ({"is_dynamic": True, "per_token": True}, TOKEN)],
    ids=["static", "dynamic", "token"],
)
def test_every_product_of_a_quantizer_is_lowered(options: dict[str, bool], kernel: str, dtype: torch.dtype) -> None:
    x = torch.randn(16, 32).to(dtype)
    reference, m = quantized(Two().to(dtype), x, x86(**options))
    lowered, report = lower(m, strict=True)
    assert list(report.int8.values()) == [kernel] * 4
    assert lowered(x).dtype == dtype
    assert compute_error(m(x), lowered(x)) > 35
    assert 20 < compute_error(reference(x), lowered(x)) < 55


@needs_onednn
def test_words_and_convolutions_with_the_quantizer_as_it_comes() -> None:
    for model, x in ((Words(), torch.randint(0, 50, (3, 6))), (Convolutions(), torch.rand(2, 3, 16, 16))):
        _, m = quantized(model, x, X86Quantizer())
        lowered, report = lower(m, strict=True)
        assert len(report.int8) == 3
        assert compute_error(m(x), lowered(x)) > 35


@needs_onednn
def test_a_saved_program_is_lowered_after_loading() -> None:
    x = torch.randn(16, 32)
    _, m = quantized(Two(), x, X86Quantizer())
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(m, (x,)), buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    assert torch.equal(loaded(x), m(x))
    lowered, report = lower(loaded, strict=True)
    assert len(report.int8) == 4 and "blocks.0.up" in report.int8
    assert torch.equal(lowered(x), lower(m)[0](x))


def test_a_skip_list_goes_back_into_the_quantizer() -> None:
    model, x = Two(), torch.randn(64, 32)
    reference, m = quantized(model, x, X86Quantizer())
    before = {error.name: error.sqnr for error in compare(reference, m, x)}["output"]
    found = skip_list(reference, m, x, target=before + 2)
    assert 0 < len(found.names) < 4
    quantizer = X86Quantizer()
    for name in found.names:
        quantizer.set_module_name(name, None)
    _, mixed = quantized(model, x, quantizer)
    after = {error.name: error.sqnr for error in compare(reference, mixed, x)}["output"]
    assert after == pytest.approx(found.score, abs=0.3) and after > before + 1.7
    assert set(lower(mixed)[1].floating) == set(found.names)


def test_onnx_of_a_quantizers_graph(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    x = torch.randn(16, 32)
    for options in ({}, {"is_dynamic": True}):
        _, m = quantized(Two(), x, x86(**options, reduce_range=False))
        report = export_onnx(m, (x,), tmp_path / "m.onnx", "integer")
        session = runtime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert report.integer == 4 and not report.floating
        assert compute_error(m(x), torch.from_numpy(y)) > 35


@pytest.mark.parametrize("dynamic", [True, False])
def test_executorch_of_a_quantizers_graph(dynamic: bool, tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    net, x = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)), torch.randn(16, 64)
    config = get_symmetric_quantization_config(is_dynamic=dynamic)
    reference, m = quantized(net, x, XNNPACKQuantizer().set_global(config))
    assert not lower(m)[1].int8  # signed codes are not for x86
    report = export_executorch(m, (x,), tmp_path / "m.pte")
    (y,) = run_executorch(report.path, x)
    assert report.delegates == 1 and compute_error(m(x), y) > 35 and 25 < compute_error(reference(x), y) < 55
