"""Checkpoints of architectures that transformers does not know: keys of the files are names, matrices are weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmquant.checkpoint.mapping import Group, Input
from llmquant.checkpoint.shards import Spec, Stored
from llmquant.config.candidates import Role

_NORM = re.compile(r"(^|[._])(\w*norm(_?\w{1,2})?|ln(_?\w{1,2})?)$", re.IGNORECASE)
_EMBEDDING = re.compile(r"(^|[._])(\w*embed(d?ings?)?(_\w+)?|wte|wpe)$", re.IGNORECASE)
_HEAD = re.compile(r"(^|[._])(lm_head|output_projection)$", re.IGNORECASE)


def raw_role(key: str) -> Role:
    """What a matrix is by its key: a norm, an embedding, a head; anything else is multiplied by."""
    path = key.removesuffix(".weight")
    by_name = {Role.norm: _NORM, Role.head: _HEAD, Role.embedding: _EMBEDDING}
    return next((role for role, pattern in by_name.items() if pattern.search(path)), Role.linear)


class RawModule(nn.Module):
    """Tensors whose keys share a prefix. Nothing is known of what is done with them.

    Attributes:
        raw_roles: attribute -> role, of those that may be quantized.
    """

    def __init__(self) -> None:
        super().__init__()
        self.raw_roles: dict[str, Role] = {}

    def put(self, key: str, stored: Stored) -> None:
        """Adds a tensor on the meta device under the last part of its key."""
        name = key.rpartition(".")[2]
        value = torch.empty(stored.shape, dtype=stored.dtype, device="meta")
        # Not by `register_parameter`, which refuses the names of methods: any key of a file will do.
        self._parameters[name] = nn.Parameter(value, requires_grad=False)
        if value.ndim == 2 and value.is_floating_point():
            self.raw_roles[name] = raw_role(key)

    def child(self, name: str) -> RawModule:
        """The module of that name, a new one if there is none."""
        found = self._modules.setdefault(name, RawModule())
        assert isinstance(found, RawModule)
        return found


def raw_skeleton(stored: Mapping[str, Stored]) -> RawModule:
    """A tree of modules on the meta device whose parameters have the keys of the files as names."""
    root = RawModule()
    for key, tensor in stored.items():
        module = root
        for part in key.split(".")[:-1]:
            module = module.child(part)
        module.put(key, tensor)
    return root


@dataclass(frozen=True)
class RawGroup(Group):
    """One tensor of a file as it stands there."""

    def specs(self) -> dict[str, Spec]:
        """Its dtype and shape."""
        stored = self.inputs[0].stored
        return {self.name: (stored.dtype, tuple(stored.shape))}

    def read(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Its value."""
        return {self.name: self._read(self.inputs[0], dtype)}

    def divides(self, count: int) -> bool:
        """Never: only experts are read one by one."""
        return False


def raw_groups(model: nn.Module, stored: Mapping[str, Stored]) -> list[Group]:
    """A group for each tensor, in the order of the files."""
    return [RawGroup(key, None, model, [Input(key, key, tensor)]) for key, tensor in stored.items()]
