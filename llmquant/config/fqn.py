"""Which config for which weight: `FqnToConfig`, and the only function that resolves it.

The first hit wins, for each name of a weight: its exact name; the exact name of its module; `re:` keys in the order
given; the key of its role (`_embedding`, `_head`, `_experts`); `_default`. Nothing is passed over in silence: a key
that names no quantizable weight is an error, a key that other keys shadow is a warning, and every weight that stays in
float has a reason.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import ItemsView, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from llmquant.config.candidates import Candidate, Inventory, Role
from llmquant.errors import ConfigError, ConflictingConfigError, UnmatchedKeyError

Config: TypeAlias = object
"""Anything with `==`. What a config means is no business of this module, except that None means: keep in float."""

DEFAULT = "_default"
ROLE_KEYS: Mapping[Role, str] = {Role.embedding: "_embedding", Role.head: "_head", Role.experts: "_experts"}
RESERVED_KEYS = (*ROLE_KEYS.values(), DEFAULT)

_OPTIONAL, _PATTERN = "?", "re:"
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, eq=False)
class FqnToConfig:
    """A config for each of the weights that a key names; None keeps a weight in float.

    Args:
        fqn_to_config: key -> config. A key is the name of a weight or of its module, `re:` and a pattern for the whole
            of either name, or one of `_embedding`, `_head`, `_experts`, `_default`. With a leading `?` it may match
            nothing.
    """

    fqn_to_config: Mapping[str, Config | None]

    def __post_init__(self) -> None:
        if not isinstance(self.fqn_to_config, Mapping):
            raise ConfigError(
                f"FqnToConfig takes a mapping of keys to configs, not a {type(self.fqn_to_config).__name__}"
            )
        object.__setattr__(self, "fqn_to_config", dict(self.fqn_to_config))
        for key, config in self.items():
            _check_key(key)
            if isinstance(config, FqnToConfig):
                raise ConfigError("an FqnToConfig cannot hold another", where=f"key '{key}'", hint="merge their keys")
        for key in self.fqn_to_config:
            if _OPTIONAL + key in self.fqn_to_config:
                raise ConfigError(f"the key '{key}' is given with and without '?'", hint="keep one of the two")

    def __eq__(self, other: object) -> bool:
        """Equal if the keys come in the same order too: it decides between patterns."""
        if not isinstance(other, FqnToConfig):
            return NotImplemented
        return list(self.items()) == list(other.items())

    __hash__ = None  # type: ignore[assignment]  # configs need not be hashable

    @classmethod
    def of(cls, config: Config | None) -> FqnToConfig:
        """`config` itself if it is an `FqnToConfig`; else `config` for everything that `_default` covers."""
        return config if isinstance(config, FqnToConfig) else cls({DEFAULT: config})

    def items(self) -> ItemsView[str, Config | None]:
        """Keys as written, and their configs, in order."""
        return self.fqn_to_config.items()

    def overridden_by(self, other_items: Mapping[str, Config | None]) -> FqnToConfig:
        """The same with the keys of `other_items` before all own keys, and in place of equal ones."""
        replaced = {_bare(key) for key in other_items}
        return FqnToConfig({**other_items, **{key: c for key, c in self.items() if _bare(key) not in replaced}})


@dataclass(frozen=True)
class Resolution:
    """What a config means for a model; weights go by their canonical names, in model order.

    Args:
        chosen: the config of each weight to quantize.
        kept: why each other quantizable weight stays in float.
        deciding_key: the key that decided, as written, or None where none did.
        warnings: one sentence for each key that decides nothing.
    """

    chosen: dict[str, Config]
    kept: dict[str, str]
    deciding_key: dict[str, str | None]
    warnings: tuple[str, ...]


def resolve(config: FqnToConfig, inventory: Inventory) -> Resolution:
    """Decide for every candidate of `inventory`, or say which keys are wrong."""
    keys = _Keys(config)
    hits = {
        fqn: keys.hitting(fqn, role)
        for candidate in inventory.candidates
        for fqn, role in zip(candidate.fqns, candidate.roles, strict=True)
    }
    _refuse_unmatched(keys, hits, inventory)

    resolution = Resolution({}, {}, {}, _shadowed(keys, hits))
    for candidate in inventory.candidates:
        key = _deciding_key(candidate, keys, hits)
        resolution.deciding_key[candidate.name] = key
        if key is None:
            resolution.kept[candidate.name] = _why_uncovered(candidate)
        elif (chosen := keys.configs[key]) is None:
            resolution.kept[candidate.name] = f"key '{key}' says none"
        else:
            resolution.chosen[candidate.name] = chosen
    return resolution


# -------------------------------------------------------------------------------- keys


def _bare(key: str) -> str:
    return key.removeprefix(_OPTIONAL)


def _check_key(key: object) -> None:
    """Refuse a key that could never mean anything, whatever the model."""
    if not isinstance(key, str) or not _bare(key):
        raise ConfigError("a key of FqnToConfig must be a non-empty string", where=f"key {key!r}")
    bare = _bare(key)
    if bare.startswith(_OPTIONAL):
        raise ConfigError("a key is optional or not: one '?' is enough", where=f"key '{key}'")
    if bare.startswith(_PATTERN):
        _check_pattern(key)
    elif bare.startswith("_") and bare not in RESERVED_KEYS:
        raise ConfigError(
            f"the key '{key}' is unknown; keys that start with '_' are {', '.join(RESERVED_KEYS)}",
            hint=_did_you_mean(bare, RESERVED_KEYS) or f"for a weight of that name write '{_PATTERN}{re.escape(bare)}'",
        )


def _check_pattern(key: str) -> None:
    try:
        _compile(key)
    except re.error as error:
        at = f"at position {error.pos} of the pattern: " if error.pos is not None else ""
        raise ConfigError(f"the key '{key}' is not a valid regular expression", where=f"{at}{error.msg}") from error
    except (OverflowError, RecursionError) as error:
        raise ConfigError(f"the key '{key}' is too large a regular expression", where=str(error)) from error


def _compile(key: str) -> re.Pattern[str]:
    return re.compile(_bare(key).removeprefix(_PATTERN))


def _module_of(fqn: str) -> str:
    return fqn.rpartition(".")[0]


class _Keys:
    """The keys of a config by tier, patterns compiled once; bare keys point to keys as written."""

    def __init__(self, config: FqnToConfig) -> None:
        self.configs = config.fqn_to_config
        written = {_bare(key): key for key in self.configs}
        self.default = written.get(DEFAULT)
        self.roles = {role: written[bare] for role, bare in ROLE_KEYS.items() if bare in written}
        naming = {bare: key for bare, key in written.items() if bare not in RESERVED_KEYS}
        self.naming = tuple(naming.values())  # these owe a match; roles and the default do not
        self.patterns = {key: _compile(key) for bare, key in naming.items() if bare.startswith(_PATTERN)}
        self.exact = {bare: key for bare, key in naming.items() if key not in self.patterns}

    def hitting(self, fqn: str, role: Role) -> list[str]:
        """Every key but `_default` that hits this name, the winner first."""
        names = [name for name in (fqn, _module_of(fqn)) if name]
        exact = [self.exact[name] for name in names if name in self.exact]
        matching = [key for key, pattern in self.patterns.items() if any(map(pattern.fullmatch, names))]
        by_role = [self.roles[role]] if role in self.roles else []
        return exact + matching + by_role


Hits: TypeAlias = Mapping[str, list[str]]
"""Name of a weight -> the keys that hit it, the winner first."""

# -------------------------------------------------------------------------------- decisions


def _deciding_key(candidate: Candidate, keys: _Keys, hits: Hits) -> str | None:
    """The key that wins for any name of the weight; `_default` only if no name is hit."""
    winners = {fqn: hits[fqn][0] for fqn in candidate.fqns if hits[fqn]}
    if winners:
        _refuse_conflict(winners, keys.configs)
        return next(iter(winners.values()))
    return keys.default if _default_covers(candidate) else None


def _refuse_conflict(winners: Mapping[str, str], configs: Mapping[str, Config | None]) -> None:
    """All names of a tied weight that are hit must get the same: it is stored once."""
    (fqn, key), *rest = winners.items()
    for other_fqn, other_key in rest:
        one, two = configs[key], configs[other_key]
        if (one is None) != (two is None) or one != two:
            raise ConflictingConfigError(
                f"'{fqn}' and '{other_fqn}' are one tied weight, but get different configs",
                where=f"key '{key}' says {_spell(one)} and key '{other_key}' says {_spell(two)}",
                hint="give both keys the same config, or remove one of them",
            )


def _spell(config: Config | None) -> str:
    return "none (keep in float)" if config is None else str(config)


def _default_covers(candidate: Candidate) -> bool:
    """Whether `_default` may decide it: embeddings, tied heads and norms are quantized only if a key means them."""
    tied_head = candidate.tied and Role.head in candidate.roles
    return not {Role.embedding, Role.norm} & set(candidate.roles) and not tied_head


def _why_uncovered(candidate: Candidate) -> str:
    if _default_covers(candidate):
        return "no key covers it"
    if candidate.tied:
        rest = candidate.fqns[1:]
        return f"tied to {', '.join(rest)}; name it to quantize {'both' if len(rest) == 1 else 'all'}"
    if Role.norm in candidate.roles:
        return "a norm by its key; name it to quantize it"
    return "an embedding; name it or _embedding to quantize it"


def _shadowed(keys: _Keys, hits: Hits) -> tuple[str, ...]:
    """A warning for each key that hits weights but wins none."""
    winners: dict[str, dict[str, None]] = {key: {} for key in keys.naming}
    for hitting in hits.values():
        for key in hitting:
            winners.setdefault(key, {})[hitting[0]] = None
    return tuple(
        f"key '{key}' decides nothing: every weight it names is decided by {_quote(winners[key])}"
        for key in keys.naming
        if winners[key] and key not in winners[key]
    )


# -------------------------------------------------------------------------------- keys that hit nothing


def _refuse_unmatched(keys: _Keys, hits: Hits, inventory: Inventory) -> None:
    """Name every key that owes a match and has none, each with what it names instead or what it may have meant."""
    matched = {key for hitting in hits.values() for key in hitting}
    unmatched = [key for key in keys.naming if key not in matched and not key.startswith(_OPTIONAL)]
    if not unmatched:
        return
    raise UnmatchedKeyError(
        f"{len(unmatched)} {'key names' if len(unmatched) == 1 else 'keys name'} no quantizable weight of this model",
        where="\n         ".join(f"'{key}': {_diagnose(key, keys, hits, inventory)}" for key in unmatched),
        hint="correct or remove the key, or start it with '?' if it may match nothing",
    )


def _diagnose(key: str, keys: _Keys, names: Iterable[str], inventory: Inventory) -> str:
    if key in keys.patterns:
        return _diagnose_pattern(keys.patterns[key], names, inventory)
    return _diagnose_exact(key, names, inventory)


def _diagnose_exact(key: str, names: Iterable[str], inventory: Inventory) -> str:
    """What an exact key names, or what it may have meant."""
    others = inventory.others
    if key in others:
        return f"a parameter that cannot be quantized ({others[key]})"
    if any(fqn.startswith(f"{key}.") for fqn in names):
        return rf"a module that holds modules; for all weights in it write '{_PATTERN}{re.escape(key)}\..*'"
    inside = [fqn for fqn in others if fqn.startswith(f"{key}.")]
    if inside:
        return f"a module without a quantizable weight; it has {_list_others(inside, others)}"
    known = dict.fromkeys(name for fqn in names for name in (fqn, _module_of(fqn)) if name)
    return _did_you_mean(key, known) or f"no such name; {_examples(names)}"


def _diagnose_pattern(pattern: re.Pattern[str], names: Iterable[str], inventory: Inventory) -> str:
    """What a pattern hits instead of a weight, or why it hits nothing."""
    passed_over = [fqn for fqn in inventory.others if pattern.fullmatch(fqn) or pattern.fullmatch(_module_of(fqn))]
    if passed_over:
        return f"it hits only what cannot be quantized: {_list_others(passed_over, inventory.others)}"
    parts = [fqn for fqn in names if pattern.search(fqn)]
    if parts:
        return f"it matches a part of {_quote(parts[:1])}, but must match the whole name; write '.*' for the rest"
    return f"it matches no name; {_examples(names)}"


def _did_you_mean(key: str, names: Iterable[str]) -> str | None:
    near = _near(key, names)
    return f"did you mean {_quote(near, ' or ')}?" if near else None


def _near(key: str, names: Iterable[str]) -> list[str]:
    """The names most like `key`, with its own numbers if they exist, else with the last ones.

    Names are compared with their numbers blanked: those of different layers differ in little else, so the list would be
    one weight in three layers, and long to compute.
    """
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(_NUMBER.sub("#", name), []).append(name)
    near = [families[family] for family in difflib.get_close_matches(_NUMBER.sub("#", key), families)]
    numbers = _NUMBER.findall(key)
    return [next((name for name in family if _NUMBER.findall(name) == numbers), family[-1]) for family in near]


def _examples(names: Iterable[str]) -> str:
    few = list(names)[:3]
    return f"names look like {_quote(few)}" if few else "the model has no quantizable weight"


def _list_others(fqns: list[str], others: Mapping[str, str]) -> str:
    few = ", ".join(f"'{fqn}' ({others[fqn]})" for fqn in fqns[:3])
    return few if len(fqns) <= 3 else f"{few} and {len(fqns) - 3} more"


def _quote(names: Iterable[str], between: str = ", ") -> str:
    return between.join(f"'{name}'" for name in names)
