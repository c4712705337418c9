"""Lowering: every product of a hand-made converted graph becomes int8, says what the graph says, and is counted."""

from __future__ import annotations

import pytest
import torch
from handmade import converted, exported
from torch import Tensor, fx, nn

from llmquant.errors import LoweringError
from llmquant.primitives.metrics import compute_error
from llmquant.pt2e import _ops
from llmquant.pt2e.lowering import lower

QLINEAR, QCONV = "onednn.qlinear_pointwise", "onednn.qconv_pointwise"
TOKEN = "llmquant.linear_int8"

needs_onednn = pytest.mark.skipif(not (_ops.has_onednn() and _ops.has_vnni()), reason="needs oneDNN and VNNI")


class Mlp(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(48, 96, bias=bias)
        self.down = nn.Linear(96, 32, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Words(nn.Module):
    """An embedding, a product as GPT-2 writes it, and a head without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 24)
        self.weight = nn.Parameter(torch.randn(24, 40) * 0.1)
        self.bias = nn.Parameter(torch.randn(40))
        self.head = nn.Linear(40, 7, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = torch.addmm(self.bias, x.view(-1, 24), self.weight)
        return self.head(torch.nn.functional.gelu(x))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=4, bias=False)
        self.head = nn.Linear(16 * 8 * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(x)))
        return self.head(x.view(x.shape[0], -1))


def targets(module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


def leftovers(module: fx.GraphModule) -> list[str]:
    """Products with weights of floats, and dequantize nodes."""
    return [name for name in targets(module) if name in ("aten.linear.default", "aten.addmm.default") or "dequ" in name]


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_linears_become_int8_and_say_the_same(mode: str, bias: bool, dtype: torch.dtype) -> None:
    model, x = Mlp(bias).to(dtype), torch.randn(2, 5, 48).to(dtype)
    m = converted(model, x, mode=mode)
    before = [str(node) for node in m.graph.nodes]
    lowered, report = lower(m, strict=True)
    assert report.int8 == {"up": QLINEAR, "down": QLINEAR}
    assert sum("qlinear_pointwise" in name for name in targets(lowered)) == 2 and not leftovers(lowered)
    wanted = m(x)
    assert lowered(x).dtype == wanted.dtype == dtype
    assert compute_error(wanted, lowered(x)) > (38 if dtype == torch.bfloat16 or mode == "dynamic" else 60)
    assert [str(node) for node in m.graph.nodes] == before


@needs_onednn
def test_relu_and_codes_for_the_next_product_are_done_by_the_kernel() -> None:
    lowered, _ = lower(converted(Mlp(), torch.randn(4, 48)))
    names = targets(lowered)
    assert names.count("quantized_decomposed.quantize_per_tensor.default") == 1 and "aten.relu.default" not in names
    first = next(node for node in lowered.graph.nodes if "qlinear_pointwise" in str(node.target))
    assert torch.uint8 in first.args and "relu" in first.args


@needs_onednn
def test_codes_of_seven_bits_are_not_left_to_the_kernel_which_knows_eight_only() -> None:
    x = torch.randn(64, 48)
    m = converted(Mlp(), x, quant_max=127)
    lowered, _ = lower(m)
    assert targets(lowered).count("quantized_decomposed.quantize_per_tensor.default") == 2
    assert compute_error(m(3 * x), lowered(3 * x)) > 60  # larger than what was calibrated: codes are clamped


@needs_onednn
def test_any_shape_of_input_where_the_graph_has_symbols() -> None:
    rows = torch.export.Dim("rows", min=2, max=64)
    m = converted(Mlp(), torch.randn(4, 48), mode="dynamic", dynamic_shapes=({0: rows},))
    lowered, _ = lower(m)
    for count in (2, 7, 33):
        x = torch.randn(count, 48)
        assert lowered(x).shape == (count, 32)
        assert compute_error(m(x), lowered(x)) > 38


@needs_onednn
@pytest.mark.parametrize("mode", ["static", "dynamic", "token"])
def test_embedding_and_addmm(mode: str) -> None:
    tokens = torch.randint(0, 50, (3, 6))
    m = converted(Words(), tokens, mode=mode)
    lowered, report = lower(m, strict=True)
    kernel = TOKEN if mode == "token" else QLINEAR
    assert dict(report.kernels) == {"int8 rows": 1, kernel: 2}
    assert compute_error(m(tokens), lowered(tokens)) > (38 if mode == "dynamic" else 60)


def test_rows_of_an_embedding_are_what_the_graph_says_exactly() -> None:
    tokens = torch.randint(0, 50, (3, 6))
    for dtype in (torch.float32, torch.bfloat16):
        m = converted(nn.Sequential(nn.Embedding(50, 24)).to(dtype), tokens)
        lowered, report = lower(m, strict=True)
        assert list(report.int8.values()) == ["int8 rows"]
        assert torch.equal(m(tokens), lowered(tokens)) and lowered(tokens).dtype == dtype
        assert not any(t.is_floating_point() and t.numel() > 50 for t in lowered.buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["token", "token-asym"])
def test_tokens_with_scales_of_their_own_run_on_this_librarys_kernels(mode: str, dtype: torch.dtype) -> None:
    model, x = Mlp().to(dtype), torch.randn(2, 5, 48).to(dtype)
    m = converted(model, x, mode=mode)
    lowered, report = lower(m, strict=True)
    assert report.int8 == {"up": TOKEN, "down": TOKEN} and not leftovers(lowered)
    assert lowered(x).dtype == dtype
    assert compute_error(m(x), lowered(x)) > 38


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    x = torch.randn(6, 48)
    x[0] *= 1000
    lowered, _ = lower(converted(Mlp(), x, mode="token"))
    torch.testing.assert_close(lowered(x)[1:], lowered(x[1:].repeat(2, 1)[:6])[:5], rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_convolutions(mode: str) -> None:
    x = torch.rand(2, 3, 16, 16)
    m = converted(Convolutions(), x, mode=mode)
    lowered, report = lower(m, strict=True)
    assert report.int8 == {"first": QCONV, "second": QCONV, "head": QLINEAR}
    assert compute_error(m(x), lowered(x)) > (38 if mode == "dynamic" else 60)


def test_signed_codes_are_refused_with_the_reason() -> None:
    m = converted(Mlp(), torch.randn(4, 48), signed=True)
    lowered, report = lower(m)
    assert not report.int8 and set(report.refused) == {"up", "down"}
    assert "signed" in report.refused["up"]
    torch.testing.assert_close(lowered(torch.ones(4, 48)), m(torch.ones(4, 48)))
    with pytest.raises(LoweringError, match="signed"):
        lower(m, strict=True)


def test_a_float_graph_has_nothing_to_lower() -> None:
    m = exported(Mlp(), torch.randn(4, 48))
    lowered, report = lower(m)
    assert set(report.floating) == {"up", "down"} and not report.refused
    assert torch.equal(lowered(torch.ones(4, 48)), m(torch.ones(4, 48)))
    with pytest.raises(LoweringError, match="nothing"):
        lower(m, strict=True)


@pytest.mark.parametrize(("part", "lacking"), [("has_onednn", "oneDNN"), ("has_vnni", "VNNI")])
def test_without_the_kernels_the_graph_stays_as_it_is_and_says_so(
    monkeypatch: pytest.MonkeyPatch, part: str, lacking: str
) -> None:
    monkeypatch.setattr(_ops, part, lambda: False)
    x = torch.randn(4, 48)
    m = converted(Mlp(), x)
    lowered, report = lower(m)
    assert lacking in report.refused["up"] and "up" in str(report)
    assert torch.equal(lowered(x), m(x))
    report = lower(converted(Mlp(), x, quant_max=127))[1]
    assert bool(report.int8) is (part == "has_vnni" and _ops.has_onednn())
    assert lower(converted(Mlp(), x, mode="token"))[1].int8  # which needs neither


@needs_onednn
def test_weights_that_nothing_reads_any_more_are_gone() -> None:
    lowered, _ = lower(converted(Mlp(), torch.randn(4, 48)))
    assert not [name for name, _ in lowered.named_parameters()]
    assert all(tensor.is_mkldnn or tensor.dim() == 1 for tensor in lowered.buffers())
    assert not lowered.state_dict()


def _weight_node(m: fx.GraphModule) -> fx.Node:
    return next(node for node in m.graph.nodes if node.target is _ops.dequantize_per_channel)


@pytest.mark.parametrize("case", ["zero points", "axis", "no input"])
def test_codes_that_no_kernel_takes_are_refused(case: str) -> None:
    x = torch.randn(4, 48)
    m = converted(Mlp(), x)
    node = _weight_node(m)
    match case:
        case "zero points":
            m.linear_zero_point.fill_(3)
        case "axis":
            node.args = (*node.args[:3], 1, *node.args[4:])
            m.linear_scale = m.linear_scale[:48].clone()
            m.linear_zero_point = m.linear_zero_point[:48].clone()
        case "no input":
            product = next(iter(node.users))
            product.args = (next(n for n in m.graph.nodes if n.op == "placeholder"), *product.args[1:])
    m.recompile()
    lowered, report = lower(m)
    said = {"zero points": "zero points", "axis": "dimension 1", "no input": "its input is not quantized"}[case]
    assert said in report.refused["up"]
    torch.testing.assert_close(lowered(x), m(x), rtol=1e-5, atol=1e-5)
