"""What all targets share that are folders of safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoint.files import check_space, no_space_errors
from llmquant.checkpoint.shards import GrowingShards
from llmquant.checkpoint.stream import DEFAULT_SHARD_BYTES
from llmquant.export.folder import QuantizedFolder
from llmquant.quantize import Progress

Convert = Callable[[str, Tensor], Mapping[str, Tensor]]
"""FQN and value of a weight -> the tensors that it becomes, by key."""


def write_shards(
    source: QuantizedFolder,
    draft: Path,
    convert: Convert,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Converts all weights, one in memory at a time, into shards and an index."""
    writer = GrowingShards(draft, {"format": "pt", **(metadata or {})}, max_shard_bytes)
    for done, fqn in enumerate(source.names):
        if progress:
            progress(done, len(source.names), fqn)
        writer.add(convert(fqn, source.read(fqn)))
    writer.close()
    if progress:
        progress(len(source.names), len(source.names), "")


def check_room(source: QuantizedFolder, draft: Path, bytes_of: Callable[[str], float]) -> None:
    """Raises `NoSpaceError` where the disk cannot take `bytes_of` each weight, and as much as a twentieth more."""
    check_space(draft, int(1.05 * sum(map(bytes_of, source.names))))


def plain_bytes(source: QuantizedFolder, fqn: str, dtype: torch.dtype | None = None) -> int:
    """Bytes of a weight in floats."""
    known = source.skeleton.state_dict().get(fqn)
    return 0 if known is None else known.numel() * (dtype or source.dtype).itemsize


def write_rest(
    source: QuantizedFolder, draft: Path, dtype: torch.dtype | None, changes: Mapping[str, Any] | None = None
) -> None:
    """config.json without the manifest and with `changes`, and the files that lie beside the weights."""
    name = str(dtype or source.dtype).removeprefix("torch.")
    config = source.plain_config | {"dtype": name} | dict(changes or {})
    with no_space_errors(draft):
        (draft / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for path in source.extras():
            if path.name != "README.md":  # it is about the quantized checkpoint, and how to load that
                shutil.copy2(path, draft / path.name)
