"""Float8 checkpoints in square blocks, as DeepSeek-V3 has them (`quant_method: fp8` of transformers).

value = number * weight_scale_inv   of its block of `weight_block_size` rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from llmquant.errors import CheckpointError
from llmquant.foreign.settings import integer, short
from llmquant.foreign.spec import FLOATS, ForeignWeight, Grid, Parts, Reader
from llmquant.foreign.store import Store

_SUFFIX = "_scale_inv"


def claims(config: Mapping[str, Any]) -> bool:
    """Whether this is transformers' `fp8`."""
    return config.get("quant_method") == "fp8"


def weights(store: Store, config: Mapping[str, Any]) -> Iterator[ForeignWeight]:
    """The weights with a `weight_scale_inv` beside them."""
    sides = config.get("weight_block_size")
    if not isinstance(sides, list | tuple) or len(sides) != 2:
        raise CheckpointError(f"weight_block_size is {short(sides)}, not two numbers", where="config.json")
    tall, wide = (integer({"weight_block_size": side}, "weight_block_size") for side in sides)
    for key in store:
        if key.endswith(_SUFFIX):
            yield _weight(store, key.removesuffix(_SUFFIX), (tall, wide))


def warnings(config: Mapping[str, Any]) -> Iterator[str]:
    """What of the config is not taken over."""
    if config.get("activation_scheme"):
        yield "inputs were quantized too there; here they stay as they are"


def _weight(store: Store, name: str, sides: tuple[int, int]) -> ForeignWeight:
    rows, columns = store.rank(name, (torch.float8_e4m3fn,), 2)
    tall, wide = block = min(sides[0], rows), min(sides[1], columns)
    keys = (name, name + _SUFFIX)
    store.expect(keys[1], FLOATS, (-(-rows // tall), -(-columns // wide)))
    grid = Grid("float8", block, store.dtype(keys[1]))
    return ForeignWeight(name, keys, (rows, columns), grid, partial(_parts, store, keys))


def _parts(store: Store, keys: tuple[str, ...]) -> Parts:
    codes, scale = map(store.read, keys)
    return {"qdata": codes.view(torch.uint8), "scale": scale}


FP8 = Reader("fp8", claims, weights, warnings)
