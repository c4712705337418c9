"""`quantize_weight` and `quantize_`: what must hold whatever the format, and what the report must say."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from cases import ALL_CASES, DTYPES, ELEMENT_BITS, ONE_PER_FORMAT, SHAPES, Case, make_weight
from models import Folders, load
from torch import Tensor, nn

from llmquant.config.base import WeightOnlyConfig
from llmquant.config.named import Float8WeightOnlyConfig
from llmquant.config.schemes import parse_scheme
from llmquant.errors import AlreadyQuantizedError, BadWeightError, NothingToQuantizeError
from llmquant.primitives.granularity import MappingType, PerGroup, PerTensor
from llmquant.primitives.metrics import compute_error
from llmquant.primitives.stats import InputStats
from llmquant.quantize import QuantizationReport, check_weight, quantize_, quantize_weight
from llmquant.quantize import model as quantize_model
from llmquant.quantize import weight as quantize_matrix
from llmquant.tensor import QuantizedTensor

every_case = pytest.mark.parametrize("case", ALL_CASES, ids=str)
every_format = pytest.mark.parametrize("case", ONE_PER_FORMAT, ids=str)
PER_TENSOR = [case for case in ALL_CASES if "-tensor" in case.scheme]


def tensors(weight: QuantizedTensor) -> dict[str, Tensor]:
    return {field.name: tensor for field, tensor in weight.parts()}


# --- one weight -------------------------------------------------------------------------------------------


@every_case
def test_shape_dtype_and_error(case: Case) -> None:
    for shape, dtype in [*zip(SHAPES, (*DTYPES, *DTYPES), strict=False), ((7, 70), torch.float16)]:
        plain = make_weight(shape, dtype)
        before = plain.clone()
        weight = case.quantize(plain)
        assert torch.equal(plain, before)
        assert weight.shape == shape and weight.dtype == dtype and weight.meta.format == case.format.name
        assert weight.scale_dtype == case.config.scale_dtype and not weight.requires_grad
        # No element is farther away than the block's largest magnitude (one bit: than the mean, at most that).
        error = (weight.dequantize(torch.float32) - plain.float()).abs()
        assert float(error.max()) <= float(plain.abs().max()) * 1.01


@every_case
def test_chunks_make_no_difference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_weight((9, 70))
    whole = case.quantize(plain)
    for elements in (1, 210):
        monkeypatch.setattr(quantize_matrix, "_CHUNK_ELEMENTS", elements)
        monkeypatch.setattr(quantize_matrix, "_SMALLEST_CHUNK", elements)
        assert torch.equal(case.quantize(plain), whole)


@every_case
def test_experts_are_quantized_one_by_one(case: Case) -> None:
    plain = make_weight((3, 6, 70))
    plain[1] *= 10  # so that parameters shared between experts would show
    stack = case.quantize(plain)
    for i in range(3):
        assert torch.equal(stack[i], case.quantize(plain[i]))


@every_case
@pytest.mark.parametrize("shape", [(6, 70), (3, 6, 70)], ids=str)
def test_a_transposed_weight_is_the_same_logical_matrix(case: Case, shape: tuple[int, ...]) -> None:
    plain = make_weight(shape)
    straight = case.quantize(plain)
    turned = case.quantize(plain.mT.contiguous(), transposed=True)
    assert turned.shape == plain.mT.shape and turned.meta.transposed
    assert torch.equal(turned.mT, straight)
    assert torch.equal(turned.dequantize(), straight.dequantize().mT)


@every_case
def test_memory_order_makes_no_difference(case: Case) -> None:
    plain = make_weight((70, 6)).t()
    assert not plain.is_contiguous()
    assert torch.equal(case.quantize(plain), case.quantize(plain.contiguous()))


@every_case
def test_quantizing_what_was_quantized_loses_little_more(case: Case) -> None:
    plain = make_weight((8, 96))
    once = case.quantize(plain).dequantize()
    twice = case.quantize(once).dequantize()
    lost = float(compute_error(plain, once))
    assert float(compute_error(once, twice)) > lost - 1 or torch.equal(once, twice)


@pytest.mark.parametrize("case", [c for c in ONE_PER_FORMAT if "search" in c.format.algorithms], ids=str)
def test_statistics_serve_the_columns_they_name(case: Case) -> None:
    plain = make_weight((64, 64), seed=3)
    stats = torch.where(torch.arange(64) % 8 == 0, 1e4, 1.0)
    without, found = case.quantize(plain), quantize_weight(plain, case.config, InputStats(stats))

    def error(weight: QuantizedTensor) -> float:
        return float(((weight.dequantize() - plain).square() * stats).sum())

    # Of the three powers of two that are tried, statistics often pick the same.
    assert error(found) < error(without) or (case.format.scale_rules and error(found) == error(without))
    flat = quantize_weight(plain, case.config, InputStats(torch.ones(64)))
    assert float(compute_error(plain, flat.dequantize())) == pytest.approx(
        float(compute_error(plain, without.dequantize())), abs=0.5
    )


@every_case
def test_zeros_and_constants(case: Case) -> None:
    assert torch.equal(case.quantize(torch.zeros(3, 70)).dequantize(), torch.zeros(3, 70))
    for value in (0.5, -0.03):
        plain = torch.full((3, 70), value)
        found = case.quantize(plain).dequantize()
        mantissa_bits = ELEMENT_BITS[case.format.name][1] if case.format.scale_rules else 8
        if case.config.scale_bits:
            mantissa_bits = 6  # codes of scales are 63 or more here, and off by at most a half
        if case.format.storage == "semisparse":
            plain[:, torch.arange(70) % 4 >= 2] = 0  # of equals the first are kept
        torch.testing.assert_close(found, plain, rtol=2.0 ** -(mantissa_bits + 1), atol=0)


def test_nothing_remembers_the_plain_weight() -> None:
    plain = make_weight((6, 64)).requires_grad_()
    weight = Case("int8").quantize(plain)
    before = weight.clone()
    with torch.no_grad():
        plain.zero_()
    assert torch.equal(weight, before) and weight.grad_fn is None


# --- one scale for a tensor -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PER_TENSOR, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_scale_for_a_tensor(case: Case, dtype: torch.dtype) -> None:
    plain = make_weight((7, 70), dtype)
    weight = case.quantize(plain)
    assert weight.scale.shape == (1, 1) and weight.meta.block == (7, 70)
    lost = float(compute_error(plain, weight.dequantize(torch.float32)))
    bits = case.format.bits
    low, high = {1: (0, 5), 2: (5, 9.6), 3: (10, 15), 4: (16, 21), 5: (22, 27)}.get(bits, (25, 46))
    if not (bits == 1 and case.asymmetric):
        assert low < lost < high


@pytest.mark.parametrize("case", PER_TENSOR, ids=str)
def test_one_scale_ignores_no_row(case: Case) -> None:
    """The largest magnitude may lie anywhere."""
    for row in (0, 3, 6):
        plain = make_weight((7, 70))
        plain[row, 5] = 1.0
        weight = case.quantize(plain)
        if case.format.bits >= 4:
            assert float(weight.dequantize()[row, 5]) == pytest.approx(1.0, rel=0.2)


@pytest.mark.parametrize("name", ["float8", "float8-e5m2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float8_scales_are_the_largest_magnitude_over_the_largest_number(name: str, dtype: torch.dtype) -> None:
    largest = {"float8": 448.0, "float8-e5m2": 57344.0}[name]
    plain = make_weight((7, 70), dtype)
    magnitude = plain.float().abs()
    assert torch.equal(Case(f"{name}-row").quantize(plain).scale, magnitude.amax(1, keepdim=True) / largest)
    assert Case(f"{name}-tensor").quantize(plain).scale.item() == float(magnitude.max() / largest)


@pytest.mark.parametrize("sign", [1, -1])
def test_one_scale_is_chosen_for_the_exact_extremes(sign: int) -> None:
    """In bfloat16 the largest magnitude here would round down, and it would be clipped."""
    plain = make_weight((7, 70))
    plain[5, 3] = sign * (0.5 + 2**-11)
    assert Case("float8-tensor").quantize(plain).scale.item() == pytest.approx((0.5 + 2**-11) / 448, rel=1e-6)
    largest = WeightOnlyConfig("int8", PerTensor(), algorithm="rtn")
    assert float(quantize_weight(plain, largest).dequantize()[5, 3]) == float(plain[5, 3])


# --- bits -------------------------------------------------------------------------------------------------


def bits_per_weight(scheme: str, columns: int) -> float:
    plain = make_weight((32, columns))
    return Case(scheme).quantize(plain).nbytes * 8 / plain.numel()


def test_bits_per_weight_count_scales_and_zero_points() -> None:
    assert bits_per_weight("int4-g64", 576) == 4.25
    assert 4.25 < bits_per_weight("int4-g64-asym", 576) <= 4.33
    assert bits_per_weight("int4-g32", 576) == 4.5
    assert bits_per_weight("int3-g32", 576) == 3.5
    assert bits_per_weight("int4", 576) == pytest.approx(4 + 5 * 16 / 576)  # a tail group of 64
    assert bits_per_weight("int8", 576) == pytest.approx(8 + 32 / 576)
    assert bits_per_weight("float8", 576) == pytest.approx(8 + 32 / 576)
    assert bits_per_weight("int1-g32", 576) == 1.5


# --- weights that cannot be quantized ---------------------------------------------------------------------


def with_value(value: float, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    def make() -> Tensor:
        weight = make_weight((4, 64)).to(dtype)
        weight[2, 33] = value
        return weight

    return make


BAD: dict[str, tuple[Callable[[], Tensor], str, str]] = {
    "NaN": (with_value(float("nan")), "int4-g32", "NaN"),
    "infinite": (with_value(float("inf")), "int4-g32", "infinite"),
    "minus infinite": (with_value(float("-inf"), torch.bfloat16), "float8", "infinite"),
    "NaN in an expert": (lambda: torch.stack([make_weight((4, 64)), with_value(float("nan"))()]), "int8", "NaN"),
    "empty": (lambda: torch.empty(0, 64), "int4-g32", "empty"),
    "no columns": (lambda: torch.empty(4, 0), "int8", "empty"),
    "meta": (lambda: torch.empty(4, 64, device="meta"), "int4-g32", "meta"),
    "integers": (lambda: torch.ones(4, 64, dtype=torch.int64), "int4-g32", "int64"),
    "one dimension": (lambda: torch.ones(64), "int4-g32", "1-D"),
    "four dimensions": (lambda: torch.ones(2, 2, 4, 64), "int4-g32", "4-D"),
    "too large for a float16 scale": (with_value(1e6), "int4-g32", "float16"),
    "too large, negative": (with_value(-1e6, torch.bfloat16), "int4-g32", "scale_dtype=float32"),
    "too large for one bit": (with_value(4e4), "int1-g32", "float16"),
    "too large with a zero point": (with_value(1.1e5), "int2-g32-asym", "float16"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_weights_are_refused_with_their_reason(name: str) -> None:
    make, scheme, text = BAD[name]
    with pytest.raises(BadWeightError, match=text):
        quantize_weight(make(), parse_scheme(scheme))
    with pytest.raises(BadWeightError, match=r"layer\.7"):
        check_weight(make(), parse_scheme(scheme), "layer.7")


@pytest.mark.parametrize("case", [c for c in ALL_CASES if "-g32" in c.scheme], ids=str)
def test_every_weight_that_is_accepted_has_finite_and_sensible_values(case: Case) -> None:
    """Just below what is refused, whichever way it is lopsided, no scale overflows."""
    reach = 65504 * case.format.numerics.largest_scaled(case.format)
    for low, high in ((-0.99, 0.99), (0, 0.99), (-0.99, 0)):
        plain = torch.linspace(low * reach, high * reach, 64).reshape(2, 32)
        weight = case.quantize(plain)
        assert weight.scale.isfinite().all()
        if case.format.bits > 2:
            assert float(compute_error(plain, weight.dequantize())) > 8


def test_large_weights_fit_with_a_float32_scale() -> None:
    config = WeightOnlyConfig("int4", PerGroup(32), scale_dtype=torch.float32)
    plain = with_value(1e6)()
    assert float(quantize_weight(plain, config).dequantize()[2, 33]) == pytest.approx(1e6, rel=0.1)


# --- a model ----------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """A table tied to a head, two linears (one without bias), a norm and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 64)
        self.norm = nn.LayerNorm(64)
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64, bias=False)
        self.conv = nn.Conv1d(64, 64, 3)
        self.lm_head = nn.Linear(64, 24, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.down(self.up(self.norm(self.embed(tokens))).relu()))


