"""config.json of a model folder, held against limits before a model is built from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmquant.documents import read_json
from llmquant.errors import CheckpointError, DocumentError, ModelNotFoundError

MOST_MODULES, MOST_LAYERS = 4_096, 512  # a layer is many modules: so many take half a second to build
LARGEST_NUMBER = 2**31 - 1
_LAYERS = ("layers", "layer", "n_blocks", "depth", "depths")
_COUNTS = ("experts", "blocks", "num_stages")
"""How keys end whose number says how many modules a model has."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        ModelNotFoundError: where there is none to read.
        CheckpointError: for one that describes a model beyond every limit.
    """
    try:
        config = read_json(folder / "config.json")
    except DocumentError as error:
        raise ModelNotFoundError(
            f"the folder holds no Hugging Face model: config.json is missing or no JSON ({error.what})",
            where=str(folder),
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelNotFoundError("config.json names no model_type", where=str(folder))
    if not isinstance(config.get("quantization_config") or {}, dict):
        raise CheckpointError("quantization_config is no object", where=str(folder / "config.json"))
    check_config(config, str(folder / "config.json"))
    return config


def check_config(config: dict[str, Any], where: str) -> None:
    """Raises `CheckpointError` for a model of more modules, or of larger sizes, than any has."""
    for key, number in _numbers({k: v for k, v in config.items() if k != "quantization_config"}):
        most = MOST_LAYERS if key.endswith(_LAYERS) else MOST_MODULES if key.endswith(_COUNTS) else LARGEST_NUMBER
        if type(number) is int and abs(number) > most:
            raise CheckpointError(
                f"config.json says {key} = {number:.3g}, and the most is {most:,}",
                where=where,
                hint="the file is damaged, or means harm: get it again",
            )


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every number, with the last key before it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)
    else:
        yield key, value
