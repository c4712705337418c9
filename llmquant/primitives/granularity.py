"""Which elements of a weight share a scale. Always said of the logical [out, in] matrix."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from llmquant.errors import ConfigError


class MappingType(enum.Enum):
    """Whether zero sits in the middle of the code range or is shifted by a zero point."""

    SYMMETRIC = "symmetric"
    ASYMMETRIC = "asymmetric"


@dataclass(frozen=True)
class Granularity:
    """Base of all granularities."""


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for the whole matrix (for each expert of a 3-D weight)."""


@dataclass(frozen=True)
class PerAxis(Granularity):
    """One scale per index of `axis`. Weights know axis 0: one scale per output row."""

    axis: int = 0


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale per `group_size` neighbours along a row; the last group of a row may be shorter."""

    group_size: int

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ConfigError(f"group_size must be at least 1, not {self.group_size}")


@dataclass(frozen=True)
class PerBlock(Granularity):
    """One scale per block of `block_size` (rows, columns); blocks at the edges may be shorter."""

    block_size: tuple[int, int]

    def __post_init__(self) -> None:
        if len(self.block_size) != 2 or min(self.block_size) < 1:
            raise ConfigError(f"block_size must be two numbers of at least 1, not {self.block_size}")


@dataclass(frozen=True)
class PerToken(Granularity):
    """One scale per token of an activation. Not a granularity of weights."""


@dataclass(frozen=True)
class PerTokenGroup(Granularity):
    """One scale per `group_size` neighbours of a token of an activation; the last group of a token may be shorter."""

    group_size: int

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ConfigError(f"group_size must be at least 1, not {self.group_size}")


def PerRow() -> PerAxis:
    """One scale per output row: another name of `PerAxis(0)`."""
    return PerAxis(0)


def granularity_name(granularity: Granularity) -> str:
    """`group`, `row`, `tensor` or `block`. Raises `ConfigError` for what weights cannot have."""
    match granularity:
        case PerGroup():
            return "group"
        case PerAxis(0):
            return "row"
        case PerTensor():
            return "tensor"
        case PerBlock():
            return "block"
    raise ConfigError(
        f"weights cannot be quantized {granularity}", hint="PerGroup(n), PerRow(), PerTensor() or PerBlock((r, c))"
    )


def block_shape(granularity: Granularity, rows: int, columns: int) -> tuple[int, int]:
    """(rows, columns) of one block of the [out, in] matrix that shares a scale."""
    match granularity_name(granularity):
        case "row":
            return 1, columns
        case "tensor":
            return rows, columns
    if isinstance(granularity, PerBlock):
        return min(granularity.block_size[0], rows), min(granularity.block_size[1], columns)
    assert isinstance(granularity, PerGroup)
    return 1, min(granularity.group_size, columns)
