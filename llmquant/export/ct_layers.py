"""One linear layer as compressed-tensors stores it: its scheme, and its tensors with our codes in them.

The schemes are those of compressed-tensors' `QuantizationScheme` (https://github.com/vllm-project/compressed-tensors).
Its `pack-quantized` is the same stream of bits a row as ours, in words of 32 bits; so codes are copied, never computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmquant.packing.bits import pack
from llmquant.primitives.dynamic import ALL_TOKENS, FLOAT8, INT8, Activation
from llmquant.tensor import QuantizedTensor

VLLM_BITS = (4, 8)
VLLM_GROUPS = (32, 64, 128)
_FLOATS = {"mxfp4": "mxfp4-pack-quantized", "mxfp8": "mxfp8-quantized", "nvfp4": "nvfp4-pack-quantized"}


class Misfit(Exception):
    """Why a weight cannot be stored exactly; `scales_only` if its codes can."""

    def __init__(self, reason: str, scales_only: bool = False) -> None:
        super().__init__(reason)
        self.scales_only = scales_only


@dataclass(frozen=True)
class Layer:
    """A weight of compressed-tensors.

    Attributes:
        scheme: `weights`, `input_activations` and `format` of its group.
        tensors: by the name that follows the module's.
        notes: what of it differs where it runs.
    """

    scheme: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def to_layer(weight: QuantizedTensor, dtype: torch.dtype, *, round_scales: bool = False) -> Layer:
    """A two-dimensional weight of a linear layer, for a model in `dtype`.

    Raises:
        Misfit: where compressed-tensors, or vLLM, cannot hold it exactly.
    """
    name = weight.format.name
    if name in _FLOATS:
        if dtype != torch.bfloat16:
            raise Misfit(f"compressed-tensors decodes {name} in bfloat16 only: --dtype bfloat16")
        return _block_float(weight, _FLOATS[name])
    if name == "float8":
        return _float8(weight)
    if weight.format.storage == "affine" and weight.format.bits in VLLM_BITS:
        return _integers(weight, dtype, round_scales)
    raise Misfit(f"vLLM reads no {name} of compressed-tensors: int4, int8, float8, mxfp4, mxfp8 and nvfp4 only")


def _integers(weight: QuantizedTensor, dtype: torch.dtype, round_scales: bool) -> Layer:
    rows, columns = weight.shape
    strategy = _strategy(weight)
    activation, notes = _activation(weight.meta.activation)
    bits, asymmetric = weight.format.bits, weight.zero_point is not None
    weights = _arguments(bits, "int", strategy, symmetric=not asymmetric)
    inputs_of_8 = activation is not None and activation["type"] == "int"
    if activation is not None and not inputs_of_8:
        activation, notes = None, ("float8 inputs of integer weights are left as they are",)
    if bits == 8 and inputs_of_8 and "group_size" not in strategy and not asymmetric:
        codes = (weight.qdata.int() - 128).to(torch.int8)
        tensors = {"weight": codes, "weight_scale": _row_scales(weight, rows).float()}
        notes = (*notes, "the scales are float32: vLLM keeps them, transformers rounds them to the model's dtype")
        return Layer(_scheme(weights, activation, "int-quantized"), tensors | _static(weight), notes)
    scale = _row_scales(weight, rows) if "group_size" not in strategy else weight.packed().scales()
    tensors = {
        "weight_packed": _words(weight.qdata),
        "weight_scale": _in_dtype(scale, dtype, round_scales),
        "weight_shape": torch.tensor([rows, columns]),
    }
    if asymmetric:
        zeros = weight.packed().zeros()
        assert zeros is not None
        tensors["weight_zero_point"] = _words(pack(zeros.expand(scale.shape).t().contiguous(), bits)).t().contiguous()
    if activation is not None and not activation["dynamic"]:
        activation, notes = None, (*notes, "static scales of inputs need int8 weights with a scale a row: left out")
    return Layer(_scheme(weights, activation, "pack-quantized"), tensors, (*notes, *_group_note(strategy)))


def _float8(weight: QuantizedTensor) -> Layer:
    strategy = _strategy(weight)
    if "group_size" in strategy:
        raise Misfit("vLLM reads float8 with a scale a row or a tensor, not in groups")
    activation, notes = _activation(weight.meta.activation)
    weights = _arguments(8, "float", strategy)
    tensors = {
        "weight": weight.qdata.view(torch.float8_e4m3fn),
        "weight_scale": _row_scales(weight, weight.shape[0]).float(),
    }
    notes = (*notes, "the scales are float32: vLLM keeps them, transformers rounds them to the model's dtype")
    return Layer(_scheme(weights, activation, "float-quantized"), tensors | _static(weight), notes)


def _block_float(weight: QuantizedTensor, format: str) -> Layer:
    group, columns = weight.meta.block[1], weight.shape[1]
    if group != weight.format.group_size or columns % group:
        raise Misfit(f"{columns} columns do not divide into blocks of {weight.format.group_size}")
    notes = ("inputs are left as they are",) if weight.meta.activation else ()
    bits, scale = weight.format.bits, weight.scale.view(torch.uint8)
    arguments = {"num_bits": bits, "type": "float", "symmetric": True, "dynamic": False, "group_size": group}
    if format.startswith("nvfp4"):
        outer: Any = weight.tensor_scale  # type: ignore[attr-defined]
        weights = arguments | {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
        tensors = {
            "weight_packed": weight.qdata,
            "weight_scale": scale.view(torch.float8_e4m3fn),
            "weight_global_scale": (1 / outer).reshape(1),
        }
        notes = (*notes, "the float32 scale of the matrix is stored as its inverse: one more rounding of 2^-24")
    else:
        weights = arguments | {"strategy": "group", "scale_dtype": "torch.uint8"}
        key, codes = (
            ("weight", weight.qdata.view(torch.float8_e4m3fn)) if bits == 8 else ("weight_packed", weight.qdata)
        )
        tensors = {key: codes, "weight_scale": scale}
    return Layer(_scheme(weights, None, format), tensors, notes)


def _scheme(weights: dict[str, Any], activation: dict[str, Any] | None, format: str) -> dict[str, Any]:
    return {"weights": weights, "input_activations": activation, "output_activations": None, "format": format}


def _arguments(bits: int, kind: str, strategy: dict[str, Any], symmetric: bool = True) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": symmetric, "dynamic": False, **strategy}


def _strategy(weight: QuantizedTensor) -> dict[str, Any]:
    """What shares a scale. One scale for all is written once a row, which is the same."""
    (down, along), columns = weight.meta.block, weight.shape[1]
    if along == columns and down in (1, weight.shape[0]):
        return {"strategy": "channel"}
    if down != 1:
        raise Misfit(f"blocks of {down} x {along} have no counterpart")
    if columns % along:
        raise Misfit(f"{columns} columns do not divide into groups of {along}")
    return {"strategy": "group", "group_size": along}


def _group_note(strategy: dict[str, Any]) -> tuple[str, ...]:
    group = strategy.get("group_size")
    return () if group is None or group in VLLM_GROUPS else (f"vLLM's kernels have no groups of {group}",)


def _row_scales(weight: QuantizedTensor, rows: int) -> Tensor:
    """[N, 1]."""
    return weight.packed().scales().expand(rows, 1).contiguous()


def _in_dtype(scale: Tensor, dtype: torch.dtype, round_scales: bool) -> Tensor:
    """Scales in the model's dtype, to which programs cast them when they load it."""
    cast = scale.to(dtype)
    if not round_scales and not torch.equal(cast.float(), scale.float()):
        kinds = " and ".join(str(kind).removeprefix("torch.") for kind in (scale.dtype, dtype))
        raise Misfit(f"scales and model are {kinds}: programs round scales to the model's dtype", scales_only=True)
    return cast.contiguous()


