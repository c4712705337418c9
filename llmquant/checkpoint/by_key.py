"""Reading any checkpoint by the keys of its files, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoint.config_file import read_config
from llmquant.checkpoint.manifest import METHOD, verify
from llmquant.checkpoint.shards import stored_in
from llmquant.checkpoint.source import locate, weight_files
from llmquant.checkpoint.state import assemble, expected
from llmquant.errors import CheckpointError


def load_raw(model: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by key, those that llmquant quantized as `QuantizedTensor`; no model is built.

    Args:
        model: local folder or hub id of a checkpoint in safetensors, of any architecture.

    Raises:
        ModelNotFoundError, CheckpointError.
    """
    folder = locate(model)
    config, files = read_config(folder), weight_files(folder)
    manifest: dict[str, Any] = config.get("quantization_config") or {}
    if manifest.get("quant_method") not in (None, METHOD):
        raise CheckpointError(f"the model is quantized by {manifest['quant_method']}, not llmquant", where=str(folder))
    if manifest:
        verify(manifest, files)
    stored = {key: tensor for path in files for key, tensor in stored_in(path).items()}
    dtype = getattr(torch, str(config.get("dtype", "float32")))
    found: dict[str, Tensor] = {}
    taken: set[str] = set()
    for fqn, described in manifest.get("weights", {}).items():
        keys = expected(fqn, described)
        found[fqn] = assemble(fqn, described, {key: stored[key].read() for key in keys}, dtype)
        taken |= set(keys)
    return found | {key: tensor.read() for key, tensor in stored.items() if key not in taken}
