"""Which tensors of the files make which parameters of the model: transformers' own conversion mapping, read lazily.

What a conversion would give is known before anything is read: it is run on tensors of the meta device. Experts that
lie one by one, or in a stack, can be had one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.checkpoint.shards import Spec, Stored
from llmquant.errors import CheckpointError


@dataclass(frozen=True)
class Input:
    """A tensor of the files, and the pattern of the conversion that it was found by."""

    pattern: str
    key: str
    stored: Stored


@dataclass(frozen=True)
class Group:
    """Parameters that come from the same tensors of the files: mostly one from one.

    Attributes:
        name: FQN of the first parameter.
        transform: transformers' conversion, without its inputs.
        inputs: in order.
        model: on the meta device.
    """

    name: str
    transform: Any
    model: nn.Module
    inputs: list[Input] = field(default_factory=list)

    def specs(self) -> dict[str, Spec]:
        """FQN -> dtype and shape of what comes out, before any cast. Raises `CheckpointError`."""
        given = [torch.empty(i.stored.shape, dtype=i.stored.dtype, device="meta") for i in self.inputs]
        return {name: (t.dtype, tuple(t.shape)) for name, t in self._convert(given).items()}

    def read(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """FQN -> value. Conversions only move numbers, so that a cast may come before them.

        Raises:
            CheckpointError: for tensors that cannot be read or do not fit together.
        """
        return self._convert([self._read(i, dtype) for i in self.inputs])

    def read_part(self, index: int, count: int, dtype: torch.dtype | None = None) -> Tensor:
        """One of `count` equal parts of the only parameter along its first dimension, where `divides(count)`."""
        if self._merges():
            by_pattern: dict[str, list[Input]] = {}
            for i in self.inputs:
                by_pattern.setdefault(i.pattern, []).append(i)
            chosen = [found[index] for found in by_pattern.values()]
            (value,) = self._convert([self._read(i, dtype) for i in chosen], chosen).values()
            return value
        rows = self.inputs[0].stored.shape[0] // count
        given = self._read(self.inputs[0], dtype, (index * rows, (index + 1) * rows))
        if self._stays():
            return given
        (value,) = self._convert([given]).values()
        return value

    def divides(self, count: int) -> bool:
        """Whether `count` equal parts of the only parameter can be read without the others."""
        if count == 1 or len(self.specs()) != 1:
            return False
        operations = list(getattr(self.transform, "operations", ()))
        if self._merges():
            patterns = [i.pattern for i in self.inputs]
            return all(patterns.count(p) == count for p in patterns) and all(map(_keeps_first, operations[1:]))
        rows = [*self.inputs[0].stored.shape, 1][0]
        return len(self.inputs) == 1 and rows % count == 0 and all(map(_keeps_first, operations))

    def _stays(self) -> bool:
        """Whether a tensor is only turned where its shape asks for it, and this one's does not; a part's would."""
        ((_, shape),) = self.specs().values()
        asks = any(getattr(o, "check_dims", False) for o in getattr(self.transform, "operations", ()))
        return asks and shape == self.inputs[0].stored.shape

    def _merges(self) -> bool:
        """Whether the first thing that is done is to stack experts."""
        operations = list(getattr(self.transform, "operations", ()))
        return bool(operations) and type(operations[0]).__name__ == "MergeModulelist" and operations[0].dim == 0

    def _read(self, given: Input, dtype: torch.dtype | None, rows: tuple[int, int] | None = None) -> Tensor:
        try:
            return given.stored.read(dtype if given.stored.dtype.is_floating_point else None, rows)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"cannot read {given.key}: {error}", where=self.name) from error

    def _convert(self, given: list[Tensor], inputs: list[Input] | None = None) -> dict[str, Tensor]:
        transform = deepcopy(self.transform)
        # The list of values goes along, so that the conversion can free each of them.
        for i, value in zip(inputs or self.inputs, _emptied(given), strict=True):
            transform.add_tensor(self.name, i.key, i.pattern, value)
        try:
            found = transform.convert(self.name, model=self.model, config=self.model.config)
        except (RuntimeError, ValueError, LookupError) as error:
            raise CheckpointError(
                f"the tensors of {self.name} do not fit together: {error}", where=self.name
            ) from error
        return {target: v[0] if isinstance(v, list) else v for target, v in found.items()}


def _emptied(values: list[Tensor]) -> list[Tensor]:
    found, values[:] = list(values), []
    return found


def _keeps_first(operation: Any) -> bool:
    """Whether an operation treats each index of the first dimension alike and alone."""
    kind = type(operation).__name__
    if kind == "Transpose":
        return min(operation.dim0, operation.dim1) > 0
    return kind in ("Concatenate", "Interleave") and operation.dim > 0


def find_groups(model: nn.Module, stored: Mapping[str, Stored]) -> dict[str, Group]:
    """First FQN -> group, for all tensors of the files that the model has a place for."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    known = model.state_dict()
    mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = str(model.base_model_prefix)
    groups: dict[str, Group] = {}
    for key, tensor in sorted(stored.items(), key=lambda item: dot_natural_key(item[0])):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = key, None
        if name in known:
            transform = by_pattern[pattern] if pattern else WeightRenaming(key, name)
            group = groups.setdefault(name, Group(name, transform, model))
            group.inputs.append(Input(pattern or key, key, tensor))
    return groups
