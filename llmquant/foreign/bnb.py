"""bitsandbytes checkpoints: NF4 and FP4 in blocks of the flattened weight, and LLM.int8's rows.

value = table[code] * absmax   (`dequantize_4bit` of bitsandbytes), of the block that holds the flattened index;
with double quantization absmax = nested_table[absmax code] * nested_absmax + nested_offset, all in float32.

Of two codes in a byte the first is the high nibble. What is no tensor lies as JSON in the bytes of
`quant_state.bitsandbytes__nf4`. Blocks run on over the ends of rows. Where they do, groups of a size that divides both
the block and the row lie in one block each, and repeat its scale: the same values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmquant.errors import CheckpointError
from llmquant.foreign.settings import integer, short
from llmquant.foreign.spec import ForeignWeight, Grid, Parts, Reader, Taken
from llmquant.foreign.store import Store
from llmquant.foreign.words import swap_nibbles
from llmquant.packing.bits import pack, unpack
from llmquant.primitives.nf4 import VALUES

_STATE = ".quant_state.bitsandbytes__"
_LARGEST_STATE = 2**16  # bytes of JSON; real ones have less than 300
_SMALLEST_GROUP = 16
_FLOAT, _BYTES = (torch.float32,), (torch.uint8,)


class State(NamedTuple):
    """What the JSON says of one weight; `nested` are block size and offset of double quantization."""

    shape: tuple[int, int]
    block: int
    nested: tuple[int, float] | None

    @property
    def blocks(self) -> int:
        """Blocks that share a scale."""
        return -(-math.prod(self.shape) // self.block)

    @property
    def group(self) -> int:
        """The largest size of neighbours in a row that always lie in one block."""
        return math.gcd(self.block, self.shape[1])


def claims(config: Mapping[str, Any]) -> bool:
    """Whether this is bitsandbytes'."""
    return config.get("quant_method") == "bitsandbytes"


def weights(store: Store, config: Mapping[str, Any]) -> Iterator[ForeignWeight]:
    """The weights with a state beside them, and those with a scale a row."""
    for key in store:
        if _STATE in key:
            name, _, kind = key.partition(_STATE)
            yield _four_bits(store, name, key, kind)
        elif key.endswith(".SCB"):
            yield _rows_of_int8(store, key.removesuffix(".SCB"))


def _four_bits(store: Store, name: str, state_key: str, kind: str) -> ForeignWeight:
    state = _state(store, state_key)
    table = _check_tensors(store, name, state)
    names = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    keys = (name, state_key, *(key for part in names if (key := f"{name}.{part}") in store))
    decode = partial(_decode, store, name, state, table)
    if kind != "nf4" or not torch.equal(table, torch.tensor(VALUES)):
        note = f"no format has the sixteen values of its {short(kind)}"
        return ForeignWeight(name, keys, state.shape, None, None, Taken.requantized, note, decode)
    if state.group < min(_SMALLEST_GROUP, state.block):
        note = f"its blocks of {state.block} run on over the ends of rows of {state.shape[1]}"
        return ForeignWeight(name, keys, state.shape, None, None, Taken.requantized, note, decode)
    notes = ["scales of one byte are unfolded to float32"] if state.nested else []
    notes += [f"blocks of {state.block} are cut to groups of {state.group}"] if state.group < state.block else []
    grid = Grid("nf4-single", (1, state.group), torch.float32)
    taken = Taken.widened if notes else Taken.exact
    return ForeignWeight(*(name, keys, state.shape, grid), partial(_parts, store, name, state), taken, "; ".join(notes))


def _state(store: Store, key: str) -> State:
    """The JSON of a weight. Raises `CheckpointError` for what is none or says something impossible."""
    (size,) = store.rank(key, _BYTES, 1)
    if size > _LARGEST_STATE:
        raise CheckpointError(f"the state of a weight has {size} bytes", where=key)
    try:
        found = json.loads(bytes(store.read(key).tolist()))
        rows, columns = found["shape"]
        nested = None
        if "nested_offset" in found:
            nested = integer(found, "nested_blocksize"), float(found["nested_offset"])
        state = State((integer({"rows": rows}, "rows"), integer({"columns": columns}, "columns")), 0, nested)
        state = state._replace(block=integer(found, "blocksize"))
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"cannot read the state of a weight: {short(str(error))}", where=key) from error
    if state.nested is not None and not math.isfinite(state.nested[1]):
        raise CheckpointError("the offset of the scales is no number", where=key)
    return state


def _check_tensors(store: Store, name: str, state: State) -> Tensor:
    """The table of values, float32 [16], after all shapes were found to agree with the state."""
    if name not in store or 2 * store.nbytes(name) != math.prod(state.shape) + math.prod(state.shape) % 2:
        raise CheckpointError(f"the codes are not those of a weight {state.shape}", where=name)
    store.expect(f"{name}.absmax", _BYTES if state.nested else _FLOAT, (state.blocks,))
    store.expect(f"{name}.quant_map", _FLOAT, (16,))
    if state.nested:
        store.expect(f"{name}.nested_absmax", _FLOAT, (-(-state.blocks // state.nested[0]),))
        store.expect(f"{name}.nested_quant_map", _FLOAT, (256,))
    return store.read(f"{name}.quant_map")


def _codes(store: Store, name: str, state: State) -> Tensor:
    """Flat bytes with the first code in the low nibble."""
    stored = store.read(name).contiguous().view(torch.uint8).flatten()  # the storage may have any dtype
    return swap_nibbles(stored)


def _absmax(store: Store, name: str, state: State) -> Tensor:
    """The scale of each block, float32 [blocks]."""
    absmax = store.read(f"{name}.absmax")
    if state.nested is None:
        return absmax
    size, offset = state.nested
    outer = store.read(f"{name}.nested_absmax")[torch.arange(state.blocks) // size]
    return store.read(f"{name}.nested_quant_map")[absmax.long()] * outer + offset


def _parts(store: Store, name: str, state: State) -> Parts:
    (rows, columns), packed = state.shape, _codes(store, name, state)
    if columns % 2:
        packed = pack(unpack(packed, 4, rows * columns).view(rows, columns), 4)
    groups = columns // state.group
    block_of_group = torch.arange(rows * groups) * state.group // state.block
    return {"qdata": packed.view(rows, -1), "scale": _absmax(store, name, state)[block_of_group].view(rows, groups)}


def _decode(store: Store, name: str, state: State, table: Tensor) -> Tensor:
    count = math.prod(state.shape)
    values = table[unpack(_codes(store, name, state), 4, count).long()]
    return values.mul_(_absmax(store, name, state)[torch.arange(count) // state.block]).view(state.shape)


def _rows_of_int8(store: Store, module: str) -> ForeignWeight:
    rows, columns = store.rank(f"{module}.weight", (torch.int8,), 2)
    store.expect(f"{module}.SCB", _FLOAT, (rows,))
    keys = tuple(key for part in ("weight", "SCB", "weight_format") if (key := f"{module}.{part}") in store)
    return ForeignWeight(
        *(f"{module}.weight", keys, (rows, columns), Grid("int8", (1, columns), torch.float32)),
        partial(_int8_parts, store, module),
        Taken.rounded,
        "scale = SCB / 127 in float32; outliers among inputs are not treated apart",
    )


def _int8_parts(store: Store, module: str) -> Parts:
    codes = store.read(f"{module}.weight").view(torch.uint8) ^ 128  # plus 128
    return {"qdata": codes, "scale": store.read(f"{module}.SCB").unsqueeze(-1) / 127}


BITSANDBYTES = Reader("bitsandbytes", claims, weights)
