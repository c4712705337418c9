"""Weights that other libraries wrote are taken over with the values that their own code decodes them to, bit for bit.

`tests/goldens/make_foreign.py` made the files with the real packages.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from llmquant.foreign import READERS
from llmquant.foreign.detect import find_reader
from llmquant.foreign.spec import ForeignWeight, Taken
from llmquant.foreign.store import Store

FOLDER = Path(__file__).parents[1] / "goldens" / "foreign"
GOLDENS = sorted(path.stem for path in FOLDER.glob("*.safetensors"))

# What no format of ours holds: it is decoded.
OUTSIDE = {"gptq_v1-int4-act-order", "bnb-fp4"}
# The same values, but scales take more room than there.
WIDENED = {"bnb-nf4-double", "bnb-nf4-over-rows"}
# Scales are divided by the tensor's there, in float32.
ROUNDED = {"ct-nvfp4-pack-quantized"}
FORMATS = {"gptq_v2-int3": "int3", "gptq_v1-int4-sym": "int4", "awq-gemm": "int4", "ct-pack-int5": "int5"}
FORMATS |= {"ct-mxfp4-pack-quantized": "mxfp4", "ct-nvfp4-pack-quantized": "nvfp4", "ct-mxfp8-quantized": "mxfp8"}
FORMATS |= {"ct-float-quantized-block": "float8", "ct-int-quantized": "int8", "bnb-nf4": "nf4-single"}


def read(name: str) -> tuple[ForeignWeight, Tensor]:
    path = FOLDER / f"{name}.safetensors"
    with safe_open(path, framework="pt") as file:
        settings, expected = json.loads(file.metadata()["settings"]), file.get_tensor("expected")
    (weight,) = find_reader(READERS, settings).weights(Store([path]), settings)
    return weight, expected


def test_every_package_is_there() -> None:
    assert {name.partition("-")[0].partition("_")[0] for name in GOLDENS} == {"gptq", "awq", "ct", "bnb"}
    assert len(GOLDENS) >= 32


@pytest.mark.parametrize("name", GOLDENS)
def test_values_are_those_of_the_other_package(name: str) -> None:
    weight, expected = read(name)
    assert weight.name == "m.weight" and weight.shape == expected.shape
    found = weight.values() if weight.grid is None else weight.load(torch.float32).dequantize()
    if name in ROUNDED:
        # Two roundings in float32 against two others; and then equal but for the last bit of bfloat16.
        assert torch.allclose(found, expected.float(), rtol=2**-8, atol=0)
        assert (found.to(expected.dtype) == expected).float().mean() > 0.99
    else:
        assert torch.equal(found.to(expected.dtype), expected)


@pytest.mark.parametrize("name", GOLDENS)
def test_the_report_says_how(name: str) -> None:
    weight, _ = read(name)
    ways = {Taken.requantized: OUTSIDE, Taken.widened: WIDENED, Taken.rounded: ROUNDED}
    assert weight.taken is next((way for way, names in ways.items() if name in names), Taken.exact)
    assert (weight.grid is None) == (name in OUTSIDE)
    assert bool(weight.note) == (weight.taken is not Taken.exact)
    if name in FORMATS:
        assert weight.grid is not None and weight.grid.format == FORMATS[name]


@pytest.mark.parametrize("name", [name for name in GOLDENS if name not in OUTSIDE])
def test_a_sketch_is_the_weight_without_values(name: str) -> None:
    weight, _ = read(name)
    sketch, loaded = weight.sketch(torch.bfloat16), weight.load(torch.bfloat16)
    assert sketch.is_meta and sketch.meta == loaded.meta and sketch.dtype == loaded.dtype
    assert sketch.nbytes == loaded.nbytes
    assert [f.name for f, _ in sketch.parts()] == [f.name for f, _ in loaded.parts()]


def test_zero_points_less_one_are_not_taken_as_they_are() -> None:
    """The two versions of GPTQ's format hold other bits for the same weight."""
    (one, expected), (two, same) = read("gptq_v1-int4"), read("gptq_v2-int4")
    assert torch.equal(expected, same)
    assert torch.equal(one.load(torch.float16).zero_point, two.load(torch.float16).zero_point)
    with (
        safe_open(FOLDER / "gptq_v1-int4.safetensors", "pt") as a,
        safe_open(FOLDER / "gptq_v2-int4.safetensors", "pt") as b,
    ):
        assert not torch.equal(a.get_tensor("m.qzeros"), b.get_tensor("m.qzeros"))


def test_symmetric_weights_lose_their_zero_points() -> None:
    assert read("gptq_v1-int4-sym")[0].load(torch.float16).zero_point is None
    assert read("gptq_v1-int4")[0].load(torch.float16).zero_point is not None
