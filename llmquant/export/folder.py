"""A quantized folder to export from: its weights by name, read one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from llmquant.checkpoint.config_file import read_config
from llmquant.checkpoint.header import read_header
from llmquant.checkpoint.manifest import METHOD, verify
from llmquant.checkpoint.source import build_skeleton, extras, locate, parse_dtype, weight_files
from llmquant.checkpoint.state import assemble, expected
from llmquant.errors import CheckpointError
from llmquant.tensor import QuantizedTensor


@dataclass(frozen=True)
class QuantizedFolder:
    """A checkpoint that llmquant wrote, verified. Weights are read when they are asked for.

    Attributes:
        folder: where it lies.
        config: config.json.
        dtype: of what is not quantized.
        places: key -> file.
        skeleton: its model on the meta device.
    """

    folder: Path
    config: dict[str, Any]
    dtype: torch.dtype
    places: Mapping[str, Path] = field(repr=False)
    skeleton: nn.Module = field(repr=False)

    @property
    def entries(self) -> Mapping[str, Any]:
        """The manifest's entry of each quantized weight, by FQN."""
        return self.config["quantization_config"]["weights"]

    @property
    def plain_config(self) -> dict[str, Any]:
        """config.json without the manifest."""
        return {key: value for key, value in self.config.items() if key not in ("quantization_config", "torch_dtype")}

    @cached_property
    def names(self) -> list[str]:
        """The FQNs of all tensors, quantized or plain."""
        from transformers.core_model_loading import dot_natural_key

        components = {key for fqn, described in self.entries.items() for key in expected(fqn, described)}
        plain = [key for key in self.places if key not in components]
        return sorted([*plain, *self.entries], key=dot_natural_key)

    def tied(self) -> dict[str, str]:
        """Name that is not stored -> the name under which its weight is."""
        return dict(getattr(self.skeleton, "all_tied_weights_keys", {}))

    def read(self, fqn: str) -> Tensor:
        """One weight: a `QuantizedTensor`, or a plain tensor as it is stored."""
        described = self.entries.get(fqn)
        if described is None:
            return self._read(fqn)
        parts = {key: self._read(key) for key in expected(fqn, described)}
        return assemble(fqn, described, parts, self.dtype)

    def plain(self, fqn: str, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A weight in floats, with the shape that its module holds. Tensors kept in float32 stay so without `dtype`."""
        if isinstance(value, QuantizedTensor):
            shape = self.skeleton.get_parameter(fqn).shape
            return value.dequantize(dtype or self.dtype).reshape(shape)
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value

    def module(self, fqn: str) -> nn.Module:
        """The module that holds a parameter."""
        return self.skeleton.get_submodule(fqn.rpartition(".")[0])

    def extras(self) -> list[Path]:
        """Files that a copy needs beside weights."""
        return extras(self.folder)

    def _read(self, key: str) -> Tensor:
        with safe_open(self.places[key], framework="pt") as file:  # a handle a tensor: its pages can be given back
            return file.get_tensor(key)


def open_quantized(model: str | Path) -> QuantizedFolder:
    """Opens and verifies a quantized checkpoint by folder or hub id.

    Raises:
        ModelNotFoundError, CheckpointError: for what is none of llmquant, or is damaged.
    """
    folder = locate(model)
    config = read_config(folder)
    manifest = config.get("quantization_config") or {}
    if manifest.get("quant_method") != METHOD:
        kind = f"quantized by {manifest['quant_method']}" if manifest else "not quantized"
        raise CheckpointError(
            f"the model is {kind}; only checkpoints of llmquant can be exported",
            where=str(folder),
            hint="llmquant quantize MODEL -o OUT, then export OUT",
        )
    files = weight_files(folder)
    verify(manifest, files)
    dtype = parse_dtype(config.get("dtype")) or torch.float32
    places = {key: path for path in files for key in read_header(path).tensors}
    return QuantizedFolder(folder, config, dtype, places, build_skeleton(folder, config, dtype))
