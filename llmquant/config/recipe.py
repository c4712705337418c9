"""Recipes: YAML files that name a scheme for each kind of weight.

```yaml
llmquant_recipe: 1
description: Four bits, groups of 64
algorithm: search   # or gptq, ...; awq+search and smoothquant scale the plain model's channels first
rotate: hadamard    # or random; leave it out for none
weights:            # first hit wins; keys as in FqnToConfig
  _embedding: int8
  _default: int4-g64
```
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import llmquant
from llmquant.config.base import QuantConfig, unknown_key
from llmquant.config.fqn import FqnToConfig
from llmquant.config.schemes import parse_config
from llmquant.documents import read_yaml
from llmquant.errors import ConfigError, DocumentError, LlmQuantError

RECIPE_VERSION = 1
_KEYS = ["llmquant_recipe", "description", "algorithm", "rotate", "weights"]

MIGRATIONS = ("awq", "smoothquant")
ROTATIONS = ("hadamard", "random")


@dataclass(frozen=True)
class Changes:
    """What is done to the plain model before its weights are quantized, in this order; None is nothing.

    Attributes:
        rotate: one of `ROTATIONS`, for `rotate_`.
        migrate: one of `MIGRATIONS`: `awq_` or `smoothquant_`.
    """

    rotate: str | None = None
    migrate: str | None = None

    def __post_init__(self) -> None:
        if self.rotate not in (None, *ROTATIONS):
            raise ConfigError(f"there is no rotation {self.rotate!r}", hint=" or ".join(ROTATIONS))

    def __bool__(self) -> bool:
        return bool(self.rotate or self.migrate)

    def __str__(self) -> str:
        """The functions that do it."""
        names = (self.rotate and f"rotate_ ({self.rotate})", self.migrate and f"{self.migrate}_")
        return " and ".join(filter(None, names))


@dataclass(frozen=True)
class Recipe:
    """A named `FqnToConfig`, and what is done to the plain model before."""

    name: str
    description: str
    config: FqnToConfig
    changes: Changes = Changes()


def recipe_folder() -> Path:
    """Where the recipes that ship with the library lie: in the package, or beside it in a source tree."""
    package = Path(llmquant.__file__).parent
    return next((p for p in (package / "recipes", package.parent / "recipes") if p.is_dir()), package / "recipes")


def list_recipes() -> list[Recipe]:
    """All recipes that ship with the library, by name."""
    return [load_recipe(path) for path in sorted(recipe_folder().glob("*.yaml"), key=lambda path: path.stem)]


def load_recipe(source: str | Path) -> Recipe:
    """A recipe by name or path. Raises `ConfigError` for what does not exist or cannot be read."""
    path = find_recipe(source)
    try:
        content = read_yaml(path)
    except DocumentError as error:
        raise ConfigError(f"cannot read the recipe: {error.what}", where=str(path)) from error
    return parse_recipe(content, path.stem, str(path))


def parse_recipe(content: Any, name: str, where: str) -> Recipe:
    """A recipe from its parsed YAML. Unknown keys are refused, with a suggestion."""
    if not isinstance(content, Mapping):
        raise ConfigError("a recipe is a mapping", where=where, hint=f"with the keys {', '.join(_KEYS)}")
    for key in content:
        if key not in _KEYS:
            raise unknown_key(key, _KEYS, where)
    if content.get("llmquant_recipe") != RECIPE_VERSION:
        raise ConfigError(
            f"not a recipe of version {RECIPE_VERSION}",
            where=where,
            hint=f"begin with llmquant_recipe: {RECIPE_VERSION}",
        )
    weights = content.get("weights")
    if not isinstance(weights, Mapping) or not weights:
        raise ConfigError("a recipe needs weights: {key: scheme}", where=where)
    configs = {str(key): _parse_weight(str(key), value, where) for key, value in weights.items()}
    config, rotate = FqnToConfig(configs), content.get("rotate")
    try:
        migrate, algorithm = split_algorithm(str(content.get("algorithm") or ""))
        changes = Changes(None if rotate is None else str(rotate), migrate)
        config = with_algorithm(config, algorithm) if algorithm else config
    except ConfigError as error:
        raise ConfigError(error.what, where=where, hint=error.hint) from error
    return Recipe(name, str(content.get("description", "")), config, changes)


def split_algorithm(algorithm: str | None) -> tuple[str | None, str | None]:
    """`awq+gptq` as the scales and the algorithm behind them; either may be missing. Raises `ConfigError`."""
    first, plus, rest = (algorithm or "").partition("+")
    if first in MIGRATIONS:
        return first, rest or None
    if plus:
        raise ConfigError(
            f"{first!r} cannot stand before another algorithm", hint=f"{' or '.join(MIGRATIONS)}, as in awq+gptq"
        )
    return None, algorithm or None


def change_algorithm(recipe: Recipe, algorithm: str) -> Recipe:
    """A recipe with another algorithm, and with the scales of channels that the text names (`awq+gptq`) or none.

    Raises:
        ConfigError: if none of its formats has the algorithm.
    """
    migrate, own = split_algorithm(algorithm)
    config = with_algorithm(recipe.config, own) if own else recipe.config
    return replace(recipe, config=config, changes=replace(recipe.changes, migrate=migrate))


def with_algorithm(config: FqnToConfig, algorithm: str) -> FqnToConfig:
    """The same with another algorithm wherever a format has it. Raises `ConfigError` if none has it."""
    changed = {
        key: value.with_algorithm(algorithm) if isinstance(value, QuantConfig) else value
        for key, value in config.items()
    }
    if not any(isinstance(c, QuantConfig) and c.algorithm == algorithm for c in changed.values()):
        raise ConfigError(f"no format of this recipe has the algorithm {algorithm!r}", hint="rtn or search")
    return FqnToConfig(changed)


def to_config(source: Any) -> FqnToConfig:
    """Whatever a user may hand over as an `FqnToConfig`: a scheme, a recipe's name or path, a config, a mapping
    of keys to schemes or configs, or such pairs.

    Raises:
        ConfigError: for what is none of these, and for a recipe that changes the plain model first: its config alone
            would be another recipe.
    """
    if isinstance(source, FqnToConfig):
        return source
    if isinstance(source, Recipe):
        return _unchanged(source)
    if source is None or isinstance(source, QuantConfig):
        return FqnToConfig.of(source)
    if isinstance(source, Mapping):
        return FqnToConfig({key: _parse_weight(key, value, "config") for key, value in source.items()})
    if isinstance(source, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in source):
        return to_config(dict(source))
    if not isinstance(source, str | Path):
        raise ConfigError(
            f"a {type(source).__name__} is no config",
            where=repr(source),
            hint='for instance "int4-g64", Int4WeightOnlyConfig(group_size=64) or FqnToConfig({...})',
        )
    if isinstance(source, Path) or _looks_like_recipe(source):
        return _unchanged(load_recipe(source))
    return FqnToConfig.of(parse_config(source))


def to_recipe(source: Any) -> Recipe:
    """The same as a recipe, with what it does to the plain model first. Raises `ConfigError`."""
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Path) or (isinstance(source, str) and _looks_like_recipe(source)):
        return load_recipe(source)
    return Recipe(str(source), "", to_config(source))


def _unchanged(recipe: Recipe) -> FqnToConfig:
    if recipe.changes:
        raise ConfigError(
            f"this recipe changes the plain model first, by {recipe.changes}",
            where=f"recipe {recipe.name!r}",
            hint=f"llmquant quantize --recipe {recipe.name}; in Python call that, then use load_recipe(...).config",
        )
    return recipe.config


def to_pairs(config: FqnToConfig) -> list[list[Any]]:
    """[key, config or None] pairs of plain JSON, which `to_config` reads back. Pairs keep the order that decides."""
    return [[key, value.to_dict() if isinstance(value, QuantConfig) else None] for key, value in config.items()]


def _parse_weight(key: str, value: Any, where: str) -> QuantConfig | None:
    if value is None or isinstance(value, QuantConfig):
        return value
    if not isinstance(value, (str, Mapping)):
        raise ConfigError(f"the scheme of {key!r} must be a text or a mapping, not {value!r}", where=where)
    try:
        return parse_config(value)
    except LlmQuantError as error:
        raise ConfigError(error.what, where=f"{where}, key {key!r}", hint=error.hint) from error


def _looks_like_recipe(text: str) -> bool:
    return text.endswith((".yaml", ".yml")) or (recipe_folder() / f"{text}.yaml").is_file()


def find_recipe(source: str | Path) -> Path:
    """The file of a recipe, by name or path. Raises `ConfigError`."""
    named = recipe_folder() / f"{source}.yaml"
    path = named if named.is_file() else Path(source)
    if not path.is_file():
        names = ", ".join(p.stem for p in sorted(recipe_folder().glob("*.yaml")))
        raise ConfigError(f"no recipe {str(source)!r}", hint=f"a path of a YAML file, or one of {names}")
    return path
