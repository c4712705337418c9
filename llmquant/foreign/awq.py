"""AWQ checkpoints in the `gemm` layout of AutoAWQ (AutoRound writes it too): `qweight`, `qzeros`, `scales`.

value[k, n] = (code[k, n] - zero[g, n]) * scale[g, n],   g = k // group_size   (AutoAWQ, `dequantize_gemm`)

Codes and zero points lie along the outputs, qweight [K, N / 8], qzeros [K / group_size, N / 8], eight to a word in the
order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmquant.foreign.settings import flag, integer, mapping, one_of, text
from llmquant.foreign.spec import FLOATS, ForeignWeight, Grid, Parts, Reader
from llmquant.foreign.store import Store
from llmquant.foreign.words import codes_of
from llmquant.packing.bits import pack

BITS, CODES_A_WORD = 4, 8
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word the outputs 0 to 7 lie."""
MIDDLES = 0x88888888 - 2**32
"""A word of zero points that all are the middle code."""
_INT32 = (torch.int32,)


def claims(config: Mapping[str, Any]) -> bool:
    """Whether this is AutoAWQ's, or AutoRound's in its layout."""
    return config.get("quant_method") == "awq" or config.get("packing_format") == "auto_round:auto_awq"


def weights(store: Store, config: Mapping[str, Any]) -> Iterator[ForeignWeight]:
    """The weights of all modules with a `qweight`."""
    one_of({"version": text(config, "version")}, "version", ("", "gemm"))
    one_of({"bits": integer(config, "bits", "w_bit")}, "bits", (BITS,))
    size = integer(config, "group_size", "q_group_size", least=-1)
    varied = bool(mapping(config, "extra_config"))
    for key in store:
        if key.endswith(".qweight"):
            yield _weight(store, key.removesuffix(".qweight"), size, varied, flag(config, "zero_point", True))


def _weight(store: Store, module: str, size: int, varied: bool, asymmetric: bool) -> ForeignWeight:
    qweight, qzeros, scales = (f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))
    columns, packed = store.rank(qweight, _INT32, 2)
    rows, group = packed * CODES_A_WORD, size if size > 0 else columns
    if varied:
        group = -(-columns // store.rank(scales, FLOATS, 2)[0])
    groups = -(-columns // group)
    store.expect(qzeros, _INT32, (groups, packed))
    store.expect(scales, FLOATS, (groups, rows))
    asymmetric = asymmetric or bool((store.read(qzeros) != MIDDLES).any())
    grid = Grid(f"int{BITS}", (1, min(group, columns)), store.dtype(scales), asymmetric)
    keys = (qweight, qzeros, scales)
    return ForeignWeight(
        f"{module}.weight", keys, (rows, columns), grid, partial(_parts, store, keys, rows, asymmetric)
    )


def _parts(store: Store, keys: tuple[str, ...], rows: int, asymmetric: bool) -> Parts:
    qweight, qzeros, scales = map(store.read, keys)
    parts = {"qdata": pack(_codes(qweight, rows), BITS), "scale": scales.t()}
    if asymmetric:
        parts["zero_point"] = pack(_codes(qzeros, rows), BITS)
    return parts


def _codes(packed: Tensor, rows: int) -> Tensor:
    """Words [X, N / 8] -> codes, uint8 [N, X]."""
    stored = codes_of(packed, rows, BITS).unflatten(-1, (-1, CODES_A_WORD))
    return stored[..., list(ORDER)].flatten(-2).t().contiguous()


AWQ = Reader("AWQ", claims, weights)