def _words(qdata: Tensor) -> Tensor:
    """uint8 [N, bytes] -> int32 [N, ceil(bytes / 4)], little end first."""
    padded = F.pad(qdata, (0, -qdata.shape[-1] % 4)).contiguous()
    return padded.view(torch.int32)


def _activation(activation: Activation | None) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """The arguments for inputs, and a note where compressed-tensors has none like them."""
    if activation is None:
        return None, ()
    kinds = {INT8: "int", FLOAT8: "float"}
    known = activation.dtype in kinds and (activation.group == 0 or activation.group == ALL_TOKENS)
    if not known:
        return None, (f"inputs are left as they are: there is no {activation.scheme} there",)
    whole = activation.group == ALL_TOKENS
    found = {
        "num_bits": 8,
        "type": kinds[activation.dtype],
        "symmetric": not activation.asymmetric,
        "dynamic": not activation.static,
        "strategy": "tensor" if whole else "token",
    }
    return found, ("codes of inputs are rounded by the other program's rule, not ours",)


def _static(weight: QuantizedTensor) -> dict[str, Tensor]:
    """What a calibration run found for the inputs, where it did."""
    if weight.act_scale is None:
        return {}
    found = {"input_scale": weight.act_scale.reshape(1)}
    if weight.act_zero_point is not None:
        found["input_zero_point"] = weight.act_zero_point.reshape(1)
    return found
