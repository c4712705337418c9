"""NF4: the code book by the paper and by what bitsandbytes publishes, rounding, and double quantization."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch
from cases import NF4, make_weight

from llmquant.algorithms.rtn import rtn
from llmquant.algorithms.search import search
from llmquant.config.named import NF4WeightOnlyConfig
from llmquant.errors import UnsupportedOpError
from llmquant.formats import FORMATS
from llmquant.primitives import nf4
from llmquant.primitives.metrics import compute_error
from llmquant.primitives.spec import QParams
from llmquant.quantize import quantize_weight

PLAIN, SEARCHED = NF4WeightOnlyConfig(search=False), NF4WeightOnlyConfig()
FORMAT = FORMATS["nf4"]
ONE = QParams(torch.ones(1, 1))

# Where bitsandbytes' kernels (`dQuantizeNF4`) go from one code to the next: `x > boundary` takes the upper one.
BOUNDARIES = [-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984]
BOUNDARIES += [-0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668]
BOUNDARIES += [0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011]


def decoded(codes: torch.Tensor) -> torch.Tensor:
    return nf4.decode(codes.to(torch.uint8).reshape(1, 1, -1), ONE, FORMAT).flatten()


def encoded(x: torch.Tensor, qparams: QParams = ONE) -> torch.Tensor:
    return nf4.encode(x.reshape(1, 1, -1), qparams, FORMAT).flatten()


def test_values_are_those_published() -> None:
    assert decoded(torch.arange(16)).tolist() == torch.tensor(NF4).tolist()


def test_values_are_quantiles_of_the_normal_distribution() -> None:
    """Seven below zero and eight above, each half between 1/2 and the paper's 1 - (1/32 + 1/30) / 2."""
    last = 1 - (1 / 32 + 1 / 30) / 2
    above = [NormalDist().inv_cdf(0.5 + (last - 0.5) * i / 8) for i in range(1, 9)]
    below = [-NormalDist().inv_cdf(0.5 + (last - 0.5) * i / 7) for i in range(7, 0, -1)]
    expected = torch.tensor([*below, 0.0, *above], dtype=torch.float64) / above[-1]
    torch.testing.assert_close(decoded(torch.arange(16)).double(), expected, rtol=0, atol=1e-6)


def test_codes_change_where_bitsandbytes_changes_them() -> None:
    boundaries = torch.tensor(BOUNDARIES)
    assert encoded(boundaries).tolist() == list(range(15))  # a boundary itself belongs to the lower code
    assert encoded(boundaries.nextafter(torch.tensor(2.0))).tolist() == list(range(1, 16))
    assert encoded(boundaries.nextafter(torch.tensor(-2.0))).tolist() == list(range(15))


def test_codes_are_the_nearest() -> None:
    x = torch.linspace(-1.5, 1.5, 6001)
    distances = (x.double()[:, None] - torch.tensor(NF4, dtype=torch.float64)).abs()
    chosen = distances.gather(1, encoded(x).long()[:, None]).squeeze(1)
    assert torch.all(chosen <= distances.amin(1) + 1e-7)


@pytest.mark.parametrize("scale", [0.37, 255.0, 3.0])
def test_every_code_survives_a_round_trip(scale: float) -> None:
    qparams = QParams(torch.full((1, 1), scale))
    values = nf4.decode(torch.arange(16, dtype=torch.uint8).reshape(1, 1, -1), qparams, FORMAT)
    assert encoded(values, qparams).tolist() == list(range(16))


# --- scales -----------------------------------------------------------------------------------------------------


def test_without_double_quantization_a_scale_is_the_largest_magnitude() -> None:
    plain = make_weight((8, 160))
    weight = quantize_weight(plain, NF4WeightOnlyConfig(double_quant=False, scale_dtype=torch.float32, search=False))
    expected = torch.stack([part.abs().amax(-1) for part in plain.split(64, 1)], 1)
    assert torch.equal(weight.scale, expected)
    assert weight.row_scale is None and weight.meta.block == (1, 64)


def test_double_quantization_follows_its_formula() -> None:
    plain = make_weight((64, 160))
    weight = quantize_weight(plain, PLAIN)
    row_scale = plain.abs().amax(1, keepdim=True) / 255
    largest = torch.stack([part.abs().amax(-1) for part in plain.split(64, 1)], 1)
    assert weight.scale_dtype == torch.uint8 and torch.equal(weight.row_scale, row_scale)
    assert torch.equal(weight.scale.double(), (largest / row_scale).round().double())
    assert weight.scale.amax(1).eq(255).all()  # the largest block of each row has the largest scale


