"""compressed-tensors checkpoints, as LLM Compressor writes them and vLLM reads them.

value = (code - zero) * scale   of integers,   number * scale   of small floats   (its `dequantize`)

Signed integers are stored plus 2^(bits - 1), densely in int32 words along the inputs (`pack-quantized`, from the lowest
bits on), or as int8 (`int-quantized`); small floats as they are. A config has several groups of settings and says by
patterns of names which weight has which. The tensors' own shapes say it too: the one group that fits them is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmquant.errors import CheckpointError
from llmquant.foreign.order import SCATTERED, Sizes, decode_scattered, scattered_groups
from llmquant.foreign.settings import integer, mapping, short, text
from llmquant.foreign.spec import FLOATS, ForeignWeight, Grid, Parts, Reader, Taken
from llmquant.foreign.store import Store
from llmquant.foreign.words import WORD, codes_of, rows_of, spaced_codes, words
from llmquant.packing.bits import pack

_INT32, _INT8, _BYTES = (torch.int32,), (torch.int8,), (torch.uint8,)
_FLOAT8 = {torch.float8_e4m3fn: "float8", torch.float8_e5m2: "float8-e5m2"}
_MX_GROUP, _NV_GROUP = 32, 16


class Args(NamedTuple):
    """One group's settings of weights: their type, `int` or `float`, and what shares a scale."""

    kind: str
    bits: int
    strategy: str
    group_size: int
    block: tuple[int, int]

    def shared(self, rows: int, columns: int) -> tuple[int, int]:
        """(rows, columns) that share a scale."""
        known = {
            "tensor": (rows, columns),
            "channel": (1, columns),
            "group": (1, self.group_size),
            "tensor_group": (1, self.group_size),
            "block": self.block,
        }
        tall, wide = known[self.strategy]
        return min(tall, rows), min(wide, columns)


Hypothesis = Callable[[Store, str, Args], ForeignWeight | None]
"""A weight under a group's settings, or None where they do not fit its tensors."""


def claims(config: Mapping[str, Any]) -> bool:
    """Whether this is compressed-tensors'."""
    return config.get("quant_method") == "compressed-tensors" or isinstance(config.get("config_groups"), Mapping)


def weights(store: Store, config: Mapping[str, Any]) -> Iterator[ForeignWeight]:
    """The weights of all modules with packed codes, or codes and scales."""
    _refuse_transforms(config)
    groups = list(dict.fromkeys(_args(config)))
    for key in store:
        module, _, part = key.rpartition(".")
        if part == "weight_packed":
            yield _fitting(store, module, groups, _packed if store.dtype(key) is torch.int32 else _small_floats)
        elif part == "weight_scale" and f"{module}.weight" in store:
            yield _fitting(store, module, groups, _naive)


def warnings(config: Mapping[str, Any]) -> Iterator[str]:
    """What of the config is not taken over."""
    for name, group in mapping(config, "config_groups").items():
        if isinstance(group, Mapping) and group.get("input_activations"):
            yield f"{short(name)}: inputs were quantized too there; here they stay as they are"
    if config.get("kv_cache_scheme"):
        yield "the cache of keys and values was quantized there; here it stays as it is"


def _refuse_transforms(config: Mapping[str, Any]) -> None:
    for name in ("transform_config", "sparsity_config"):
        found = mapping(config, name)
        if found and found.get("format") != "dense" and any(found.values()):
            raise CheckpointError(f"{name} of compressed-tensors is not imported", where="config.json")


def _args(config: Mapping[str, Any]) -> Iterator[Args]:
    for name, group in mapping(config, "config_groups").items():
        if not isinstance(group, Mapping):
            raise CheckpointError(f"the group {short(name)} is a preset's name", where="config.json: config_groups")
        found = mapping(group, "weights")
        if found:
            yield _one_args(found)


