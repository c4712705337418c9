"""Whose checkpoint a folder holds, by its config."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmquant.checkpoint.manifest import METHOD
from llmquant.errors import AlreadyQuantizedError, CheckpointError
from llmquant.foreign.settings import short
from llmquant.foreign.spec import Reader

LEGACY = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files in which older releases of AutoGPTQ and AutoAWQ keep what newer ones keep in config.json."""


def quantization_of(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of whatever quantized a model.

    Raises:
        AlreadyQuantizedError: for a checkpoint of ours.
        CheckpointError: for a model that is not quantized, and for settings that are no object.
    """
    found = config.get("quantization_config") or config.get("compression_config") or _legacy(folder)
    if found is None:
        raise CheckpointError(
            "the model is not quantized", where=str(folder), hint="llmquant quantize makes a quantized copy of it"
        )
    if not isinstance(found, dict):
        raise CheckpointError(f"quantization_config is {short(found)}, not an object", where=str(folder))
    if found.get("quant_method") == METHOD:
        raise AlreadyQuantizedError("the checkpoint is llmquant's own", where=str(folder), hint="load it as it is")
    return found


def find_reader(readers: Sequence[Reader], config: Mapping[str, Any]) -> Reader:
    """The reader that knows these settings. Raises `CheckpointError` where none does."""
    for reader in readers:
        if reader.claims(config):
            return reader
    method = short(config.get("quant_method"))
    packing = f" in {short(config['packing_format'])}" if "packing_format" in config else ""
    raise CheckpointError(
        f"checkpoints of {method}{packing} are not imported",
        where="config.json: quantization_config",
        hint=f"imported are {', '.join(reader.name for reader in readers)}; else start from the 16-bit model",
    )


def _legacy(folder: Path) -> dict[str, Any] | None:
    for name, method in LEGACY.items():
        path = folder / name
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"cannot read the settings: {error}", where=str(path)) from error
        if isinstance(found, dict):
            return {"quant_method": method, **found}
    return None
