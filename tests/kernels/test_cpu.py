"""The native kernels against the reference, for every width, shape and dtype; skipped where they cannot run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmquant.config.schemes import parse_scheme
from llmquant.errors import ConfigError
from llmquant.kernels import cpu, ops, reference, registry
from llmquant.kernels.packed import Packed
from llmquant.primitives.metrics import compute_error
from llmquant.quantize import quantize_weight
from llmquant.tensor import QuantizedTensor

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The result against the same product in float64: what rounding the output to the dtype allows, and no more.
BOUNDS = {torch.float32: (115, 160), torch.float16: (62, 85), torch.bfloat16: (44, 65)}
SHAPES = ((1, 4), (7, 576), (33, 100), (16, 8), (5, 1000), (3, 64), (2, 65))
SCHEMES = [
    *(f"int{bits}-g32{zero}" for bits in range(1, 9) for zero in ("", "-asym")),
    *(f"int4-{group}{zero}" for group in ("g4", "g16", "g24", "g40", "g96", "g128", "row") for zero in ("", "-asym")),
    *(f"int{bits}-{group}" for bits in (3, 8) for group in ("g12", "g48", "row-asym", "row")),
]


def weight_of(scheme: str, rows: int, columns: int) -> QuantizedTensor:
    config = parse_scheme(scheme)
    assert config is not None
    return quantize_weight(torch.randn(rows, columns).bfloat16() * 0.02, config.with_algorithm("rtn"))


def linear_on(backend: str, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    with registry.force(backend):
        return ops.linear(x, weight, bias)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_decodes_bit_for_bit_as_the_reference(scheme: str) -> None:
    for rows, columns in SHAPES:
        weight = weight_of(scheme, rows, columns).packed()
        exact = weight.dequantize()
        for dtype in DTYPES:
            assert torch.equal(cpu.dequantize(weight, dtype), exact.to(dtype)), (rows, columns, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear_is_as_exact_as_its_dtype(scheme: str, dtype: torch.dtype) -> None:
    low, high = BOUNDS[dtype]
    for rows, columns in SHAPES:
        weight = weight_of(scheme, rows, columns).packed()
        for count in (1, 2, 3, 4, 5, 7):
            x, bias = torch.randn(count, columns).to(dtype), torch.randn(rows)
            found = linear_on("avx512", x, weight, bias)
            exact = torch.nn.functional.linear(x.double(), weight.dequantize().double(), bias.double())
            assert found.dtype == dtype and found.isfinite().all()
            error = compute_error(exact, found)
            assert error > low, (rows, columns, count)
            assert error < high or found.numel() < 40, "too good: is the output really rounded?"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, cpu._MOST_INPUTS, cpu._MOST_INPUTS + 1, 130])
def test_any_number_of_inputs(count: int, dtype: torch.dtype) -> None:
    weight = weight_of("int4-g32-asym", 48, 200).packed()
    x = torch.randn(count, 200).to(dtype)
    found, exact = linear_on("avx512", x, weight, None), linear_on("reference", x, weight, None)
    assert found.shape == exact.shape == (count, 48)
    # Beyond a few inputs bfloat16 weights are rounded once more.
    assert (
        count == 0 or compute_error(exact, found) > {torch.float32: 110, torch.float16: 60, torch.bfloat16: 42}[dtype]
    )


@pytest.mark.parametrize("shape", [(200,), (2, 3, 200), (0, 200), (1, 1, 1, 200)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    weight, x = weight_of("int5-g40", 9, 200).packed(), torch.randn(shape)
    torch.testing.assert_close(linear_on("avx512", x, weight, None), linear_on("reference", x, weight, None))


def test_inputs_and_weights_need_not_be_contiguous() -> None:
    weight = weight_of("int4-g32", 12, 128)
    x = torch.randn(128, 6).t()
    part = weight[2:9].packed()
    torch.testing.assert_close(linear_on("avx512", x, part, None), linear_on("reference", x, part, None))


def test_the_number_of_threads_changes_nothing() -> None:
    weight, x = weight_of("int3-g32", 70, 300).packed(), torch.randn(3, 300).bfloat16()
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(linear_on("avx512", x, weight, None))
    torch.set_num_threads(before)
    assert torch.equal(*found)


def test_matmul_is_the_transposed_product() -> None:
    weight, x = weight_of("int6-g32-asym", 40, 90).packed(), torch.randn(5, 40)
    torch.testing.assert_close(cpu.matmul(x, weight), reference.matmul(x, weight))


@pytest.mark.parametrize(
    ("scheme", "shape", "reason"),
    [
        ("float8", (8, 64), "no native kernel for float8"),
        ("int4-tensor", (8, 64), "several rows"),
        ("int4-g6", (8, 64), "group 6 is not a multiple of 4"),
    ],
)
def test_refusals_have_reasons(scheme: str, shape: tuple[int, int], reason: str) -> None:
    weight = weight_of(scheme, *shape)
    assert weight.kernel().kernel == "reference" and reason in weight.kernel().reason
    with pytest.raises(ConfigError, match="cannot serve this weight"):
        linear_on("avx512", torch.randn(1, shape[1]), weight.packed(), None)
    assert linear_on("reference", torch.randn(1, shape[1]), weight.packed(), None).shape == (1, shape[0])


def test_a_served_weight_says_so() -> None:
    assert weight_of("int4-g32", 8, 64).kernel().kernel == "avx512"


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown backend 'magic'"), registry.force("magic"):
        pass