def _one_args(found: Mapping[str, Any]) -> Args:
    size, block = found.get("group_size"), found.get("block_structure")
    strategy = text(found, "strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy not in ("tensor", "channel", "group", "tensor_group", "block"):
        raise CheckpointError(f"weights cannot share scales by {short(strategy)}", where="config.json: config_groups")
    sides = block if isinstance(block, list) and len(block) == 2 else [1, 1]
    return Args(
        text(found, "type") or "int",
        integer(found, "num_bits", default=8),
        strategy,
        integer(found, "group_size", default=1, least=1 if "group" in strategy else -1),
        (integer({"block": sides[0]}, "block"), integer({"block": sides[1]}, "block")),
    )


def _fitting(store: Store, module: str, groups: list[Args], hypothesis: Hypothesis) -> ForeignWeight:
    """The weight under the settings that fit its tensors. Raises `CheckpointError` for none, and for several."""
    fitting = [found for args in groups if (found := hypothesis(store, module, args)) is not None]
    if not fitting:
        shapes = {key.rpartition(".")[2]: store.shape(key) for key in _keys(store, module)}
        raise CheckpointError(f"no group of config_groups fits the tensors {shapes}", where=module)
    if any((other.grid, other.shape) != (fitting[0].grid, fitting[0].shape) for other in fitting):
        raise CheckpointError("several groups of config_groups fit the tensors", where=module)
    return fitting[0]


def _keys(store: Store, module: str) -> tuple[str, ...]:
    parts = ("weight", "packed", "shape", "scale", "global_scale", "zero_point", "g_idx")
    keys = (f"{module}.weight" if part == "weight" else f"{module}.weight_{part}" for part in parts)
    return tuple(key for key in keys if key in store)


def _scales_fit(store: Store, module: str, rows: int, columns: int, block: tuple[int, int]) -> bool:
    """Whether there is a scale for each block; a single one may stand without dimensions."""
    shape, count = store.shape(f"{module}.weight_scale"), (-(-rows // block[0]), -(-columns // block[1]))
    return shape == count or (count == (1, 1) and shape in ((1,), ()))


# -------------------------------------------------------------------------------- integers in words


def _packed(store: Store, module: str, args: Args) -> ForeignWeight | None:
    rows, width = store.rank(f"{module}.weight_packed", _INT32, 2)
    columns = _columns(store, f"{module}.weight_shape", rows)
    block = args.shared(rows, columns)
    store.expect(f"{module}.weight_scale", FLOATS)
    spaced = width != words(columns, args.bits)
    fits = args.kind == "int" and 1 < args.bits <= 8 and _scales_fit(store, module, rows, columns, block)
    if not fits or width not in (words(columns, args.bits), _spaced(columns, args.bits)):
        return None
    groups, zero_point = -(-columns // block[1]), f"{module}.weight_zero_point"
    if zero_point in store:
        height = _spaced(rows, args.bits) if spaced else words(rows, args.bits)
        store.expect(zero_point, _INT32, (height, groups))
    sizes = Sizes(rows, columns, args.bits, block[1], groups)
    return _integers(store, module, sizes, block, partial(_packed_parts, store, module, sizes, spaced))


def _columns(store: Store, key: str, rows: int) -> int:
    """The inputs of a weight, as `weight_shape` has them."""
    store.expect(key, (torch.int64, torch.int32), (2,))
    shape = store.read(key).tolist()
    if shape[0] != rows or shape[1] < 1:
        raise CheckpointError(f"the weight has {rows} packed rows and the shape {shape}", where=key)
    return int(shape[1])


def _spaced(length: int, bits: int) -> int:
    """Words of codes that never straddle two, as older releases pack 3, 5, 6 and 7 bits."""
    return -(-length // (WORD // bits))


def _packed_parts(store: Store, module: str, sizes: Sizes, spaced: bool) -> Parts:
    packed, zero_point = store.read(f"{module}.weight_packed"), f"{module}.weight_zero_point"
    if spaced:
        qdata = pack(spaced_codes(packed, sizes.columns, sizes.bits), sizes.bits)
    else:
        qdata = rows_of(packed, sizes.columns, sizes.bits)
    parts = {"qdata": qdata, "scale": _scale(store, module)}
    if zero_point in store:
        unpacked = spaced_codes if spaced else codes_of
        zeros = unpacked(store.read(zero_point).t().contiguous(), sizes.rows, sizes.bits)
        parts["zero_point"] = pack(zeros.t().contiguous(), sizes.bits)
    return parts


def _integers(
    store: Store, module: str, sizes: Sizes, block: tuple[int, int], parts: Callable[[], Parts]
) -> ForeignWeight:
    """Integer codes, unless their groups are none that ours can be."""
    name, keys, shape = f"{module}.weight", _keys(store, module), (sizes.rows, sizes.columns)
    if block[0] not in (1, sizes.rows) or (block[0] > 1 and block[1] != sizes.columns):
        raise CheckpointError("integers with scales of square blocks are not imported", where=module)
    order = scattered_groups(store, f"{module}.weight_g_idx", sizes)
    if order is not None:
        return ForeignWeight(
            *(name, keys, shape, None, None),
            taken=Taken.requantized,
            note=SCATTERED,
            decode=lambda: decode_scattered(parts(), sizes, order),
        )
    asymmetric = f"{module}.weight_zero_point" in store
    grid = Grid(f"int{sizes.bits}", block, store.dtype(f"{module}.weight_scale"), asymmetric)
    return ForeignWeight(name, keys, shape, grid, parts)


def _scale(store: Store, module: str) -> Tensor:
    """Scales with two dimensions."""
    scale = store.read(f"{module}.weight_scale")
    return scale if scale.dim() == 2 else scale.reshape(1, 1)


# -------------------------------------------------------------------------------- codes of one byte


def _naive(store: Store, module: str, args: Args) -> ForeignWeight | None:
    rows, columns = store.rank(f"{module}.weight", (torch.int8, *_FLOAT8), 2)
    dtype, block = store.dtype(f"{module}.weight"), args.shared(rows, columns)
    if (dtype is torch.int8) != (args.kind == "int") or not _scales_fit(store, module, rows, columns, block):
        return None
    if dtype is torch.int8:
        return _int8(store, module, args, Sizes(rows, columns, args.bits, block[1], -(-columns // block[1])))
    if store.dtype(f"{module}.weight_scale") is torch.uint8:
        return _mxfp8(store, module, rows, columns) if block == (1, min(_MX_GROUP, columns)) else None
    store.expect(f"{module}.weight_scale", FLOATS)
    grid = Grid(_FLOAT8[dtype], block, store.dtype(f"{module}.weight_scale"))
    keys = _keys(store, module)
    return ForeignWeight(f"{module}.weight", keys, (rows, columns), grid, partial(_float8_parts, store, module))


def _int8(store: Store, module: str, args: Args, sizes: Sizes) -> ForeignWeight | None:
    store.expect(f"{module}.weight_scale", FLOATS)
    zero_point, block = f"{module}.weight_zero_point", args.shared(sizes.rows, sizes.columns)
    if not 1 < sizes.bits <= 8:
        return None
    if zero_point in store:
        store.expect(zero_point, _INT8, store.shape(f"{module}.weight_scale"))
    return _integers(store, module, sizes, block, partial(_int8_parts, store, module, sizes))


def _int8_parts(store: Store, module: str, sizes: Sizes) -> Parts:
    parts = {"qdata": _unsigned(store, f"{module}.weight", sizes.bits), "scale": _scale(store, module)}
    if f"{module}.weight_zero_point" in store:
        parts["zero_point"] = _unsigned(store, f"{module}.weight_zero_point", sizes.bits)
    return parts


def _unsigned(store: Store, key: str, bits: int) -> Tensor:
    """Signed codes, one a byte, as packed unsigned ones. Raises `CheckpointError` for a code out of range."""
    codes, middle = store.read(key), 2 ** (bits - 1)
    low, high = torch.aminmax(codes)
    if int(low) < -middle or int(high) >= middle:
        raise CheckpointError(f"codes from {int(low)} to {int(high)} are not of {bits} bits", where=key)
    codes = codes if codes.dim() == 2 else codes.reshape(1, 1)
    return pack((codes.short() + middle).to(torch.uint8), bits)


def _float8_parts(store: Store, module: str) -> Parts:
    return {"qdata": store.read(f"{module}.weight").view(torch.uint8), "scale": _scale(store, module)}


def _mxfp8(store: Store, module: str, rows: int, columns: int) -> ForeignWeight:
    element = _FLOAT8[store.dtype(f"{module}.weight")].replace("float8", "mxfp8")
    grid = Grid(element, (1, min(_MX_GROUP, columns)), torch.float8_e8m0fnu)
    keys = _keys(store, module)
    return ForeignWeight(f"{module}.weight", keys, (rows, columns), grid, partial(_float8_parts, store, module))


# -------------------------------------------------------------------------------- small floats, two a byte


def _small_floats(store: Store, module: str, args: Args) -> ForeignWeight | None:
    rows, width = store.rank(f"{module}.weight_packed", _BYTES, 2)
    columns, scaled = 2 * width, f"{module}.weight_global_scale" in store
    group = _NV_GROUP if scaled else _MX_GROUP
    store.expect(f"{module}.weight_scale", (torch.float8_e4m3fn,) if scaled else _BYTES, (rows, -(-columns // group)))
    if (args.kind, args.bits, args.group_size) != ("float", 4, group):
        return None
    name, keys, shape, block = f"{module}.weight", _keys(store, module), (rows, columns), (1, min(group, columns))
    if not scaled:
        grid = Grid("mxfp4", block, torch.float8_e8m0fnu)
        return ForeignWeight(name, keys, shape, grid, partial(_fp4_parts, store, module, None))
    tensor_scale, exact = _inverse(store, f"{module}.weight_global_scale")
    return ForeignWeight(
        *(name, keys, shape, Grid("nvfp4", block, torch.float8_e4m3fn)),
        partial(_fp4_parts, store, module, tensor_scale),
        Taken.exact if exact else Taken.rounded,
        "" if exact else "scales are divided by that of the tensor there, and multiplied with its inverse here",
    )


def _inverse(store: Store, key: str) -> tuple[Tensor, bool]:
    """1 / the scale of a whole tensor, float32 [1, 1], and whether nothing was rounded."""
    store.expect(key, (torch.float32,), (1,), ())
    scale = store.read(key).reshape(1, 1)
    inverse = 1 / scale
    if not bool(scale > 0) or not bool(torch.isfinite(inverse)) or not bool(inverse > 0):
        raise CheckpointError(f"the scale of a tensor is {float(scale)}", where=key)
    return inverse, float(torch.frexp(scale).mantissa) == 0.5


def _fp4_parts(store: Store, module: str, tensor_scale: Tensor | None) -> Parts:
    scale = store.read(f"{module}.weight_scale").view(torch.uint8)
    parts = {"qdata": store.read(f"{module}.weight_packed"), "scale": scale}
    return parts if tensor_scale is None else parts | {"tensor_scale": tensor_scale}


COMPRESSED_TENSORS = Reader("compressed-tensors", claims, weights, warnings)
