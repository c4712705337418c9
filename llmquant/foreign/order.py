"""Which group a column belongs to, where a checkpoint says so column by column (`g_idx`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmquant.errors import CheckpointError
from llmquant.foreign.spec import Parts
from llmquant.foreign.store import Store
from llmquant.packing.bits import unpack

SCATTERED = "its columns were put into groups by activation order (desc_act): they are no neighbours"


class Sizes(NamedTuple):
    """Of one weight: outputs, inputs, bits, group size and groups a row."""

    rows: int
    columns: int
    bits: int
    group: int
    groups: int


def scattered_groups(store: Store, key: str, sizes: Sizes) -> Tensor | None:
    """The group of each column, int64 [columns]; None where groups are neighbours, as ours are.

    Raises:
        CheckpointError: for another shape, and for a group that has no scale.
    """
    if key not in store:
        return None
    store.expect(key, (torch.int32, torch.int64), (sizes.columns,))
    found = store.read(key).long()
    if bool((found == -1).all()):
        return None  # never set
    if int(found.min()) < 0 or int(found.max()) >= sizes.groups:
        raise CheckpointError(f"a column belongs to no group of 0 to {sizes.groups - 1}", where=key)
    return None if torch.equal(found, torch.arange(sizes.columns) // sizes.group) else found


def decode_scattered(parts: Parts, sizes: Sizes, order: Tensor) -> Tensor:
    """Values of integers whose groups are not neighbours, float32 [rows, columns]."""
    codes = unpack(parts["qdata"], sizes.bits, sizes.columns).float()
    if "zero_point" in parts:
        codes -= unpack(parts["zero_point"], sizes.bits, sizes.groups).float()[:, order]
    else:
        codes -= 2 ** (sizes.bits - 1)
    return codes.mul_(parts["scale"].float()[:, order])
