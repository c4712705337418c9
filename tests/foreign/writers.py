"""Whole tiny checkpoints as GPTQ and AWQ lay them out, packed slowly with Python's integers, and their plain twins.

What single weights look like is tested against the real packages (`test_goldens`); here it is about names, merges and
whatever else a model has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from models import edit_json, rewrite, save
from torch import Tensor

GROUP = 16
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Pair(NamedTuple):
    """A quantized checkpoint, and a plain one in float32 of the values that it stands for."""

    foreign: Path
    plain: Path


class Codes(NamedTuple):
    """codes [N, K], zero and scale [N, G], and the group of each column [K]."""

    codes: Tensor
    zero: Tensor
    scale: Tensor
    order: Tensor

    def values(self) -> Tensor:
        return (self.codes - self.zero[:, self.order]).float() * self.scale.float()[:, self.order]


def quantize(weight: Tensor, bits: int, order: Tensor) -> Codes:
    """Min/max rounding, [N, K]."""
    groups = [weight[:, order == g] for g in range(int(order.max()) + 1)]
    low = torch.stack([g.amin(1) for g in groups], 1).clamp(max=0)
    high = torch.stack([g.amax(1) for g in groups], 1).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).half()
    zero = (-low / scale.float()).round().clamp(0, 2**bits - 1).long()
    codes = (weight / scale.float()[:, order]).round().long() + zero[:, order]
    return Codes(codes.clamp(0, 2**bits - 1), zero, scale, order)


def words(codes: Iterable[int], bits: int) -> list[int]:
    """A dense stream of codes as signed words of 32 bits."""
    listed = list(codes)
    stream = sum(code << (bits * i) for i, code in enumerate(listed))
    found = [stream >> at & 0xFFFFFFFF for at in range(0, bits * len(listed), 32)]
    return [word - 2**32 if word >= 2**31 else word for word in found]


def packed(rows: Tensor, bits: int) -> Tensor:
    """[R, K] -> int32 [R, K * bits / 32]."""
    return torch.tensor([words(row, bits) for row in rows.tolist()], dtype=torch.int32)


def gptq_parts(found: Codes, bits: int) -> dict[str, Tensor]:
    """The first version of the format."""
    return {
        "qweight": packed(found.codes, bits).t(),
        "qzeros": packed((found.zero.t() - 1) % 2**bits, bits),
        "scales": found.scale.t(),
        "g_idx": found.order.int(),
    }


def awq_parts(found: Codes, bits: int) -> dict[str, Tensor]:
    """The gemm layout."""

    def across(matrix: Tensor) -> Tensor:
        return packed(matrix.unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)].flatten(-2), bits)

    return {"qweight": across(found.codes.t()), "qzeros": across(found.zero.t()), "scales": found.scale.t()}


SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
}
PARTS: dict[str, Callable[[Codes, int], dict[str, Tensor]]] = {"gptq": gptq_parts, "awq": awq_parts}


def write(
    family: str, folder: Path, method: str = "gptq", *, bits: int = 4, scattered: str = "", **overrides: Any
) -> Pair:
    """A model of a family, its linear weights quantized; columns of modules that end in `scattered` in mixed groups."""
    pair = Pair(folder / "foreign", folder / "plain")
    for target in pair:
        save(family, target, **overrides)
    conv1d = family == "gpt2"
    quantized: dict[str, Codes] = {}

    def change(tensors: dict[str, Tensor], foreign: bool) -> None:
        for key in [k for k, t in tensors.items() if is_linear(k, t)]:
            module, weight = key.removesuffix(".weight"), tensors.pop(key)
            weight = weight.t() if conv1d else weight
            order = torch.arange(weight.shape[1]) // GROUP
            if scattered and module.endswith(scattered):
                order = order.flip(0)
            found = quantized.setdefault(key, quantize(weight.float(), bits, order))
            if foreign:
                parts = PARTS[method](found, bits)
                tensors.update({f"{module}.{part}": t.contiguous() for part, t in parts.items()})
            else:
                values = found.values()
                tensors[key] = (values.t() if conv1d else values).contiguous()

    rewrite(pair.foreign / "model.safetensors", lambda tensors: change(tensors, foreign=True))
    rewrite(pair.plain / "model.safetensors", lambda tensors: change(tensors, foreign=False))
    settings = SETTINGS[method] | {"bits": bits}
    edit_json(pair.foreign / "config.json", lambda config: config.update(quantization_config=settings))
    return pair


def is_linear(key: str, tensor: Tensor) -> bool:
    """Whether those libraries would quantize it: no embedding, no head, no router."""
    kept = ("embed", "wte", "wpe", "lm_head", "gate.weight", "router")
    return key.endswith(".weight") and tensor.dim() == 2 and not any(part in key for part in kept)


def set_quantization(folder: Path, **changes: Any) -> None:
    """Changes settings of a written checkpoint; None takes one away."""

    def change(config: dict[str, Any]) -> None:
        settings = config["quantization_config"]
        settings.update(changes)
        for name in [n for n, value in changes.items() if value is None]:
            del settings[name]

    edit_json(folder / "config.json", change)


def settings_of(folder: Path) -> dict[str, Any]:
    """The `quantization_config` of a folder."""
    return dict(json.loads((folder / "config.json").read_text())["quantization_config"])
