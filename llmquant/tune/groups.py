"""Which weights get the same scheme: those that read one input, and the experts of a block.

Layers that read the same input are run as one product where they can be (`llmquant.optimize` joins them), and servers
fuse them too; that takes one scheme for all. Such siblings are known by their names under one parent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from llmquant.config.candidates import Candidate, Role

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
"""Names of modules under one parent that read the same input. Fused weights need none, unknown names stand alone."""

_EXPERTS = re.compile(r"(?:^|\.)[a-z_]*experts(?=\.)")


@dataclass(frozen=True)
class Group:
    """Weights that get the same scheme.

    Attributes:
        name: the weight's own, or that of several in short (`model.layers.0.mlp.{gate_proj,up_proj}`).
        members: the weights, in model order.
    """

    name: str
    members: tuple[Candidate, ...]

    @property
    def elements(self) -> int:
        """How many weights."""
        return sum(_elements(member) for member in self.members)

    @property
    def is_head(self) -> bool:
        """Whether one of them, or another name of one, is the output head."""
        return any(Role.head in member.roles for member in self.members)


def group_weights(candidates: Iterable[Candidate], together: bool = True) -> list[Group]:
    """The groups of some weights, in model order; each weight alone unless `together`.

    All experts of a block are one group, whether each has modules of its own or they lie in stacks. A tied weight is
    one candidate under all of its names, so it is in one group.
    """
    found: dict[tuple[str, int], list[Candidate]] = {}
    for candidate in candidates:
        key = _key(candidate) if together else (candidate.name, -1)
        found.setdefault(key, []).append(candidate)
    return [Group(_name(key[0], members), tuple(members)) for key, members in found.items()]


def _key(candidate: Candidate) -> tuple[str, int]:
    """(the experts' module, -1), (the parent, which siblings), or (the weight's own name, -1)."""
    if experts := _EXPERTS.search(candidate.name):
        return candidate.name[: experts.end()], -1
    parent, _, module = candidate.name.rpartition(".")[0].rpartition(".")
    for number, names in enumerate(SIBLINGS):
        if module in names:
            return parent, number
    return candidate.name, -1


def _name(key: str, members: list[Candidate]) -> str:
    if len(members) == 1:
        return members[0].name.removesuffix(".weight")
    modules = [member.name.rpartition(".")[0] for member in members]
    if key not in modules and all(module.rpartition(".")[0] == key for module in modules):
        return f"{key}.{{{','.join(module.rpartition('.')[2] for module in modules)}}}"
    return key


def _elements(candidate: Candidate) -> int:
    count = 1
    for size in candidate.shape:
        count *= size
    return count
