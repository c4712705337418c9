"""Weights that bring along the scale of their inputs: products use it, and no other token has a say in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import STATIC, Case, input_stats, make_weight
from layouts import COLUMNS, LAYOUTS, ROWS, Layout
from test_activation import ALONG_COLUMNS, KEEPING, MODES
from torch import Tensor, nn

from llmquant.errors import CalibrationError
from llmquant.kernels import ops
from llmquant.primitives.dynamic import FLOAT8, Activation
from llmquant.primitives.stats import InputStats
from llmquant.quantize import quantize_weight
from llmquant.tensor import QuantizedTensor

every_case = pytest.mark.parametrize("case", STATIC, ids=str)


def quantized(case: Case, at: Layout = LAYOUTS[0]) -> QuantizedTensor:
    return case.quantize(make_weight(at.shape) * 3, at.transposed)


def rounded(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """What x means in codes of the weight's scale, by the rule in plain torch."""
    activation, scale = weight.meta.activation, weight.act_scale
    if activation.dtype == FLOAT8:
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    zero = weight.act_zero_point.float() if activation.asymmetric else torch.zeros(())
    low = -128 if activation.asymmetric else -127
    return ((x / scale).round().add(zero).clamp(low, 127) - zero) * scale


@every_case
@pytest.mark.parametrize("name", ALONG_COLUMNS)
def test_products_round_their_input_by_the_scale(name: str, case: Case) -> None:
    weight, x, bias = quantized(case), torch.randn(3, COLUMNS) * 2, torch.randn(ROWS)
    seen = rounded(x, weight)
    assert 0.002 < (seen - x).norm() / x.norm() < 0.3  # and some are beyond what the scale reaches
    wanted = seen @ weight.dequantize().T + bias
    for mode in MODES:
        with mode():
            torch.testing.assert_close(ALONG_COLUMNS[name](x, bias, weight), wanted, rtol=1e-4, atol=1e-4)


@every_case
def test_a_token_does_not_depend_on_its_neighbours(case: Case) -> None:
    weight, x = quantized(case), torch.randn(4, COLUMNS)
    alone = F.linear(x[:1], weight)
    x[1:] *= 1e6
    x[3, 5] = torch.nan
    together = F.linear(x, weight)
    torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-5)
    assert together[:3].isfinite().all() and together[3].isnan().all()


@every_case
def test_each_expert_has_a_scale_of_its_own(case: Case) -> None:
    weight, x = quantized(case, LAYOUTS[2]), torch.randn(3, 4, COLUMNS)
    assert weight.act_scale.shape == (3, 1, 1) and len(weight.act_scale.unique()) == 3
    wanted = torch.stack([rounded(x[i], weight[i]) @ weight[i].dequantize().T for i in range(3)])
    torch.testing.assert_close(torch.bmm(x, weight.mT), wanted, rtol=1e-4, atol=1e-4)


@every_case
@pytest.mark.parametrize("at", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", [name for name in KEEPING if name != "columns"])
def test_no_operation_forgets_it(name: str, at: Layout, case: Case) -> None:
    weight = quantized(case, at)
    found = KEEPING[name](weight, at)
    assert isinstance(found, QuantizedTensor) and found.meta.activation == weight.meta.activation
    assert [f.name for f, _ in found.parts()] == [f.name for f, _ in weight.parts()]
    if name != "empty_like":
        assert torch.equal(found.act_scale, weight.act_scale)


@every_case
def test_true_bytes_count_it(case: Case) -> None:
    weight = quantized(case)
    plain = Case(case.scheme.split("-", 2 if "-asym-" in case.scheme else 1)[-1]).quantize(weight.dequantize())
    assert weight.nbytes == plain.nbytes + 4 + (weight.act_zero_point is not None)


@every_case
def test_compiles_without_graph_breaks(case: Case) -> None:
    layer = nn.Linear(COLUMNS, ROWS)
    layer.weight = nn.Parameter(quantized(case), requires_grad=False)
    x = torch.randn(4, COLUMNS)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x))


@every_case
def test_gradients_go_straight_through(case: Case) -> None:
    weight, x = quantized(case), torch.randn(3, COLUMNS, requires_grad=True)
    (F.linear(x, weight) * torch.arange(1.0, ROWS + 1)).sum().backward()
    wanted = (torch.arange(1.0, ROWS + 1) @ weight.dequantize()).expand(3, -1)
    torch.testing.assert_close(x.grad, wanted, rtol=1e-4, atol=1e-4)


@every_case
def test_a_trained_scale_of_the_weight_meets_rounded_inputs(case: Case) -> None:
    weight, x = quantized(case), torch.randn(3, COLUMNS)
    weight.scale = weight.scale.float().requires_grad_()
    F.linear(x, weight).sum().backward()
    found, weight.scale.grad = weight.scale.grad.clone(), None
    (rounded(x, weight) @ weight.dequantize().T).sum().backward()
    torch.testing.assert_close(found, weight.scale.grad, rtol=1e-3, atol=1e-3)


@every_case
def test_products_of_several_layers_join_where_they_share_their_input(case: Case) -> None:
    weight = quantized(case)
    other = quantize_weight(
        make_weight((ROWS, COLUMNS), seed=1), case.config, input_stats(make_weight((ROWS, COLUMNS)) * 3)
    )
    assert torch.equal(weight.act_scale, other.act_scale)
    x = torch.randn(2, COLUMNS)
    joined = F.linear(x, torch.cat([weight, other]))
    torch.testing.assert_close(joined, torch.cat([F.linear(x, weight), F.linear(x, other)], -1), rtol=1e-5, atol=1e-5)


BAD: dict[str, InputStats | None] = {
    "none": None,
    "no range": InputStats(),
    "zeros": InputStats(low=torch.tensor(0.0), high=torch.tensor(0.0)),
    "not finite": InputStats(low=torch.tensor(-1.0), high=torch.tensor(torch.inf)),
    "one an expert, of a matrix": InputStats(low=-torch.ones(3), high=torch.ones(3)),
}


@every_case
@pytest.mark.parametrize("name", BAD)
def test_what_gives_no_scale_is_refused(name: str, case: Case) -> None:
    with pytest.raises(CalibrationError):
        quantize_weight(make_weight((ROWS, COLUMNS)), case.config, BAD[name])


@every_case
def test_a_product_wants_all_of_the_scale_or_nothing(case: Case) -> None:
    weight, x = quantized(case), torch.randn(2, COLUMNS)
    packed, activation, static = weight.packed(), weight.meta.activation, weight.static_scale
    wrong: list[Any] = [
        (activation, None),
        (activation, static._replace(scale=static.scale.half())),
        (activation, static._replace(scale=static.scale.expand(2, 1))),
        (activation, static._replace(zero_point=None if activation.asymmetric else torch.zeros(1, dtype=torch.int8))),
        (Activation(0, activation.asymmetric, activation.dtype), static),
    ]
    for asked, given in wrong:
        with pytest.raises(RuntimeError, match="does not go with"):
            ops.linear_as(x, packed, asked, None, given)
