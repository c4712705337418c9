"""What a choice of schemes is about: the weights that are open, the schemes they may get, and what is fixed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from llmquant.config.base import QuantConfig
from llmquant.config.candidates import Candidate
from llmquant.config.fqn import DEFAULT, FqnToConfig
from llmquant.config.recipe import to_config
from llmquant.config.schemes import parse_config
from llmquant.errors import ConfigError
from llmquant.formats import get_format
from llmquant.quantize import make_plan
from llmquant.tune.bank import bytes_under
from llmquant.tune.groups import Group, group_weights

HEAD_FLOOR = 6  # bits, for codes of the output head, unless its KL was measured
_EMBEDDINGS = ("_embedding", "_head")

Choice = Mapping[Candidate, QuantConfig]


@dataclass(frozen=True)
class Scope:
    """Attributes:
    groups: of the weights whose scheme is open, in model order.
    schemes: name -> what a weight may get.
    fixed: the weights whose scheme is given. They count in sizes.
    """

    groups: tuple[Group, ...]
    schemes: Mapping[str, QuantConfig]
    fixed: Choice

    @property
    def elements(self) -> int:
        """Weights in all, the fixed ones too."""
        return sum(group.elements for group in self.groups) + sum(Group(c.name, (c,)).elements for c in self.fixed)

    @property
    def fixed_bytes(self) -> int:
        """What the fixed weights take."""
        return sum(bytes_under(candidate, config) for candidate, config in self.fixed.items())

    def open(self) -> list[Candidate]:
        """The weights whose scheme is open."""
        return [member for group in self.groups for member in group.members]

    def choice(self, schemes: Mapping[str, str]) -> Choice:
        """Group -> scheme as weight -> config, the fixed ones too."""
        chosen = {m: self.schemes[schemes[group.name]] for group in self.groups for m in group.members}
        return {**self.fixed, **chosen}

    def allowed(self, group: Group, floor: int = HEAD_FLOOR) -> list[str]:
        """The schemes for a group: for the head those of `floor` bits or more, or the widest there is."""
        if not group.is_head:
            return list(self.schemes)
        bits = {name: get_format(config.format).bits for name, config in self.schemes.items()}
        return [name for name in bits if bits[name] >= min(floor, max(bits.values()))]


def make_scope(
    model: nn.Module,
    schemes: str | Sequence[Any],
    *,
    fixed: Any = None,
    embeddings: bool = False,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    together: bool = True,
) -> Scope:
    """Which weights of a model are open to which schemes.

    Args:
        model: a plain model.
        schemes: texts or configs, or one text with commas (`int3-g64,int4-g64,int8`).
        fixed: an `FqnToConfig`, a mapping of its keys to schemes, or what else `quantize_` takes: what its keys name
            is not open, and stays in float where they say none.
        embeddings: whether embeddings and tied heads are open, too; else they stay as they are.
        filter_fn: as for `quantize_`.
        together: whether weights that read one input, and the experts of a block, get one scheme (see `groups`).

    Raises:
        ConfigError: for schemes that cannot be read, or if nothing is open.
        NothingToQuantizeError, AlreadyQuantizedError: as `quantize_`.
    """
    parsed = parse_schemes(schemes)
    given = to_config(fixed) if fixed is not None else FqnToConfig({})
    first = next(iter(parsed.values()))
    own = dict.fromkeys([*(_EMBEDDINGS if embeddings else ()), DEFAULT], first)
    plan = make_plan(model, FqnToConfig(own).overridden_by(given.fqn_to_config), filter_fn)  # type: ignore[arg-type]
    given_keys = dict(given.items())
    is_open = {c: plan.resolution.deciding_key[c.name] not in given_keys for c, _ in plan.chosen}
    groups = tuple(group_weights((c for c, free in is_open.items() if free), together))
    if not groups:
        raise ConfigError("no weight is open to a choice: all have a scheme", hint="leave out _default")
    return Scope(groups, parsed, {c: config for c, config in plan.chosen if not is_open[c]})


def parse_schemes(schemes: str | Sequence[Any]) -> dict[str, QuantConfig]:
    """Name -> config of each scheme. Raises `ConfigError` for what is none, or is named twice."""
    given = schemes.split(",") if isinstance(schemes, str) else list(schemes)
    found: dict[str, QuantConfig] = {}
    for item in given:
        config = (
            item if isinstance(item, QuantConfig) else parse_config(item.strip() if isinstance(item, str) else item)
        )
        if config is None or config.scheme in found:
            raise ConfigError(f"{item!r} is no scheme to choose" if config is None else f"{item!r} is there twice")
        found[config.scheme] = config
    if not found:
        raise ConfigError("there is no scheme to choose from", hint="for instance int3-g64,int4-g64,int8")
    return found
