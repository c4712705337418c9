"""What a model folder holds, read from config.json and the shards' headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmquant.checkpoint.config_file import read_config
from llmquant.checkpoint.index import check_shards
from llmquant.checkpoint.manifest import METHOD, verify_headers
from llmquant.checkpoint.source import locate, weight_files
from llmquant.checkpoint.state import described_activation, expected, logical_shape
from llmquant.errors import CheckpointError
from llmquant.kernels import registry


@dataclass(frozen=True)
class Row:
    """One weight or plain tensor.

    Attributes:
        fqn: its name in the model.
        shape: as its module expects it.
        format: a format of the table, or the dtype of a plain tensor.
        block: (rows, columns) that share a scale; None for plain tensors.
        scale: dtype of the scales, with `+zero` where there are zero points; empty for plain tensors.
        activation: how inputs of products are quantized, as in a scheme (`a8-token`); empty where they are not.
        bytes: of all its components on disk.
        kernel, reason: what serves it on this machine, and why.
    """

    fqn: str
    shape: tuple[int, ...]
    format: str
    block: tuple[int, int] | None
    scale: str
    activation: str
    bytes: int
    kernel: str
    reason: str

    @property
    def elements(self) -> int:
        """How many weights."""
        return torch.Size(self.shape).numel()

    @property
    def quantized(self) -> bool:
        """Whether it is kept as codes."""
        return self.block is not None


@dataclass(frozen=True)
class Inspection:
    """All tensors of a folder, quantized ones first, and what config.json says about them."""

    folder: str
    config: Sequence[Any]
    rows: tuple[Row, ...]
    save_id: str | None

    def totals(self) -> dict[str, float | int | None]:
        """Counts, bytes, and bits per weight over all and over the quantized weights."""
        quantized = [row for row in self.rows if row.quantized]
        return {
            "quantized_weights": len(quantized),
            "plain_tensors": len(self.rows) - len(quantized),
            "bytes": sum(row.bytes for row in self.rows),
            "bytes_quantized": sum(row.bytes for row in quantized),
            "bits_per_weight": _bits(self.rows),
            "bits_per_quantized_weight": _bits(quantized),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "folder": self.folder,
            "save_id": self.save_id,
            "config": list(self.config),
            "totals": self.totals(),
            "weights": [asdict(row) for row in self.rows],
        }


def inspect_checkpoint(model: str | Path, device: str | None = None) -> Inspection:
    """Reads and verifies a folder, quantized by llmquant or plain.

    Args:
        model: local folder or hub id.
        device: the kind of device whose kernels are named, `cpu` or `cuda`; None is `cuda` where there is one.

    Raises:
        ModelNotFoundError, CheckpointError.
    """
    folder = locate(model)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    manifest = read_config(folder).get("quantization_config") or {}
    files = weight_files(folder)
    if manifest.get("quant_method") not in (None, METHOD):
        raise CheckpointError(f"the model is quantized by {manifest['quant_method']}, not llmquant", where=str(folder))
    headers = check_shards(folder, files)
    if manifest:
        verify_headers(manifest, headers)
    tensors = {key: found for header in headers.values() for key, found in header.tensors.items()}
    entries = manifest.get("weights", {})
    taken = {key for fqn, described in entries.items() for key in expected(fqn, described)}
    rows = [_quantized(fqn, described, device) for fqn, described in entries.items()]
    rows += [_plain(key, *found) for key, found in tensors.items() if key not in taken]
    return Inspection(str(folder), manifest.get("config", []), tuple(rows), manifest.get("save_id"))


def _quantized(fqn: str, described: Mapping[str, Any], device: str) -> Row:
    size = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in expected(fqn, described).values())
    block = tuple(described["block"])
    kernel, reason = registry.choose(described["format"], block, logical_shape(described)[-1], device)
    scale = described["scale_dtype"] + ("+zero" if described["asymmetric"] else "")
    activation = described_activation(described)
    prefix = activation.scheme if activation else ""
    return Row(fqn, tuple(described["shape"]), described["format"], block, scale, prefix, size, kernel, reason)


def _plain(fqn: str, dtype: torch.dtype | None, shape: tuple[int, ...]) -> Row:
    size = torch.Size(shape).numel() * (dtype.itemsize if dtype else 0)
    return Row(fqn, shape, str(dtype).removeprefix("torch."), None, "", "", size, "torch", "not quantized")


def _bits(rows: Any) -> float | None:
    elements = sum(row.elements for row in rows)
    return 8 * sum(row.bytes for row in rows) / elements if elements else None
