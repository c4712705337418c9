"""Entries of the manifest, checked against the table of formats and in themselves before a tensor is made of one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from llmquant.formats import SCALE_CODES, Format, get_format

HIGHEST_RANK = 8
_LARGEST = 2**31 - 1  # rows, columns and blocks: what native code can count with
_SCALE_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float16, torch.bfloat16, torch.float32)}
_CODES = tuple(SCALE_CODES.values())


def check_entry(described: Any) -> Format:
    """The format of an entry in which all is as `docs/format.md` has it; fields that it does not name are ignored.

    Raises:
        ValueError: with the field that cannot be, and why. `ConfigError`, for an unknown format, is one, too.
    """
    if not isinstance(described, Mapping):
        raise ValueError(f"an entry is an object, not {described!r:.100}")
    name = _typed(described, "format", str)
    fmt = get_format(name)
    if described.get("bits", fmt.bits) != fmt.bits:
        raise ValueError(f"bits of {name} are {fmt.bits}, not {described['bits']!r:.100}")
    _check_shape(described, fmt)
    _typed(described, "transposed", bool)
    if _typed(described, "asymmetric", bool) and not fmt.asymmetric:
        raise ValueError(f"{name} has no zero points")
    if scale_dtype(described, fmt) in _CODES and described["block"][0] != 1:
        raise ValueError("scales of one byte belong to groups within a row")
    return fmt


def scale_dtype(described: Mapping[str, Any], fmt: Format) -> torch.dtype:
    """What scales are, by name. Raises `ValueError` for what the format does not store them as."""
    name = _typed(described, "scale_dtype", str)
    known = dict(_SCALE_DTYPES)
    known |= {str(t).removeprefix("torch."): t for t in (*fmt.scale_dtypes, *_CODES)}
    if name not in known or not fmt.allows_scales(known[name]):
        raise ValueError(f"{fmt.name} has no scales of {name!r:.100}")
    return known[name]


def _check_shape(described: Mapping[str, Any], fmt: Format) -> None:
    shape, block = (_counts(described, key) for key in ("shape", "block"))
    if not 2 <= len(shape) <= HIGHEST_RANK or math.prod(shape) > 2**60:
        raise ValueError(f"{shape!r:.200} is no shape of a weight")
    if len(block) != 2:
        raise ValueError(f"a block is [rows, columns], not {block!r:.100}")
    columns = shape[-2 if described.get("transposed") is True else -1]
    if block[0] > 1 and not {"tensor", "block"} & set(fmt.granularities):
        raise ValueError(f"blocks of {fmt.name} lie within a row, and are not {block}")
    if fmt.fixed_group and block[1] not in (fmt.group_size, columns):
        raise ValueError(f"groups of {fmt.name} have {fmt.group_size} columns, not {block[1]}")


def _counts(described: Mapping[str, Any], key: str) -> list[int]:
    values = _typed(described, key, list)
    if not all(type(n) is int and 0 < n <= _LARGEST for n in values):
        raise ValueError(f"{key} is a list of positive numbers, not {values!r:.200}")
    return values


def _typed(described: Mapping[str, Any], key: str, kind: type) -> Any:
    if key not in described:
        raise ValueError(f"there is no {key!r}")
    if type(described[key]) is not kind:
        raise ValueError(f"{key} is a {kind.__name__}, not {described[key]!r:.100}")
    return described[key]
