"""Damaged tensors and settings end in an error with a name, or in a weight of the shape that they say; never else."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from foreign.test_goldens import FOLDER, GOLDENS
from llmquant.errors import LlmQuantError
from llmquant.foreign import READERS
from llmquant.foreign.detect import find_reader
from llmquant.foreign.store import Store

# How many damages of each file; more with LLMQUANT_FUZZ=1000.
ROUNDS = int(os.environ.get("LLMQUANT_FUZZ", "25"))
HOSTILE: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    33,
    2**31,
    -(2**63),
    10**30,
    1.5,
    float("nan"),
    "",
    "x",
    "int",
]
HOSTILE += ["group", "float", [], [1], [16, 16], [0, 0], [[]], {}, {"a": 1}, {"weights": 3}, [None, None]]
DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32]
DTYPES += [torch.float64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]


class Memory(Store):
    """Tensors that lie in no file."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(())
        self.tensors = tensors
        self._kind = {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}
        self._file = dict.fromkeys(tensors, FOLDER)

    def read(self, key: str) -> Tensor:
        return self.tensors[key]


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys() if key != "expected"}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["settings"])


def places(settings: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything in a config but what says whose it is."""
    if isinstance(settings, dict | list):
        for key in settings if isinstance(settings, dict) else range(len(settings)):
            if key != "quant_method":
                yield (*path, key)
                yield from places(settings[key], (*path, key))


def damage_settings(settings: dict[str, Any], dice: random.Random) -> None:
    *path, last = dice.choice(list(places(settings)))
    for step in path:
        settings = settings[step]
    settings[last] = copy.deepcopy(dice.choice(HOSTILE))


def damage_tensors(tensors: dict[str, Tensor], dice: random.Random) -> None:
    key = dice.choice(sorted(tensors))
    tensor = tensors.pop(key)
    raw = tensor.contiguous().flatten().view(torch.uint8).clone()
    generator = torch.Generator().manual_seed(dice.randrange(2**31))
    match dice.randrange(8):
        case 0:
            return
        case 1:
            tensors[f"{key}{dice.choice(['x', '.absmax', '_scale', '.qweight', '.quant_state.bitsandbytes__nf4'])}"] = (
                tensor
            )
        case 2:
            tensors[key] = raw.random_(0, 256, generator=generator).view(tensor.dtype).view(tensor.shape)
        case 3:
            kind = dice.choice(DTYPES)
            if raw.numel() % kind.itemsize == 0:
                tensors[key] = raw.view(kind)
        case 4:
            tensors[key] = tensor.flatten()[dice.randrange(4) :]
        case 5:
            tensors[key] = tensor.t().contiguous() if tensor.dim() == 2 else tensor[None]
        case 6:
            tensors[key] = tensor[: dice.randrange(len(tensor) + 1)] if tensor.dim() else tensor[None, None]
        case 7 if len(raw):
            raw[dice.randrange(len(raw))] = dice.randrange(256)
            tensors[key] = raw.view(tensor.dtype).view(tensor.shape)


def attempt(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    """Whether all weights can be read; anything else must be an error with a name."""
    store = Memory(tensors)
    try:
        for weight in find_reader(READERS, settings).weights(store, settings):
            if weight.grid is None:
                assert weight.values().shape == weight.shape
            else:
                assert weight.sketch(torch.float32).shape == weight.shape
                assert weight.load(torch.float32).dequantize().shape == weight.shape
        list(find_reader(READERS, settings).warnings(settings))
    except LlmQuantError:
        return False
    return True


@pytest.mark.parametrize("name", GOLDENS)
def test_only_named_errors(name: str) -> None:
    dice = random.Random(name)
    tensors, settings = golden(name)
    assert attempt(dict(tensors), copy.deepcopy(settings))
    refused = 0
    for _ in range(ROUNDS):
        damaged, changed = dict(tensors), copy.deepcopy(settings)
        for _ in range(dice.randint(1, 2)):
            if dice.random() < 0.5:
                damage_settings(changed, dice)
            elif damaged:
                damage_tensors(damaged, dice)
        refused += not attempt(damaged, changed)
    assert refused > 0
