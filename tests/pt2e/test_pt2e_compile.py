"""Compiled graphs: int8 kernels are in the generated code, and it says what the graph says."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from handmade import converted, exported
from test_lowering import Convolutions, Mlp, Words, needs_onednn
from torch import Tensor, nn

from llmquant.primitives.metrics import compute_error
from llmquant.pt2e import _ops
from llmquant.pt2e.compilation import Compiled, compile
from llmquant.pt2e.lowering import lower

_CALL = re.compile(
    r"torch\.ops\.(onednn\.\w+_pointwise|llmquant\.linear_int8)\.\w+\(|_(qlinear|qconv2d)_pointwise\w*\("
)


def calls(code: list[str]) -> Counter[str]:
    """How often the generated code calls each int8 kernel."""
    return Counter(first or f"onednn.{second}_pointwise" for first, second in _CALL.findall("\n".join(code)))


def first_call(compiled: Compiled, x: Tensor) -> tuple[Tensor, Counter[str]]:
    torch._dynamo.reset()
    y, code = _ops.run_and_get_code(compiled, x)
    return y, calls(code)


def as_input(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def test_graphs_are_lowered_first_and_lowered_ones_are_taken_as_they_are() -> None:
    m = converted(Mlp(), torch.randn(4, 48))
    compiled = compile(m)
    assert compiled.report is not None and len(compiled.report.int8) == 2
    lowered, _ = lower(m)
    assert compile(lowered).lowered is lowered
    assert not compile(exported(Mlp(), torch.randn(4, 48))).report


@needs_onednn
def test_settings_hold_for_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as config

    seen = []

    def spy(module: nn.Module) -> object:
        return lambda x: seen.append((config.freezing, config.cpp_wrapper, torch.is_grad_enabled())) or module(x)

    monkeypatch.setattr(torch, "compile", spy)
    compiled = compile(converted(Mlp(), torch.randn(4, 48)), cpp_wrapper=True)
    x = torch.randn(4, 48, requires_grad=True)
    for _ in range(2):
        assert not compiled(x).requires_grad
    assert seen == [(True, True, False)] * 2 and not config.freezing and torch.is_grad_enabled()


@needs_onednn
@pytest.mark.slow
@pytest.mark.parametrize("cpp_wrapper", [False, True], ids=["python", "cpp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["static", "dynamic", "token"])
def test_linears_in_generated_code(mode: str, dtype: torch.dtype, cpp_wrapper: bool) -> None:
    x = torch.randn(4, 48).to(dtype)
    compiled = compile(converted(Mlp().to(dtype), x, mode=mode), cpp_wrapper)
    y, found = first_call(compiled, x)
    kernel = "llmquant.linear_int8" if mode == "token" else "onednn.qlinear_pointwise"
    if mode == "token" and cpp_wrapper:
        assert compiled.report is not None and compiled.report.kernels[kernel] == 2
    else:
        assert found == {kernel: 2}
    assert compute_error(compiled.lowered(x), y) > 30


@needs_onednn
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_convolutions_and_words_in_generated_code(mode: str) -> None:
    for model, x, wanted in (
        (Convolutions(), torch.rand(2, 3, 16, 16), {"onednn.qconv_pointwise": 2, "onednn.qlinear_pointwise": 1}),
        (Words(), torch.randint(0, 50, (3, 6)), {"onednn.qlinear_pointwise": 2}),
    ):
        compiled = compile(converted(model, x, mode=mode))
        y, found = first_call(compiled, x)
        assert {kind.replace("conv2d", "conv"): count for kind, count in found.items()} == wanted
        assert compute_error(compiled.lowered(x), y) > 30


@needs_onednn
@pytest.mark.slow
def test_other_shapes_are_compiled_with_the_same_settings() -> None:
    rows = torch.export.Dim("rows", min=2, max=64)
    compiled = compile(converted(Mlp(), torch.randn(4, 48), mode="dynamic", dynamic_shapes=({0: rows},)))
    torch._dynamo.reset()
    for count in (8, 5, 33):
        x = torch.randn(count, 48)
        assert compute_error(compiled.lowered(x), compiled(x)) > 38