LINEARS = {"up.weight", "down.weight"}
EVERYTHING = {"_embedding": "int8", "_head": "int8", "_default": "int4-g32"}


def test_report() -> None:
    model = Toy()
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = quantize_(model, EVERYTHING)
    assert set(report.quantized) == {"embed.weight", "up.weight", "down.weight"}
    assert set(report.skipped) == {"conv.weight"} and "Conv1d" in report.skipped["conv.weight"]
    assert report.bytes_before == sum(p.nbytes for p in plain.values())
    assert report.bytes_after == sum(p.nbytes for p in model.parameters()) < report.bytes_before
    for name, found in report.quantized.items():
        weight = model.get_parameter(name)
        assert found.names[0] == name and found.shape == tuple(weight.shape)
        assert found.bytes_before == plain[name].nbytes and found.bytes_after == weight.nbytes
        assert found.scheme == ("int8" if name == "embed.weight" else "int4-g32")
        assert found.algorithm == "search" and found.block == weight.meta.block
        assert found.kernel and found.kernel_reason
    assert report.quantized["embed.weight"].names == ("embed.weight", "lm_head.weight")
    assert report.seconds > 0
    text = str(report)
    for word in ("3 weights", "int8 (search)", "int4-g32 (search)", "conv.weight", "Conv1d"):
        assert word in text


