"""What a reader of another library's checkpoints must offer: each quantized weight as components of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoint.state import assemble, component_key, entry, expected
from llmquant.errors import CheckpointError
from llmquant.foreign.store import Store
from llmquant.formats import get_format
from llmquant.tensor import Meta, QuantizedTensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""What scales may be stored in, here and there."""

Parts = dict[str, Tensor]
"""Components of a weight by field: `qdata`, `scale`, ... as `kernels.packed.Packed` has them."""


_NO_NUMBERS = {"e4m3fn": 0x7F, "e5m2": 0x7C}
"""The lowest code, without its sign, that is NaN or infinity."""


class Taken(StrEnum):
    """How a weight was taken over, best first.

    exact: the same codes, scales and zero points.
    widened: the same values, with scales that take more room than there.
    rounded: the same codes; a scale that was a product or a quotient is rounded once to float32.
    requantized: decoded and quantized again, or left plain.
    """

    exact = "exact"
    widened = "scale widened"
    rounded = "scale rounded"
    requantized = "requantized"


@dataclass(frozen=True)
class Grid:
    """Which of our formats holds a weight, and how.

    Attributes:
        format: a name in the table of formats.
        block: (rows, columns) that share a scale.
        scale_dtype: how scales are stored.
        asymmetric: whether there are zero points.
    """

    format: str
    block: tuple[int, int]
    scale_dtype: torch.dtype
    asymmetric: bool = False

    def entry(self, shape: tuple[int, int]) -> dict[str, Any]:
        """The manifest's entry of a weight [out, in]."""
        return entry(Meta(self.format, self.block, shape[1]), shape, self.scale_dtype, self.asymmetric)


@dataclass(frozen=True)
class ForeignWeight:
    """One quantized weight of another library's checkpoint, known from headers and small tensors alone.

    Attributes:
        name: the key that a plain checkpoint would have for it.
        keys: the tensors that it is made of.
        shape: [out, in].
        grid: how ours hold it, or None.
        taken: how exactly.
        note: what is worth saying of that; where there is no grid, why.
        parts: reads its tensors and lays them out as ours.
        decode: reads its tensors and gives the values, float32 [out, in]; None takes them from `parts`.
    """

    name: str
    keys: tuple[str, ...]
    shape: tuple[int, int]
    grid: Grid | None
    parts: Callable[[], Parts] | None
    taken: Taken = Taken.exact
    note: str = ""
    decode: Callable[[], Tensor] | None = None

    def sketch(self, dtype: torch.dtype) -> QuantizedTensor:
        """The weight without its values, on the meta device."""
        assert self.grid is not None
        described = self.grid.entry(self.shape)
        kinds = expected(self.name, described).items()
        return assemble(
            self.name,
            described,
            {key: torch.empty(shape, dtype=kind, device="meta") for key, (kind, shape) in kinds},
            dtype,
        )

    def load(self, dtype: torch.dtype) -> QuantizedTensor:
        """The weight. Raises `CheckpointError` for values that the format does not allow."""
        assert self.grid is not None and self.parts is not None
        parts = self.parts()
        _check_values(self.name, self.grid, parts)
        tensors = {component_key(self.name, field): tensor.contiguous() for field, tensor in parts.items()}
        tensors[self.name] = tensors[self.name].unsqueeze(-1)
        return assemble(self.name, self.grid.entry(self.shape), tensors, dtype)

    def values(self) -> Tensor:
        """What the weight stands for, float32 [out, in]."""
        if self.decode is not None:
            return self.decode()
        return self.load(torch.float32).dequantize()


@dataclass(frozen=True)
class Reader:
    """One kind of checkpoint: a row of the table `READERS`.

    Attributes:
        name: for people.
        claims: whether a `quantization_config` is of this kind.
        weights: the quantized weights of a checkpoint, in any order. Raises `CheckpointError` or `ConfigError` for
            tensors or a config that it cannot make sense of.
        warnings: what of a config is not taken over.
    """

    name: str
    claims: Callable[[Mapping[str, Any]], bool]
    weights: Callable[[Store, Mapping[str, Any]], Iterator[ForeignWeight]]
    warnings: Callable[[Mapping[str, Any]], Iterator[str]] = lambda config: iter(())


def _check_values(name: str, grid: Grid, parts: Parts) -> None:
    """Refuses scales and codes that are no numbers: the format promises that there are none."""
    fmt = get_format(grid.format)
    for field in ("scale", "tensor_scale", "row_scale"):
        scale = parts.get(field)
        if scale is None:
            continue
        if field == "scale" and grid.scale_dtype.itemsize == 1 and grid.scale_dtype.is_floating_point:
            scale = scale.view(grid.scale_dtype).float()
        if scale.is_floating_point() and not bool(torch.isfinite(scale).all()):
            raise CheckpointError("a scale is NaN or infinite", where=f"{name} ({field})", hint="copy the model again")
    lowest = _NO_NUMBERS.get(fmt.element)
    if lowest is not None and bool(((parts["qdata"] & 0x7F) >= lowest).any()):
        raise CheckpointError("a float8 code is NaN or infinite", where=name, hint="copy the model again")
