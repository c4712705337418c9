"""The table of formats: every row is complete and true, and bad rows and names are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmquant.errors import ConfigError
from llmquant.formats import FORMATS, METHODS, get_format, register_format
from llmquant.packing import bits as dense
from llmquant.primitives.granularity import MappingType
from llmquant.primitives.spec import QParams, QuantSpec
from llmquant.tensor import STORAGE

every_row = pytest.mark.parametrize("name", FORMATS)


@every_row
def test_rows_are_complete(name: str) -> None:
    row = FORMATS[name]
    assert row.name == name and get_format(name) is row
    assert 1 <= row.bits <= 8 and row.top_code == 2**row.bits - 1
    assert row.storage in STORAGE
    assert row.granularities and set(row.granularities) <= {"group", "row", "tensor", "block"}
    assert (row.group_size is None) or "group" in row.granularities
    assert row.algorithms and set(row.algorithms) <= set(METHODS)
    for function in ("choose_qparams", "encode", "decode", "largest_scaled"):
        assert callable(getattr(row.numerics, function))
    if "search" in row.algorithms:
        assert callable(row.numerics.candidates)


@every_row
@pytest.mark.parametrize("columns", [0, 1, 7, 8, 9, 576])
def test_row_bytes(name: str, columns: int) -> None:
    row = FORMATS[name]
    if row.packing is dense:
        assert row.row_bytes(columns) * 8 - columns * row.bits in range(8)
    assert row.row_bytes(columns) == row.packing.pack(torch.zeros(2, columns, dtype=torch.uint8), row.bits).shape[-1]


@every_row
def test_the_midpoint_stands_for_zero(name: str) -> None:
    row = FORMATS[name]
    one = QParams(torch.ones(1, 1))
    value = row.numerics.decode(torch.tensor([[[int(row.midpoint)]]], dtype=torch.uint8), one, row)
    assert value.item() == int(row.midpoint) - row.midpoint  # 1 bit has its midpoint between two codes


@every_row
def test_numerics_keep_shapes_and_dtypes(name: str) -> None:
    row = FORMATS[name]
    x = torch.randn(2, 3, 8)
    for mapping in MappingType if row.asymmetric else [MappingType.SYMMETRIC]:
        scale_dtype = (row.scale_dtypes or (torch.float16,))[0]
        qparams = row.numerics.choose_qparams(x, torch.ones_like(x), QuantSpec(row, (1, 8), mapping, scale_dtype))
        codes = row.numerics.encode(x, qparams, row)
        assert qparams.scale.shape == (2, 3) and qparams.scale.dtype == scale_dtype
        assert codes.shape == x.shape and codes.dtype == torch.uint8 and int(codes.max()) <= row.top_code
        values = row.numerics.decode(codes, qparams, row)
        assert values.shape == x.shape and values.dtype == torch.float32


def test_microscaling_and_nvfp4_are_there() -> None:
    mx = {"mxfp4": 4, "mxfp6-e2m3": 6, "mxfp6-e3m2": 6, "mxfp8": 8, "mxfp8-e5m2": 8}
    for name, bits in mx.items():
        assert (FORMATS[name].bits, FORMATS[name].group_size, FORMATS[name].tensor_scale) == (bits, 32, False)
        assert FORMATS[name].scale_dtypes == (torch.float8_e8m0fnu,)
    row = FORMATS["nvfp4"]
    assert (row.bits, row.group_size, row.tensor_scale) == (4, 16, True)
    assert row.scale_dtypes == (torch.float8_e4m3fn,)


def test_normal_floats_and_two_of_four_are_there() -> None:
    for name, double in {"nf4": True, "nf4-single": False}.items():
        row = FORMATS[name]
        assert (row.bits, row.group_size, row.row_scale, row.scale_dtypes == (torch.uint8,)) == (4, 64, double, double)
    row = FORMATS["float8-2x4"]
    assert (row.bits, row.row_bytes(4096), row.granularities) == (8, 2048 + 512, ("row",))


def test_widths_one_to_eight_and_two_float8s_are_there() -> None:
    assert {f"int{bits}" for bits in range(1, 9)} | {"float8", "float8-e5m2"} <= set(FORMATS)
    assert [FORMATS[f"int{bits}"].bits for bits in range(1, 9)] == list(range(1, 9))


def test_a_name_is_registered_once() -> None:
    row = FORMATS["int4"]
    assert register_format(row) is row  # again, unchanged
    with pytest.raises(ConfigError, match="int4"):
        register_format(replace(row, group_size=64))
    assert FORMATS["int4"] is row


def test_unknown_names_get_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"'itn4'(.|\n)*int4"):
        get_format("itn4")
    with pytest.raises(ConfigError, match="float8"):
        get_format("zzzzzz")
