"""Settings of a `quantization_config`, which anyone may have written: each is checked when it is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from llmquant.errors import CheckpointError

_LARGEST = 2**31


def integer(config: Mapping[str, Any], *names: str, default: int | None = None, least: int = 1) -> int:
    """The first of these settings that is there. Raises `CheckpointError` for what is no whole number in range."""
    found = next((config[name] for name in names if config.get(name) is not None), default)
    if isinstance(found, bool) or not isinstance(found, int) or not least <= found < _LARGEST:
        raise CheckpointError(f"{names[0]} is {short(found)}, not a whole number from {least}", where="config.json")
    return found


def one_of(config: Mapping[str, Any], name: str, known: Collection[Any], default: Any = None) -> Any:
    """A setting among those that can be read. Raises `CheckpointError` naming the others."""
    found = config.get(name, default)
    if not isinstance(found, str | int | bool | None) or found not in known:
        raise CheckpointError(
            f"{name} is {short(found)}", where="config.json", hint=f"imported are {', '.join(map(str, known))}"
        )
    return found


def flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
    """A setting that is true or false; null is the default."""
    found = config.get(name)
    if found is not None and not isinstance(found, bool):
        raise CheckpointError(f"{name} is {short(found)}, neither true nor false", where="config.json")
    return default if found is None else found


def mapping(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A setting that is an object, empty where it is missing."""
    found = config.get(name)
    if found is not None and not isinstance(found, Mapping):
        raise CheckpointError(f"{name} is {short(found)}, not an object", where="config.json")
    return found or {}


def text(config: Mapping[str, Any], name: str) -> str:
    """A setting in words, lower case; empty where it is missing."""
    found = config.get(name)
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{name} is {short(found)}, not a word", where="config.json")
    return (found or "").lower()


def short(value: Any) -> str:
    """A value for a message, however long it is."""
    found = repr(value) if not isinstance(value, dict | list) else type(value).__name__
    return found if len(found) <= 60 else found[:57] + "..."
