"""torchao 0.18 as an oracle: code for code and scale for scale where the rule is the same, a reason where it is not.

Runs where torchao is installed (the extra `oracle`; `make test-slow` installs it beside the environment).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from cases import make_weight
from torch import Tensor

from llmquant.config.base import from_dict
from llmquant.config.named import MXWeightOnlyConfig, NVFP4WeightOnlyConfig
from llmquant.config.schemes import parse_scheme
from llmquant.formats import FORMATS
from llmquant.packing.bits import unpack
from llmquant.primitives.blockfloat import block_spec, dequantize_rows, quantize_rows
from llmquant.primitives.dynamic import dequantize_activation, quantize_activation
from llmquant.primitives.metrics import compute_error
from llmquant.quantize import quantize_weight
from llmquant.tensor import QuantizedTensor

torchao = pytest.importorskip("torchao", reason="torchao is not installed: pip install --no-deps torchao==0.18.0")
if not torchao.__version__.startswith("0.18."):
    pytest.skip(f"what is said of torchao here is said of 0.18, not {torchao.__version__}", allow_module_level=True)

from torchao.prototype.mx_formats import constants, mx_tensor, nvfp4_tensor  # noqa: E402
from torchao.quantization import quant_primitives as affine  # noqa: E402

ROWS, COLUMNS = 64, 1024
RULES = ("floor", "ceil", "even", "rceil")
MX_DTYPES = {
    "mxfp8": torch.float8_e4m3fn,
    "mxfp8-e5m2": torch.float8_e5m2,
    "mxfp6-e2m3": constants.DTYPE_FP6_E2M3,
    "mxfp6-e3m2": constants.DTYPE_FP6_E3M2,
    "mxfp4": torch.float4_e2m1fn_x2,
}
MAPPINGS = {"symmetric": affine.MappingType.SYMMETRIC, "asymmetric": affine.MappingType.ASYMMETRIC}


def spread() -> Tensor:
    """Rows whose sizes differ by twelve powers of ten."""
    return make_weight((ROWS, COLUMNS)) * torch.logspace(-6, 6, ROWS)[:, None]


INPUTS: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: make_weight((ROWS, COLUMNS)),
    "bfloat16": lambda: make_weight((ROWS, COLUMNS), torch.bfloat16),
    "unit": lambda: make_weight((ROWS, COLUMNS)) * 50,
    "spread": spread,
}


class Found(NamedTuple):
    """Codes one a number, what lies beside them (scales, zero points), and the values they stand for in float32."""

    codes: Tensor
    parameters: tuple[Tensor, ...]
    values: Tensor


class Differs(NamedTuple):
    """Why codes or scales differ, and the share of codes that agree nevertheless."""

    reason: str
    agree: float


@dataclass(frozen=True)
class Compared:
    """One rule of both libraries.

    Attributes:
        differs: by input, where they do; everywhere else they agree in every code and every parameter.
        behind: dB by which ours may be worse, with the reason.
    """

    ours: Callable[[Tensor], Found]
    theirs: Callable[[Tensor], Found]
    differs: dict[str, Differs] = field(default_factory=dict)
    behind: tuple[float, str] = (0.0, "")


# --- ours -------------------------------------------------------------------------------------------------


def codes_of(weight: QuantizedTensor) -> Tensor:
    codes = unpack(weight.qdata, weight.format.bits, weight.meta.columns)
    return codes.int() - 2 ** (weight.format.bits - 1) if weight.format.storage == "affine" else codes


def our_weight(**config: Any) -> Callable[[Tensor], Found]:
    def run(x: Tensor) -> Found:
        rtn = {"algorithm": "rtn", **config}
        if rtn.get("scale_dtype") == "as x":
            rtn["scale_dtype"] = str(x.dtype).removeprefix("torch.")
        weight = quantize_weight(x, from_dict(rtn))
        beside = [weight.scale, getattr(weight, "tensor_scale", None)]
        if weight.zero_point is not None:
            bits = weight.format.bits
            beside.append(unpack(weight.zero_point, bits, weight.scale.shape[-1]).int() - 2 ** (bits - 1))
        return Found(codes_of(weight), tuple(t for t in beside if t is not None), weight.dequantize(torch.float32))

    return run


def our_activation(prefix: str) -> Callable[[Tensor], Found]:
    activation = parse_scheme(f"{prefix}-int4").activation  # type: ignore[union-attr]
    assert activation is not None

    def run(x: Tensor) -> Found:
        found = quantize_activation(x, activation)
        beside = (found.scale, found.tensor_scale, found.zero_point)
        parameters = tuple(as_bytes(t) for t in beside if t is not None)
        return Found(as_bytes(found.codes), parameters, dequantize_activation(found, activation))

    return run


def as_bytes(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.is_floating_point() and t.itemsize == 1 else t


def our_nvfp4_of_one_level(x: Tensor) -> Found:
    spec = block_spec(FORMATS["nvfp4"], "", COLUMNS)
    found = quantize_rows(x, spec, torch.ones(1, 1))
    return Found(found.codes, (found.scale.view(torch.uint8),), dequantize_rows(found, spec))


# --- theirs -----------------------------------------------------------------------------------------------


def their_mx(name: str, rule: str) -> Callable[[Tensor], Found]:
    def run(x: Tensor) -> Found:
        kind, mode = MX_DTYPES[name], mx_tensor.ScaleCalculationMode[rule.upper()]
        scale, codes = mx_tensor.to_mx(x, kind, 32, mode)
        wide = x.float()  # whose values are not rounded to 16 bits
        values = mx_tensor.MXTensor.to_mx(wide, kind, 32, mode).dequantize(torch.float32)
        codes = codes.view(torch.uint8)
        return Found(unpack(codes, 4, COLUMNS) if name == "mxfp4" else codes, (scale.view(torch.uint8),), values)

    return run


def their_nvfp4(two_levels: bool) -> Callable[[Tensor], Found]:
    def run(x: Tensor) -> Found:
        per_tensor = nvfp4_tensor.per_tensor_amax_to_scale(x.abs().max()) if two_levels else None
        found = nvfp4_tensor.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=per_tensor)
        parameters = (found.scale.view(torch.uint8), *([per_tensor.reshape(1, 1)] if two_levels else []))
        return Found(unpack(found.qdata.view(torch.uint8), 4, COLUMNS), parameters, found.dequantize(torch.float32))

    return run


def their_float8(dtype: torch.dtype, block: tuple[int, int]) -> Callable[[Tensor], Found]:
    def run(x: Tensor) -> Found:
        scale = affine._choose_scale_float8(x, [min(n, size) for n, size in zip(block, x.shape, strict=True)], dtype)
        codes = affine._quantize_affine_float8(x, scale, dtype)
        values = affine._dequantize_affine_float8(codes, scale)
        return Found(codes.view(torch.uint8), (scale,), values)

    return run


def their_integers(bits: int, mapping: str, group: int = COLUMNS, **options: Any) -> Callable[[Tensor], Found]:
    def run(x: Tensor) -> Found:
        block, low, high = (1, group), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scale, zero = affine.choose_qparams_affine(
            x, MAPPINGS[mapping], block, torch.int8, low, high, zero_point_dtype=torch.int8, keepdim=True, **options
        )
        codes = affine.quantize_affine(x, block, scale, zero, torch.int8, low, high)
        values = affine.dequantize_affine(codes, block, scale, zero, torch.int8, low, high, output_dtype=torch.float32)
        parameters = (scale, zero) if mapping == "asymmetric" else (scale,)
        return Found(codes, parameters, values)

    return run


# --- the table --------------------------------------------------------------------------------------------

IN_BFLOAT16 = "torchao computes scales and zero points in the dtype of the tensor, we in float32"
INVERSE = (
    "one side divides by a scale, the other multiplies by its inverse: numbers on the edge of two codes fall apart"
)
SUBNORMAL = "torchao raises block scales to 2^-6, the smallest normal e4m3 number; we keep the smaller ones"
FULL_RANGE = (
    "torchao: max|x| / ((qmax - qmin) / 2), which clips; ours gives the largest magnitude the code without a twin"
)
SIGN = "torchao's rule has one code that is not zero (0 dB); ours is the sign times the mean magnitude"
REDUCED = "torchao: max|x| / 127.5 and codes -128..127; ours max|x| / 127, so that each code has a negative"
FLOOR = "torchao raises scales to the smallest step of float32 at 1, which flattens rows of tiny numbers"

LUCK = (0.01, "scales that are rounded to bfloat16 may fall luckier")
NO_TWIN = (0.05, "we give up the code that has no negative")

FLOAT8 = {"float8": torch.float8_e4m3fn, "float8-e5m2": torch.float8_e5m2}
BLOCKS = {"row": (1, COLUMNS), "tensor": (ROWS, COLUMNS), "block-32": (32, 32)}
TOKENS = {"f8": (1, COLUMNS), "f8-tensor": (ROWS, COLUMNS), "f8-g128": (1, 128)}
OF_INT8 = {"scale_dtype": torch.float32, "eps": torch.finfo(torch.float32).eps}  # as `Int8Tensor.from_hp` has them

NVFP4 = {"bfloat16": Differs(INVERSE, 0.99933), "spread": Differs(SUBNORMAL, 0.914)}
SYMMETRIC = {1: 0.4987, 2: 0.639, 3: 0.533, 4: 0.476, 5: 0.445, 6: 0.432, 7: 0.424, 8: 0.42}
ASYMMETRIC = {1: 0.99963, 2: 0.9928, 3: 0.9878, 4: 0.9713, 5: 0.9295, 6: 0.868, 7: 0.7408, 8: 0.651}
EDGES = {
    4: ("normal", "unit", "spread"),
    7: ("normal", "unit", "spread"),
    8: ("unit",),
}  # where one code of 65536 differs
ONE_CODE = 1 - 1 / (ROWS * COLUMNS)


def of_groups(bits: int, mapping: str) -> dict[str, Differs]:
    """Where integers in groups differ."""
    if mapping == "symmetric":
        return dict.fromkeys(INPUTS, Differs(SIGN if bits == 1 else FULL_RANGE, SYMMETRIC[bits]))
    edges = dict.fromkeys(EDGES.get(bits, ()), Differs(INVERSE, ONE_CODE))
    if bits == 8:  # a zero point, too, and with it the codes of its group
        edges["normal"] = Differs(INVERSE, 0.9995)
    return {**edges, "bfloat16": Differs(IN_BFLOAT16, ASYMMETRIC[bits])}


TABLE: dict[str, Compared] = {
    **{
        f"{name} {rule}": Compared(our_weight(format=name, scale_rule=rule), their_mx(name, rule))
        for name, rule in product(MX_DTYPES, RULES)
    },
    **{
        f"activations in {name} {rule}": Compared(our_activation(f"{name}-{rule}"), their_mx(name, rule))
        for name, rule in product(MX_DTYPES, RULES)
    },
    "nvfp4": Compared(our_weight(format="nvfp4"), their_nvfp4(True), NVFP4),
    "activations in nvfp4": Compared(our_activation("nvfp4"), their_nvfp4(True), NVFP4),
    "nvfp4 of one level": Compared(
        our_nvfp4_of_one_level,
        their_nvfp4(False),
        {
            **dict.fromkeys(("normal", "bfloat16"), Differs(SUBNORMAL, 0.123)),
            "spread": Differs(SUBNORMAL, 0.915),
        },
    ),
    **{
        f"{name} {block}": Compared(
            our_weight(format=name, granularity=block),
            their_float8(dtype, BLOCKS[block]),
            {"bfloat16": Differs(IN_BFLOAT16, 0.985 if name == "float8" else 0.9915)},
            behind=LUCK,
        )
        for (name, dtype), block in product(FLOAT8.items(), BLOCKS)
    },
    **{
        f"activations in {prefix}": Compared(
            our_activation(prefix),
            their_float8(torch.float8_e4m3fn, block),
            {"bfloat16": Differs(IN_BFLOAT16, 0.985)},
            behind=LUCK,
        )
        for prefix, block in TOKENS.items()
    },
    "int8 row": Compared(
        our_weight(format="int8"),
        their_integers(8, "symmetric", **OF_INT8),
        {**dict.fromkeys(INPUTS, Differs(FULL_RANGE, 0.43)), "spread": Differs(f"{FULL_RANGE}; {FLOOR}", 0.343)},
    ),
    "activations in a8-token": Compared(
        our_activation("a8-token"),
        their_integers(8, "symmetric", **OF_INT8),
        {
            **dict.fromkeys(("normal", "unit"), Differs(REDUCED, 0.887)),
            "bfloat16": Differs(f"{REDUCED}; {IN_BFLOAT16}", 0.963),
            "spread": Differs(f"{REDUCED}; {FLOOR}", 0.714),
        },
        behind=NO_TWIN,
    ),
    "activations in a8-token-asym": Compared(
        our_activation("a8-token-asym"),
        their_integers(8, "asymmetric"),
        {"bfloat16": Differs(IN_BFLOAT16, 0.466)},
    ),
    **{
        f"int{bits} {mapping} in groups": Compared(
            our_weight(format=f"int{bits}", group_size=32, mapping_type=mapping, scale_dtype="as x"),
            their_integers(bits, mapping, 32),
            of_groups(bits, mapping),
        )
        for bits, mapping in product(range(1, 9), MAPPINGS)
    },
}


def same(a: Found, b: Found) -> bool:
    """Whether all codes and parameters are the same numbers."""
    assert len(a.parameters) == len(b.parameters)
    beside = all(torch.equal(p.float(), q.float()) for p, q in zip(a.parameters, b.parameters, strict=True))
    return beside and torch.equal(a.codes.int(), b.codes.int())


@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("name", TABLE)
def test_codes_and_scales_are_torchaos_or_differ_for_a_reason(name: str, given: str) -> None:
    row, x = TABLE[name], INPUTS[given]()
    ours, theirs = row.ours(x), row.theirs(x)
    agree = float((ours.codes.int() == theirs.codes.int()).double().mean())
    if given not in row.differs:
        assert same(ours, theirs), f"{name}, {given}: only {agree:.7f} of the codes agree, or parameters differ"
        return
    reason, known = row.differs[given]
    assert not same(ours, theirs), f"{name}, {given}: nothing differs, so this is no reason: {reason}"
    assert abs(agree - known) <= 0.15 * (1 - known), f"{name}, {given}: {agree:.7f} agree, not {known} ({reason})"


@pytest.mark.parametrize("given", ["normal", "bfloat16"])
@pytest.mark.parametrize("name", TABLE)
def test_plain_rounding_is_no_worse_than_torchaos(name: str, given: str) -> None:
    row, x = TABLE[name], INPUTS[given]()
    ours, theirs = (float(compute_error(x, found.values)) for found in (row.ours(x), row.theirs(x)))
    assert ours >= theirs - row.behind[0] - 1e-3, f"{name}, {given}: {ours} dB, torchao {theirs} dB"


# Format -> dB of the default here and in torchao on N(0, 0.02), within a tenth: floor and search against rceil.
DEFAULTS = {
    "mxfp8": (31.5, 31.5),
    "mxfp8-e5m2": (25.6, 25.6),
    "mxfp6-e2m3": (31.1, 31.0),
    "mxfp6-e3m2": (25.6, 25.6),
    "mxfp4": (19.0, 18.5),
    "nvfp4": (21.7, 20.4),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_no_worse_than_torchaos(name: str) -> None:
    x = make_weight((256, COLUMNS))
    config = NVFP4WeightOnlyConfig() if name == "nvfp4" else MXWeightOnlyConfig(name)
    theirs = their_nvfp4(True) if name == "nvfp4" else their_mx(name, "rceil")
    found = float(compute_error(x, quantize_weight(x, config).dequantize()))
    beaten = float(compute_error(x, theirs(x).values))
    assert (found, beaten) == pytest.approx(DEFAULTS[name], abs=0.1) and found >= beaten - 1e-3
