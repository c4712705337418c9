"""The weights of a model in several schemes, each quantized once, and the model with some of them in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmquant.checkpoint.state import entry, expected
from llmquant.config.base import QuantConfig
from llmquant.config.candidates import Candidate
from llmquant.formats import METHODS, get_format
from llmquant.quantize import check_weight, quantize_weight, replace_weight
from llmquant.tensor import Meta, QuantizedTensor

Quantize = Callable[[Candidate, Tensor, QuantConfig], QuantizedTensor]
"""A candidate, its weight in the candidate's shape, and a config -> the quantized weight, by whatever algorithm."""


def plain_quantize(candidate: Candidate, weight: Tensor, config: QuantConfig) -> QuantizedTensor:
    """By the config's algorithm; by its format's default where that needs a calibration run."""
    if METHODS[config.algorithm or "rtn"].needs:
        config = config.with_algorithm(get_format(config.format).algorithms[0])
    return quantize_weight(weight, config, transposed=candidate.transposed)


class Bank:
    """Quantized copies of a model's weights by scheme, made when first asked for.

    They stay packed: a weight in five schemes of 2 to 8 bits takes about three bytes an element.

    Args:
        model: the plain model.
        quantize: makes a copy.
    """

    def __init__(self, model: nn.Module, quantize: Quantize = plain_quantize) -> None:
        self.model = model
        self._quantize = quantize
        self._copies: dict[tuple[str, QuantConfig], QuantizedTensor] = {}

    @property
    def is_plain(self) -> bool:
        """Whether copies follow from the weights and the configs alone."""
        return self._quantize is plain_quantize

    def weight(self, candidate: Candidate) -> Tensor:
        """The plain weight, in the candidate's shape."""
        return self.model.get_parameter(candidate.name).detach().reshape(candidate.shape)

    def get(self, candidate: Candidate, config: QuantConfig) -> QuantizedTensor:
        """The weight under a config. Raises `BadWeightError` for values that cannot be quantized."""
        key = candidate.name, config
        if key not in self._copies:
            check_weight(self.weight(candidate), config, candidate.name)
            with torch.no_grad():
                self._copies[key] = self._quantize(candidate, self.weight(candidate), config)
        return self._copies[key]

    @contextmanager
    def installed(self, choice: Mapping[Candidate, QuantConfig]) -> Iterator[nn.Module]:
        """The model with some weights quantized; every plain weight is back in its place afterwards."""
        copies = {candidate: self.get(candidate, config) for candidate, config in choice.items()}
        plain = {candidate: self.model.get_parameter(candidate.name) for candidate in copies}
        try:
            for candidate, copy in copies.items():
                replace_weight(self.model, candidate.fqns, copy)
            yield self.model
        finally:
            for candidate, parameter in plain.items():
                put_back(self.model, candidate, parameter)


def put_back(model: nn.Module, candidate: Candidate, parameter: nn.Parameter) -> None:
    """Sets a parameter, the very object, under all names of a weight."""
    for fqn in candidate.fqns:
        path, _, name = fqn.rpartition(".")
        setattr(model.get_submodule(path), name, parameter)


def bytes_under(candidate: Candidate, config: QuantConfig) -> int:
    """Bytes that a weight takes under a config, on disk and in memory: codes, scales, zero points, padding."""
    shape = list(candidate.shape)
    rows, columns = reversed(shape[-2:]) if candidate.transposed else shape[-2:]
    spec = config.spec(rows, columns)
    meta = Meta(spec.format.name, spec.block, columns, candidate.transposed, config.activation)
    described = entry(meta, shape, spec.scale_dtype, spec.asymmetric)
    return sum(torch.Size(size).numel() * dtype.itemsize for dtype, size in expected("", described).values())