def test_the_report_survives_json() -> None:
    report = quantize_(Toy(), EVERYTHING)
    found = json.loads(report.to_json())
    assert found == json.loads(json.dumps(report.to_dict()))
    assert found["quantized"]["up.weight"]["shape"] == [96, 64]
    assert found["bytes_after"] == report.bytes_after and found["skipped"] == report.skipped
    assert QuantizationReport(**{**found, "quantized": {}}).bytes_before == report.bytes_before


def test_each_weight_is_what_quantize_weight_makes_of_it() -> None:
    model = Toy()
    plain = copy.deepcopy(model)
    stats = {"up.weight": InputStats(torch.rand(64))}
    quantize_(model, EVERYTHING, stats=stats)
    for name in LINEARS:
        expected = quantize_weight(plain.get_parameter(name), parse_scheme("int4-g32"), stats.get(name))
        assert torch.equal(model.get_parameter(name), expected)
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert 10 < float(compute_error(plain(tokens), model(tokens))) < 40
    assert torch.equal(model.up.bias, plain.up.bias) and torch.equal(model.conv.weight, plain.conv.weight)


def test_tied_weights_remain_one_parameter() -> None:
    model = Toy()
    quantize_(model, EVERYTHING)
    assert model.lm_head.weight is model.embed.weight
    assert isinstance(model.embed.weight, nn.Parameter) and isinstance(model.embed.weight, QuantizedTensor)
    assert not model.embed.weight.requires_grad
    assert sum(name.endswith("weight") for name, _ in model.named_parameters()) == 5