def test_blocks_far_below_their_row_keep_a_scale() -> None:
    plain = torch.zeros(1, 192)
    plain[0, 0], plain[0, 64] = 255.0, 0.1
    weight = quantize_weight(plain, PLAIN)
    assert weight.scale.tolist() == [[255, 1, 0]]
    values = weight.dequantize()
    assert values[0, 0] == 255 and abs(values[0, 64] - 0.1) < 0.03 and not values[0, 128:].any()


def test_bytes_are_real() -> None:
    double, single = (quantize_weight(make_weight((16, 4096)), NF4WeightOnlyConfig(flag)) for flag in (True, False))
    assert double.nbytes == 16 * (2048 + 64 + 4)  # 4.13 bits a weight
    assert single.nbytes == 16 * (2048 + 2 * 64)


@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
def test_the_size_of_weights_does_not_matter(factor: float) -> None:
    plain = make_weight((16, 256)) * factor
    assert 20.5 < float(compute_error(plain, quantize_weight(plain, SEARCHED).dequantize())) < 22


@pytest.mark.parametrize("double_quant", [True, False])
def test_normal_weights_keep_their_signal(double_quant: bool) -> None:
    """Eight bits a scale cost less than 0.01 dB. Two-sided: too good is wrong, too."""
    plain = make_weight((256, 2048))
    for found, low, high in ((False, 20.70, 20.77), (True, 21.30, 21.37)):
        weight = quantize_weight(plain, NF4WeightOnlyConfig(double_quant, search=found))
        assert low < float(compute_error(plain, weight.dequantize())) < high


@pytest.mark.parametrize("double_quant", [True, False])
def test_search_is_never_worse_than_the_rule(double_quant: bool) -> None:
    rows, weights = make_weight((64, 128), seed=1) * 3000, make_weight((64, 128), seed=2).abs()
    spec = NF4WeightOnlyConfig(double_quant).spec(64, 128)
    errors = []
    for algorithm in (rtn, search):
        found = algorithm(rows, weights, spec)
        values = nf4.decode(found.codes.reshape(64, 2, 64), found.qparams, spec.format)
        errors.append(((values - rows.reshape(64, 2, 64)).square() * weights.reshape(64, 2, 64)).sum(-1))
    assert (errors[1] <= errors[0]).all() and (errors[1] < errors[0]).float().mean() > 0.5


# --- the scale of a row in operations -----------------------------------------------------------------------------


def test_rows_take_their_scale_along() -> None:
    """Each row has a size of its own, so that a row with another's scale would be far off."""
    plain = make_weight((6, 128)) * torch.logspace(-3, 2, 6)[:, None]
    weight, values = quantize_weight(plain, PLAIN), quantize_weight(plain, PLAIN).dequantize()
    assert torch.equal(weight[1:4].dequantize(), values[1:4])
    assert torch.equal(weight[torch.tensor([5, 0])].dequantize(), values[[5, 0]])
    assert torch.equal(weight[:, 64:].dequantize(), values[:, 64:])
    assert torch.equal(torch.cat([weight[:2], weight[4:]]).dequantize(), values[[0, 1, 4, 5]])
    assert torch.equal(torch.cat([weight[:, :64], weight[:, 64:]], 1).dequantize(), values)


def test_columns_of_other_rows_do_not_join() -> None:
    a, b = (quantize_weight(make_weight((4, 128), seed=i), PLAIN) for i in (0, 1))
    with pytest.raises(UnsupportedOpError, match="row_scale"):
        torch.cat([a, b], 1)


def test_a_part_of_the_columns_is_not_written_to() -> None:
    a, b = (quantize_weight(make_weight((4, 128), seed=i), PLAIN) for i in (0, 1))
    before = a.dequantize()
    with pytest.raises(UnsupportedOpError, match="shares scales"):
        a[:, :64].copy_(b[:, :64])
    assert torch.equal(a.dequantize(), before)
    a[1:3].copy_(b[1:3])
    assert torch.equal(a.dequantize(), torch.cat([before[:1], b.dequantize()[1:3], before[3:]]))


@pytest.mark.parametrize("field", ["scale", "row_scale"])
def test_kernels_see_what_was_written_last(field: str) -> None:
    weight, other = quantize_weight(make_weight((8, 64)), PLAIN), quantize_weight(make_weight((8, 64), seed=1), PLAIN)
    x = torch.randn(2, 64)
    torch.nn.functional.linear(x, weight)
    getattr(weight, field).copy_(getattr(other, field) // 2 if field == "scale" else getattr(other, field) * 2)
    torch.testing.assert_close(torch.nn.functional.linear(x, weight), x @ weight.clone().dequantize().T)
