"""`quantize_dynamic`: int8 weights and int8 inputs of linears and LSTMs, in one call, without a graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from llmquant.config.named import Int8DynamicActivationInt8WeightConfig
from llmquant.errors import BadWeightError, ConfigError
from llmquant.pt2e.lstm import DynamicLSTM
from llmquant.quantize import quantize_weight

Spec = Iterable[type[nn.Module] | str] | Mapping[type[nn.Module] | str, Any]


def quantize_dynamic(
    model: nn.Module, qconfig_spec: Spec | None = None, dtype: torch.dtype = torch.qint8, inplace: bool = False
) -> nn.Module:
    """A copy of a model whose linears and LSTMs have int8 weights, a scale for each row, and quantize their inputs.

    Each token (row of the input) gets a scale of its own when it comes; products are sums of integers, on this
    library's kernels. `torch.save` of the result or of its state dict is about a quarter of the float32 one.

    Args:
        model: any module. A weight that a linear shares with an embedding stays float in the embedding.
        qconfig_spec: types (`nn.Linear`, `nn.LSTM`) and names of modules; a name stands for all that is inside it, and
            the longest one decides. Of a mapping, entries with the value None are left as they are; other values only
            say that it is wanted. Both types, everywhere, if it is left out.
        dtype: `torch.qint8`; there is nothing else.
        inplace: whether to change `model` itself and return it.

    Raises:
        ConfigError: for another dtype, for types that cannot be quantized, and for names that are not in the model.
        BadWeightError: for weights that are empty, or hold NaN or infinity. The model is unchanged then.
    """
    if dtype != torch.qint8:
        raise ConfigError(f"dynamic quantization to {dtype} is not there", hint="dtype=torch.qint8, or model.half()")
    spec = _read(qconfig_spec)
    _check(spec, model)
    wanted = [name for name, module in model.named_modules() if _applies(spec, name, module)]
    made = {name: _make(model.get_submodule(name), name) for name in wanted}
    return _put(model if inplace else _copy(model, made), made)


def _read(spec: Spec | None) -> dict[type[nn.Module] | str, bool]:
    """What each type and each name is to become."""
    if spec is None:
        return dict.fromkeys(_MAKERS, True)
    if isinstance(spec, Mapping):
        return {key: value is not None for key, value in spec.items()}
    return dict.fromkeys(spec, True)


def _check(spec: dict[type[nn.Module] | str, bool], model: nn.Module) -> None:
    names = {name for name, _ in model.named_modules()}
    for key, wanted in spec.items():
        if isinstance(key, str) and key not in names:
            raise ConfigError("no such module to quantize", where=key, hint="names as in model.named_modules()")
        if wanted and not isinstance(key, str) and key not in _MAKERS:
            raise ConfigError(f"{key.__name__} cannot be quantized dynamically", hint="nn.Linear or nn.LSTM")


def _applies(spec: dict[type[nn.Module] | str, bool], name: str, module: nn.Module) -> bool:
    """The longest name that holds a module decides; where none does, its type."""
    if type(module) not in _MAKERS:
        return False
    holders = [key for key in spec if isinstance(key, str) and (not key or f"{name}.".startswith(f"{key}."))]
    return spec[max(holders, key=len)] if holders else spec.get(type(module), False)


def _linear(module: nn.Linear) -> nn.Linear:
    made = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    weight = quantize_weight(module.weight, Int8DynamicActivationInt8WeightConfig(algorithm="rtn"))
    made.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        made.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=False)
    return made.train(module.training)


_MAKERS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {nn.Linear: _linear, nn.LSTM: DynamicLSTM.from_float}


def _make(module: nn.Module, name: str) -> nn.Module:
    try:
        return _MAKERS[type(module)](module)
    except BadWeightError as error:
        raise BadWeightError(error.what, where=name, hint=error.hint) from error


def _copy(model: nn.Module, made: dict[str, nn.Module]) -> nn.Module:
    """A deep copy of all but the modules that are replaced: their weights are not copied first."""
    memo = {id(model.get_submodule(name)): replacement for name, replacement in made.items()}
    return copy.deepcopy(model, memo)


def _put(model: nn.Module, made: dict[str, nn.Module]) -> nn.Module:
    for name, replacement in made.items():
        if not name:
            return replacement
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, replacement)
    return model
