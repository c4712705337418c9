"""The published flow (quantizer, prepare, calibrate, convert, torch.compile) with nothing but its imports changed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from flow import sqnr
from test_lowering import needs_onednn
from torch import Tensor, nn

import llmquant.pt2e as xiq
from llmquant.pt2e import _ops, convert_pt2e, prepare_pt2e


def linears() -> tuple[nn.Module, Tensor]:
    """Two products with a relu between them."""
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)), torch.randn(8, 32)


def images() -> tuple[nn.Module, Tensor]:
    """A convolution, a batch norm that is folded, and a linear."""
    convolution = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(convolution, nn.Flatten(), nn.Linear(16 * 8 * 8, 10)), torch.randn(2, 3, 8, 8)


def calls(code: list[str]) -> Counter[str]:
    """How often generated code, Python or C++, calls each int8 kernel; asserts name kernels, too, and are no calls."""
    pattern = re.compile(r"(?:onednn\.|aoti_torch_cpu__)(qlinear|qconv)_pointwise\w*[.\w]*\(")
    return Counter(pattern.findall("\n".join(code)))


@needs_onednn
@pytest.mark.slow
@pytest.mark.parametrize("cpp_wrapper", [False, True], ids=["python", "cpp"])
@pytest.mark.parametrize(
    ("make", "is_dynamic", "wanted"),
    [
        (linears, False, {"qlinear": 2}),
        (linears, True, {"qlinear": 2}),
        (images, False, {"qlinear": 1, "qconv": 1}),
    ],
    ids=["linears-static", "linears-dynamic", "images-static"],
)
def test_torch_compile_of_a_converted_graph(
    make: Callable[[], tuple[nn.Module, Tensor]], is_dynamic: bool, wanted: dict[str, int], cpp_wrapper: bool
) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    model, example = make()
    model = model.eval()
    with torch.no_grad():
        exported_model = torch.export.export(model, (example,)).module()
        quantizer = xiq.X86InductorQuantizer()
        quantizer.set_global(xiq.get_default_x86_inductor_quantization_config(is_dynamic=is_dynamic))
        prepared_model = prepare_pt2e(exported_model, quantizer)
        prepared_model(example)
        converted_model = convert_pt2e(prepared_model)
        with _ops.freezing(cpp_wrapper=cpp_wrapper):
            optimized_model = torch.compile(converted_model)
            found, code = _ops.run_and_get_code(optimized_model, example)
        assert calls(code) == wanted
        assert sqnr(converted_model(example), found) > 40
        assert 25 < sqnr(model(example), found) < 60
