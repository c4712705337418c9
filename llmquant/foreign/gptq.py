"""GPTQ checkpoints, as AutoGPTQ, GPTQModel and AutoRound write them: `qweight`, `qzeros`, `scales`, `g_idx`.

value[k, n] = (code[k, n] - zero[g, n]) * scale[g, n],   g = g_idx[k]   (AutoGPTQ, `QuantLinear`)

Codes lie in int32 words densely along the inputs, qweight [K * bits / 32, N]: turned over, that is our bit stream.
Zero points lie along the outputs, qzeros [G, N * bits / 32]. The first version of the format stores them less one,
modulo 2^bits; `gptq_v2` as they are. Columns of a group that do not lie together (`desc_act` without static groups)
have no place in a format whose groups are neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmquant.errors import CheckpointError
from llmquant.foreign.order import SCATTERED, Sizes, decode_scattered, scattered_groups
from llmquant.foreign.settings import flag, integer, mapping, one_of, text
from llmquant.foreign.spec import FLOATS, ForeignWeight, Grid, Parts, Reader, Taken
from llmquant.foreign.store import Store
from llmquant.foreign.words import WORD, codes_of, rows_of
from llmquant.packing.bits import pack

WIDTHS = (2, 3, 4, 8)
_INT32 = (torch.int32,)
_AUTO_ROUND = {"auto_round:auto_gptq": 1, "auto_round": 2, "auto_round:gptqmodel": 2}


class Layout(NamedTuple):
    """What a config says of all weights.

    bits, group_size: of weights without a setting of their own; group_size -1 is the whole row.
    varied: whether weights may have others.
    symmetric: whether zero points are said to be the middle code.
    offset: what is to be added to stored zero points, modulo 2^bits.
    carries: whether the offset was taken off whole words, so that codes below it borrowed from their neighbours.
    """

    bits: int
    group_size: int
    varied: bool
    symmetric: bool
    offset: int
    carries: bool


def claims(config: Mapping[str, Any]) -> bool:
    """Whether this is GPTQ's, or AutoRound's in GPTQ's layout."""
    method = config.get("quant_method")
    return method == "gptq" or (method in ("auto-round", "auto_round", "intel/auto-round") and _packing(config) != "")


def weights(store: Store, config: Mapping[str, Any]) -> Iterator[ForeignWeight]:
    """The weights of all modules with a `qweight`."""
    layout = read_layout(config)
    for key in store:
        if key.endswith(".qweight"):
            yield _weight(store, key.removesuffix(".qweight"), layout)


def read_layout(config: Mapping[str, Any]) -> Layout:
    """The settings. Raises `CheckpointError` for variants of the format that are not read."""
    if flag(config, "planar", False):
        raise CheckpointError("the planar variant of GPTQ is not imported", where="config.json")
    if config.get("quant_method") == "gptq":
        version = {"": 1, "gptq": 1, "gptq_v2": 2}
        found = version[one_of({"f": text(config, "checkpoint_format")}, "f", version)]
    else:
        found = _AUTO_ROUND[_packing(config)]
    return Layout(
        integer(config, "bits"),
        integer(config, "group_size", default=-1, least=-1),
        bool(mapping(config, "dynamic") or mapping(config, "extra_config")),
        flag(config, "sym", False),
        offset=1 if found == 1 else 0,
        carries=_by_gptqmodel(config),
    )


def _packing(config: Mapping[str, Any]) -> str:
    found = config.get("packing_format", "auto_round:auto_gptq")
    return found if isinstance(found, str) and found in _AUTO_ROUND else ""


def _by_gptqmodel(config: Mapping[str, Any]) -> bool:
    writer = mapping(config, "meta").get("quantizer")
    names = writer if isinstance(writer, list) else [writer]
    return any(isinstance(name, str) and name.startswith("gptqmodel") for name in names)


def _weight(store: Store, module: str, layout: Layout) -> ForeignWeight:
    qweight, qzeros, scales, g_idx = (f"{module}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))
    sizes = _sizes(store, module, layout)
    zeros = _zeros(store.read(qzeros), sizes, layout)
    symmetric = layout.symmetric and bool((zeros == 2 ** (sizes.bits - 1)).all())
    order = scattered_groups(store, g_idx, sizes)
    keys = (qweight, qzeros, scales, *([g_idx] if g_idx in store else []))
    common = (f"{module}.weight", keys, (sizes.rows, sizes.columns))
    if order is not None:
        return ForeignWeight(
            *common,
            grid=None,
            parts=None,
            taken=Taken.requantized,
            note=SCATTERED,
            decode=partial(_decode, store, module, sizes, layout, order),
        )
    grid = Grid(f"int{sizes.bits}", (1, sizes.group), store.dtype(scales), asymmetric=not symmetric)
    return ForeignWeight(*common, grid, partial(_parts, store, module, sizes, layout, symmetric))


def _sizes(store: Store, module: str, layout: Layout) -> Sizes:
    """The sizes of a weight, all tensors in agreement on them and on the config."""
    packed, rows = store.rank(f"{module}.qweight", _INT32, 2)
    groups, outputs = store.rank(f"{module}.scales", FLOATS, 2)
    across = store.rank(f"{module}.qzeros", _INT32, 2)[1]
    bits = across * WORD // rows
    if (outputs, bits * rows) != (rows, across * WORD) or bits not in WIDTHS or packed * WORD % bits:
        raise CheckpointError(f"qweight, qzeros and scales do not fit each other in {bits} bits", where=module)
    if bits != layout.bits and not layout.varied:
        raise CheckpointError(f"the weight has {bits} bits, config.json says {layout.bits}", where=module)
    columns = packed * WORD // bits
    group = layout.group_size if layout.group_size > 0 else columns
    if layout.varied and -(-columns // group) != groups:
        group = columns // groups
    store.expect(f"{module}.scales", FLOATS, (-(-columns // max(group, 1)), rows))
    store.expect(f"{module}.qzeros", _INT32, (groups, across))
    return Sizes(rows, columns, bits, min(group, columns), groups)


def _zeros(qzeros: Tensor, sizes: Sizes, layout: Layout) -> Tensor:
    """Zero points as they are meant, uint8 [G, N]."""
    if layout.offset and layout.carries and sizes.bits != 3:
        step = sum(layout.offset << at for at in range(0, WORD, sizes.bits))
        qzeros = (qzeros.long() + step).to(torch.int32)
        return codes_of(qzeros, sizes.rows, sizes.bits)
    return (codes_of(qzeros, sizes.rows, sizes.bits) + layout.offset) & (2**sizes.bits - 1)


def _parts(store: Store, module: str, sizes: Sizes, layout: Layout, symmetric: bool) -> Parts:
    parts = {
        "qdata": rows_of(store.read(f"{module}.qweight").t(), sizes.columns, sizes.bits),
        "scale": store.read(f"{module}.scales").t(),
    }
    if not symmetric:
        zeros = _zeros(store.read(f"{module}.qzeros"), sizes, layout)
        parts["zero_point"] = pack(zeros.t().contiguous(), sizes.bits)
    return parts


def _decode(store: Store, module: str, sizes: Sizes, layout: Layout, order: Tensor) -> Tensor:
    return decode_scattered(_parts(store, module, sizes, layout, symmetric=False), sizes, order)


GPTQ = Reader("GPTQ", claims, weights)