def test_a_filter_decides_by_module_and_name() -> None:
    model, seen = Toy(), []

    def wanted(layer: nn.Module, name: str) -> bool:
        seen.append((type(layer).__name__, name))
        return name != "down"

    report = quantize_(model, EVERYTHING, filter_fn=wanted)
    assert set(report.quantized) == {"embed.weight", "up.weight"}
    assert "filter" in report.skipped["down.weight"] and type(model.down.weight) is nn.Parameter
    assert ("Linear", "down") in seen and ("Embedding", "embed") in seen and ("Linear", "lm_head") in seen


def test_a_filter_that_refuses_one_name_of_a_tied_weight_keeps_it() -> None:
    model = Toy()
    report = quantize_(model, EVERYTHING, filter_fn=lambda _, name: name != "lm_head")
    assert "embed.weight" in report.skipped and type(model.embed.weight) is nn.Parameter
    assert model.lm_head.weight is model.embed.weight


@pytest.mark.parametrize(("name", "value"), [("down.weight", float("nan")), ("up.weight", 1e7)])
def test_one_bad_weight_and_nothing_has_changed(name: str, value: float) -> None:
    model = Toy()
    with torch.no_grad():
        model.get_parameter(name)[3, 3] = value
    before = dict(model.named_parameters())
    bits = {key: p.detach().clone() for key, p in before.items()}
    with pytest.raises(BadWeightError, match=name):
        quantize_(model, EVERYTHING)
    assert dict(model.named_parameters()).keys() == before.keys()
    for key, p in model.named_parameters():
        assert p is before[key] and torch.equal(p.nan_to_num(), bits[key].nan_to_num())


