"""Float8 in blocks, against the formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmquant.errors import CheckpointError
from llmquant.foreign import READERS
from llmquant.foreign.detect import find_reader
from llmquant.foreign.spec import ForeignWeight, Taken
from llmquant.foreign.store import Store

SETTINGS = {"quant_method": "fp8", "weight_block_size": [16, 32], "activation_scheme": "dynamic"}


def written(folder: Path, codes: Tensor, scale: Tensor) -> ForeignWeight:
    path = folder / "model.safetensors"
    save_file({"m.weight": codes, "m.weight_scale_inv": scale}, path)
    (weight,) = find_reader(READERS, SETTINGS).weights(Store([path]), SETTINGS)
    return weight


def test_values_are_codes_times_the_scale_of_their_block(tmp_path: Path) -> None:
    codes, scale = torch.randn(48, 64).to(torch.float8_e4m3fn), torch.rand(3, 2) + 0.5
    weight = written(tmp_path, codes, scale)
    assert weight.taken is Taken.exact and weight.grid is not None and weight.grid.block == (16, 32)
    found = weight.load(torch.float32).dequantize()
    expected = (codes.float().view(3, 16, 2, 32) * scale[:, None, :, None]).view(48, 64)
    assert torch.equal(found, expected)
    assert list(find_reader(READERS, SETTINGS).warnings(SETTINGS))


@pytest.mark.parametrize("rows, columns", [(2, 2), (3, 1), (4, 2)])
def test_scales_of_other_blocks_are_refused(rows: int, columns: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not fit"):
        written(tmp_path, torch.zeros(48, 64).to(torch.float8_e4m3fn), torch.ones(rows, columns))


def test_codes_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    codes = torch.zeros(48, 64).index_fill(0, torch.tensor(3), torch.nan).to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        written(tmp_path, codes, torch.ones(3, 2)).load(torch.float32)
