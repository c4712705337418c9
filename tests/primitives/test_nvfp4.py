"""NVFP4: the two levels of scales by the published formulas, subnormal ones among them, and the search over codes."""

from __future__ import annotations

import pytest
import torch
from cases import make_weight

from llmquant.algorithms.rtn import rtn
from llmquant.algorithms.search import search
from llmquant.config.named import NVFP4WeightOnlyConfig
from llmquant.errors import UnsupportedOpError
from llmquant.primitives.metrics import compute_error
from llmquant.quantize import quantize_weight

PLAIN, SEARCHED = NVFP4WeightOnlyConfig(search=False), NVFP4WeightOnlyConfig()


def test_scales_are_those_of_the_formulas() -> None:
    """s_t = amax / (448 * 6), s_b = e4m3(amax_b / 6 / s_t): code for code, but where a quotient lies on a midpoint."""
    plain = make_weight((64, 160))
    weight = quantize_weight(plain, PLAIN)
    tensor_scale = plain.abs().max() / (448 * 6)
    assert weight.tensor_scale.shape == (1, 1) and weight.tensor_scale.item() == tensor_scale.item()
    exact = plain.reshape(64, 10, 16).abs().amax(-1).double() / 6 / tensor_scale.double()
    expected = exact.float().clamp(max=448).to(torch.float8_e4m3fn)
    assert weight.scale.shape == (64, 10) and weight.scale_dtype == torch.float8_e4m3fn
    assert torch.equal(weight.scale, expected.view(torch.uint8))
    assert weight.scale.max() == 0x7E  # 448: the largest block uses all of the range


def test_each_expert_has_a_tensor_scale() -> None:
    plain = make_weight((3, 8, 64)) * torch.tensor([1.0, 1e3, 1e-6]).reshape(3, 1, 1)
    weight = quantize_weight(plain, SEARCHED)
    assert weight.tensor_scale.shape == (3, 1, 1)
    assert torch.equal(weight.tensor_scale, plain.abs().amax((1, 2), keepdim=True) / 2688)
    for i in range(3):
        assert float(compute_error(plain[i], weight[i].dequantize())) > 20


def test_subnormal_scales_are_kept() -> None:
    """Blocks whose scale lies below 2^-6, the smallest normal e4m3 number, down to a third of the smallest at all."""
    plain = torch.zeros(1, 160)
    plain[0, 0] = 2688.0  # the tensor scale is 1
    for i, scale in enumerate((2.0**-6, 7 * 2.0**-9, 3 * 2.0**-9, 2.0**-9), start=1):
        plain[0, 16 * i : 16 * (i + 1)] = 6 * scale
    plain[0, 80:96] = 2.0**-10  # below half of the smallest scale times 6, but not below half of it
    weight = quantize_weight(plain, SEARCHED)
    assert weight.scale[0, 1:5].tolist() == [8, 7, 3, 1]
    assert torch.equal(weight.dequantize(), plain)
    assert weight.scale[0, 5] == 1


@pytest.mark.parametrize("factor", [1e-40, 1e-30, 1.0, 1e30, 1e40])
def test_the_size_of_weights_does_not_matter(factor: float) -> None:
    plain = make_weight((16, 64)).double().mul(factor).clamp(-3e38, 3e38).float()
    found = quantize_weight(plain, SEARCHED).dequantize()
    assert found.isfinite().all()
    if factor in (1e-30, 1.0, 1e30):
        assert 21 < float(compute_error(plain, found)) < 23


def test_the_weight_itself_does_not_change() -> None:
    """A float32 weight needs no conversion, so dividing by the tensor scale must not happen in place."""
    plain = make_weight((16, 64))
    before = plain.clone()
    quantize_weight(plain, PLAIN)
    assert torch.equal(plain, before)


def test_search_is_never_worse_than_the_rule() -> None:
    rows, weights = make_weight((64, 128), seed=1) * 1e4, make_weight((64, 128), seed=2).abs()
    spec = SEARCHED.spec(64, 128)
    errors = []
    for algorithm in (rtn, search):
        found = algorithm(rows, weights, spec)
        values = spec.format.numerics.decode(found.codes.reshape(64, 8, 16), found.qparams, spec.format)
        errors.append(((values - rows.reshape(64, 8, 16)).square() * weights.reshape(64, 8, 16)).sum(-1))
    assert (errors[1] <= errors[0]).all() and (errors[1] < errors[0]).float().mean() > 0.5


@pytest.mark.parametrize("sigma", [0.02, 0.005])
def test_normal_weights_keep_their_signal(sigma: float) -> None:
    """Without a tensor scale those of 0.005 would keep 6.9 dB. Two-sided: too good is wrong, too."""
    plain = make_weight((256, 2048)) * (sigma / 0.02)
    assert 20.3 < float(compute_error(plain, quantize_weight(plain, PLAIN).dequantize())) < 20.6
    assert 21.6 < float(compute_error(plain, quantize_weight(plain, SEARCHED).dequantize())) < 21.9


# --- the tensor scale in operations -----------------------------------------------------------------------


def test_matrices_of_two_tensor_scales_do_not_become_one() -> None:
    a, b = (quantize_weight(make_weight((4, 64), seed=i), PLAIN) for i in (0, 1))
    for dim in (0, 1):
        with pytest.raises(UnsupportedOpError, match="tensor_scale"):
            torch.cat([a, b], dim)
    stack = quantize_weight(make_weight((3, 4, 64)), PLAIN)
    joined = torch.cat([stack, stack[:1]])
    assert torch.equal(joined.dequantize(), torch.cat([stack.dequantize(), stack.dequantize()[:1]]))
    with pytest.raises(UnsupportedOpError):
        stack.view(12, 64)
    assert torch.equal(stack.view(3, 1, 4, 64)[2, 0].dequantize(), stack[2].dequantize())


# Tensors made in inference mode do not count what is written to their insides.
@pytest.mark.parametrize(("field", "inference"), [("scale", 0), ("tensor_scale", 0), ("all", 0), ("all", 1)])
def test_kernels_see_what_was_written_last(field: str, inference: int) -> None:
    """They get scales of both levels multiplied, which are kept: writing must make those void."""
    with torch.inference_mode(bool(inference)):
        weight = quantize_weight(make_weight((8, 64)), PLAIN)
        other = quantize_weight(make_weight((8, 64), seed=1) * 3, PLAIN)
        x = torch.randn(2, 64)
        torch.nn.functional.linear(x, weight)
        if field == "all":
            weight.copy_(other)
        else:
            getattr(weight, field).copy_(getattr(other, field))
        expected = weight.clone().dequantize()
        torch.testing.assert_close(torch.nn.functional.linear(x, weight), x @ expected.T)
