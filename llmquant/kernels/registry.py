"""Which kernel serves a weight, and why no faster one does."""

from __future__ import annotations

from typing import NamedTuple


class Choice(NamedTuple):
    """The backend that serves a weight, and the reason in words."""

    kernel: str
    reason: str


def choose(format_name: str, block: tuple[int, int], columns: int, device: str) -> Choice:
    """The fastest backend that can serve such a weight. Today there is only the aten reference."""
    del block, columns
    return Choice("reference", f"no native kernel for {format_name} on {device} in this version")
