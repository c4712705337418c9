"""What a quantizer writes onto a graph: which values become codes, and by which rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import fx

from llmquant.errors import ConfigError

if TYPE_CHECKING:
    from llmquant.pt2e.observer import ObserverBase

ANNOTATION = "quantization_annotation"
"""The key of `Node.meta` under which an annotation lies."""

ACTIVATION_EPS = 2.0**-12
"""The least scale of an activation: smaller ones are noise, and divisions by them overflow."""

_RANGES = {torch.uint8: (0, 255), torch.int8: (-128, 127)}


@dataclass(frozen=True)
class QuantizationSpec:
    """How a value is coded.

    Attributes:
        dtype: of the codes, torch.uint8 or torch.int8.
        observer: what makes the observer that finds its range, given this spec.
        quant_min, quant_max: the least and the largest code; by default those of the dtype.
        granularity: what has a scale of its own: "tensor", "channel" (along `axis`), or "token" (dynamic only).
        axis: of the channels.
        symmetric: whether the zero point is the middle of the codes: 0 of int8, 128 of uint8.
        is_dynamic: whether scales are made from each input at run time; the observer is then not asked.
        eps: the least scale.

    Raises:
        ConfigError: for codes that the dtype cannot hold, and for other combinations that mean nothing.
    """

    dtype: torch.dtype
    observer: Callable[[QuantizationSpec], ObserverBase]
    quant_min: int | None = None
    quant_max: int | None = None
    granularity: str = "tensor"
    axis: int = 0
    symmetric: bool = False
    is_dynamic: bool = False
    eps: float = torch.finfo(torch.float32).eps

    def __post_init__(self) -> None:
        if self.dtype not in _RANGES:
            raise ConfigError(f"there are no codes in {self.dtype}", hint="torch.int8 or torch.uint8")
        least, most = _RANGES[self.dtype]
        low, high = self.limits
        if not least <= low < high <= most:
            raise ConfigError(f"codes from {low} to {high} do not fit {self.dtype}")
        if self.granularity not in ("tensor", "channel", "token"):
            raise ConfigError(f"unknown granularity {self.granularity!r}", hint="tensor, channel or token")
        if self.granularity == "token" and not self.is_dynamic:
            raise ConfigError("scales of tokens are made at run time", hint="is_dynamic=True")
        if self.granularity == "channel" and self.is_dynamic:
            raise ConfigError("scales of channels are made beforehand", hint='granularity "tensor" or "token"')

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the largest code."""
        least, most = _RANGES[self.dtype]
        return (
            least if self.quant_min is None else self.quant_min,
            most if self.quant_max is None else self.quant_max,
        )


Edge = tuple[fx.Node, fx.Node]
"""A value on its way: the node that makes it, and one that reads it."""


@dataclass(frozen=True)
class SharedQuantizationSpec:
    """A value with the scale and zero point of another one.

    Attributes:
        of: the other value: an edge (an input of a node), or a node (its output). It is annotated itself.
    """

    of: Edge | fx.Node


AnySpec = QuantizationSpec | SharedQuantizationSpec | None


@dataclass
class QuantizationAnnotation:
    """What is to be coded around a node.

    Attributes:
        input_qspec_map: an input of the node -> its spec, or None where it stays float.
        output_qspec: of what the node gives.
    """

    input_qspec_map: dict[fx.Node, AnySpec] = field(default_factory=dict)
    output_qspec: AnySpec = None


class Quantizer(Protocol):
    """What decides about a graph. `prepare_pt2e` calls both methods; neither changes the graph itself."""

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Writes a `QuantizationAnnotation` to `node.meta["quantization_annotation"]` of the nodes it knows."""

    def validate(self, model: fx.GraphModule) -> None:
        """Raises a `ConfigError` where what was annotated cannot be carried out."""


def annotation_of(node: fx.Node) -> QuantizationAnnotation | None:
    """What was written onto a node."""
    return node.meta.get(ANNOTATION)
