"""A folder with tensors of torchao in safetensors, as torchao's own `flatten_tensor_state_dict` lays them out.

Integers of two to eight bits become `IntxUnpackedToInt8Tensor` (a byte a code; packed ones run on cards only), float8
becomes `Float8Tensor`. Inputs of products stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import ExportError, MissingDependencyError
from llmquant.export.compressed_tensors import not_linear, refuse
from llmquant.export.folder import QuantizedFolder
from llmquant.export.hf16 import original_keys
from llmquant.export.options import Options
from llmquant.export.report import DEQUANTIZED, EXACT, PLAIN, Exported, ExportReport
from llmquant.export.shards import check_room, plain_bytes, write_rest, write_shards
from llmquant.quantize import Progress
from llmquant.tensor import QuantizedTensor

_FLOAT8 = {"float8": torch.float8_e4m3fn, "float8-e5m2": torch.float8_e5m2}


class Misfit(Exception):
    """Why torchao has no tensor for a weight."""


def write(
    source: QuantizedFolder, draft: Path, options: Options, report: ExportReport, progress: Progress | None
) -> None:
    """Makes every tensor once to see whether it fits and how it is described, then again to write it."""
    flatten = _flatten()
    dtype = options.dtype or source.dtype
    found = {fqn: _described(source, fqn, dtype) for fqn in source.entries}
    reasons = {fqn: why for fqn, (why, _) in found.items() if why}
    refuse(reasons, options)
    check_room(source, draft, lambda fqn: plain_bytes(source, fqn, dtype))
    metadata = {fqn: json.dumps({"_type": "Tensor"}) for fqn in source.names}
    metadata |= {fqn: described for fqn, (why, described) in found.items() if not why}
    metadata["tensor_names"] = json.dumps(source.names)

    def convert(fqn: str, value: Tensor) -> Mapping[str, Tensor]:
        if isinstance(value, QuantizedTensor) and fqn not in reasons:
            tensor = to_tensor(value, dtype)
            report.weights[fqn] = Exported(EXACT, f"{type(tensor).__name__} {value.meta.format}")
            return flatten({fqn: tensor})[0]
        how = DEQUANTIZED if isinstance(value, QuantizedTensor) else PLAIN
        report.weights[fqn] = Exported(how, str(dtype).removeprefix("torch."), reasons.get(fqn, ""))
        return {fqn: source.plain(fqn, value, options.dtype)}

    if any(described.get("activation") for described in source.entries.values()):
        report.warnings.append("inputs of products are left as they are")
    write_shards(source, draft, convert, metadata, options.max_shard_bytes, progress)
    write_rest(source, draft, options.dtype, {"quantization_config": _config(source, set(reasons))})


def to_tensor(weight: QuantizedTensor, dtype: torch.dtype) -> Any:
    """A matrix as a tensor of torchao that dequantizes to `dtype`. Raises `Misfit` where the grids do not agree."""
    from torchao.quantization import Float8Tensor, IntxUnpackedToInt8Tensor

    (down, along), (rows, columns) = weight.meta.block, weight.shape
    if rows % down or columns % along:
        raise Misfit(f"{rows} x {columns} does not divide into blocks of {down} x {along}")
    scale, block = weight.packed().scales(), list(weight.meta.block)
    if weight.format.name in _FLOAT8:
        codes = weight.qdata.view(_FLOAT8[weight.format.name])
        return Float8Tensor(codes, scale.float(), block_size=block, dtype=dtype)
    bits = weight.format.bits
    if weight.format.storage != "affine" or bits == 1:
        raise Misfit(f"torchao has no tensor like {weight.format.name}")
    middle = 2 ** (bits - 1)
    zeros = weight.packed().zeros()
    return IntxUnpackedToInt8Tensor(
        (weight.format.packing.unpack(weight.qdata, bits, columns).int() - middle).to(torch.int8),
        scale,
        torch.zeros(scale.shape, dtype=torch.int8) if zeros is None else (zeros.int() - middle).to(torch.int8),
        getattr(torch, f"int{bits}"),
        tuple(block),
        dtype,
        None,
    )


def _flatten() -> Any:
    try:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    except ImportError as error:
        raise MissingDependencyError("this target needs the package torchao", hint="pip install torchao") from error
    return flatten_tensor_state_dict


def _described(source: QuantizedFolder, fqn: str, dtype: torch.dtype) -> tuple[str, str]:
    """Why there is no tensor for a weight, or nothing and torchao's JSON about it."""
    value = source.read(fqn)
    assert isinstance(value, QuantizedTensor)
    if list(original_keys(source, fqn, torch.empty(value.shape, device="meta"))) != [fqn]:
        raise ExportError("the checkpoints of this family name their weights otherwise", where=fqn, hint="--to hf16")
    if why := not_linear(source, fqn):
        return why, ""
    try:
        return "", _flatten()({fqn: to_tensor(value, dtype)})[1][fqn]
    except Misfit as error:
        return str(error), ""


def _config(source: QuantizedFolder, plain: set[str]) -> dict[str, Any]:
    """The object of config.json; transformers takes each tensor's kind from the files, not from here."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    skip = [fqn.removesuffix(".weight") for fqn in plain]
    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=[*skip, "lm_head"]).to_dict()