def test_a_quantized_model_is_not_quantized_again() -> None:
    model = Toy()
    quantize_(model, EVERYTHING)
    before = model.up.weight.clone()
    with pytest.raises(AlreadyQuantizedError, match="embed"):
        quantize_(model, "int8")
    assert torch.equal(model.up.weight, before)


@pytest.mark.parametrize(
    "call",
    [
        lambda: quantize_(nn.LayerNorm(4), "int4"),
        lambda: quantize_(Toy(), {"_default": None}),
        lambda: quantize_(Toy(), "none"),
        lambda: quantize_(Toy(), "int4", filter_fn=lambda *_: False),
    ],
)
def test_nothing_to_quantize_is_an_error(call: Callable[[], object]) -> None:
    with pytest.raises(NothingToQuantizeError):
        call()


def test_progress_never_goes_back_and_ends_at_the_total() -> None:
    calls: list[tuple[int, int, str]] = []
    quantize_(Toy(), EVERYTHING, progress=lambda *call: calls.append(call))
    done, totals, names = zip(*calls, strict=True)
    assert list(done) == sorted(set(done)) and done[0] == 0
    assert set(totals) == {24 * 64 + 2 * 64 * 96} and done[-1] == totals[-1]
    assert list(names[:-1]) == ["embed.weight", "up.weight", "down.weight"]


def test_callbacks_see_model_config_and_report(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple] = []
    monkeypatch.setattr(quantize_model, "AFTER_QUANTIZE", [lambda *args: seen.append(args)])
    model = Toy()
    report = quantize_(model, EVERYTHING)
    assert seen[0][0] is model and seen[0][2] is report and list(dict(seen[0][1].items())) == list(EVERYTHING)


@every_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_format_through_a_model(case: Case, dtype: torch.dtype) -> None:
    model = Toy().to(dtype)
    plain = model(torch.arange(6)).detach().double()
    report = quantize_(model, {"_embedding": case.scheme, "_head": case.scheme, "_default": case.scheme})
    assert len(report.quantized) == 3 and {p.dtype for p in model.parameters()} == {dtype}
    lost = float(compute_error(plain, model(torch.arange(6)).detach().double()))
    least = {1: -3, 2: 0, 3: 5, 4: 10}.get(case.format.bits, 15)
    assert lost > (0 if case.format.storage == "semisparse" else least)


def test_more_bits_are_closer() -> None:
    plain = make_weight((16, 256))
    for mapping in MappingType:
        errors = [
            float(
                compute_error(
                    plain,
                    quantize_weight(plain, WeightOnlyConfig(f"int{bits}", PerGroup(32), mapping)).dequantize(),
                )
            )
            for bits in range(1, 9)
        ]
        assert all(b - a > 3 for a, b in pairwise(errors))


def test_smaller_groups_are_closer() -> None:
    plain = make_weight((32, 256))
    errors = [
        float(compute_error(plain, Case(f"int4-g{g}").quantize(plain).dequantize())) for g in (256, 128, 64, 32, 16)
    ]
    assert errors == sorted(errors) and errors[-1] - errors[0] > 2


def test_experts_of_a_mixture(folders: Folders) -> None:
    model = load(folders("mixtral"))
    plain = {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() == 3}
    assert len(plain) == 4
    with torch.no_grad():
        expected = model(torch.arange(8)[None]).logits
    report = quantize_(model, {"_experts": "int6-g32-asym", "_default": None})
    assert set(report.quantized) == set(plain)
    for name, weight in plain.items():
        assert torch.equal(model.get_parameter(name)[2], Case("int6-g32-asym").quantize(weight[2]))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert 15 < float(compute_error(expected, model(torch.arange(8)[None]).logits)) < 50


def test_a_linear_alone() -> None:
    layer = nn.Linear(64, 8)
    assert set(quantize_(layer, Float8WeightOnlyConfig()).quantized) == {"weight"}
    assert isinstance(layer.weight, QuantizedTensor)
