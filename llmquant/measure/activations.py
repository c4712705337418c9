"""Where a quantized model leaves the path of the plain one: the outputs of both on one input, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.errors import LlmQuantError
from llmquant.measure.evaluate import inference
from llmquant.tensor import QuantizedTensor

JUMP = 6.0  # dB: the error doubles

See = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class LayerError:
    """How far the outputs of one module are apart.

    Attributes:
        name: FQN of the module; a second call of it in one pass has `#2` behind it.
        kind: `block` (a member of the model's list of blocks), `quantized` (it owns a quantized weight), or `plain`.
        sqnr: 10 log10(|x|^2 / |x - y|^2) in dB, infinite where nothing differs.
        mean_abs_difference: mean |x - y|.
        mean_abs: mean |x|, of the plain model.
    """

    name: str
    kind: str
    sqnr: float
    mean_abs_difference: float
    mean_abs: float


@dataclass(frozen=True)
class ActivationReport:
    """All layers in the order in which the plain model ran them.

    Attributes:
        rows: one a layer.
        tokens: how many the models read.
        unmatched: modules that only one of the models ran, or whose outputs differ in shape; and those that own a
            quantized weight but are never called, for the model takes the weight out of them (Mamba's `dt_proj`).
    """

    rows: tuple[LayerError, ...]
    tokens: int
    unmatched: tuple[str, ...]

    def path(self) -> tuple[LayerError, ...]:
        """The blocks, whose outputs are the residual stream; all layers of a model without two blocks."""
        blocks = tuple(row for row in self.rows if row.kind == "block")
        return blocks if len(blocks) > 1 else self.rows

    def first_jump(self, decibels: float = JUMP) -> LayerError | None:
        """The first of `path` that is so much worse than everything before it. None if there is none."""
        least = math.inf
        for row in self.path():
            if row.sqnr < least - decibels and math.isfinite(least):
                return row
            least = min(least, row.sqnr)
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; an infinite SQNR is null."""
        jump = self.first_jump()
        rows = [{**vars(row), "sqnr": row.sqnr if math.isfinite(row.sqnr) else None} for row in self.rows]
        first = jump.name if jump else None
        return {"tokens": self.tokens, "first_jump": first, "layers": rows, "unmatched": list(self.unmatched)}


def compare_activations(fp: nn.Module, q: nn.Module, inputs: Tensor | Mapping[str, Any]) -> ActivationReport:
    """Runs two models on the same input and compares what each of their layers puts out.

        report = compare_activations(plain, quantized, tokenizer("...", return_tensors="pt"))

    Layers are the modules that own parameters, and the blocks. The outputs of the plain model are kept until the other
    has run, in its dtype; those of the other are not. Errors pile up on the way: a layer's inputs differ, too.

    Args:
        fp: the plain model.
        q: the quantized one; its modules have the same names.
        inputs: token ids [B, T] int64, or the models' arguments.

    Raises:
        LlmQuantError: if the models share no layer with outputs of the same shape, or if outputs are not finite.
    """
    kept: dict[str, Tensor] = {}
    _run(fp, inputs, lambda name, x: kept.update({name: x.cpu().clone()}))
    kinds = {name: _kind(q, name) for name, _ in q.named_modules()}
    found: dict[str, LayerError] = {}
    strange: list[str] = []

    def compare(name: str, y: Tensor) -> None:
        if name in kept and kept[name].shape == y.shape:
            found[name] = _error(name, kinds[name.partition("#")[0]], kept.pop(name), y.cpu())
        else:
            strange.append(name)

    order = list(kept)
    _run(q, inputs, compare)
    if not found:
        raise LlmQuantError("the two models have no layer in common", hint="a model and its quantized copy")
    silent = [name for name, kind in kinds.items() if kind == "quantized" and name not in found]
    unmatched = tuple(dict.fromkeys([*strange, *kept, *silent]))
    return ActivationReport(tuple(found[name] for name in order if name in found), _tokens(inputs), unmatched)


def _run(model: nn.Module, inputs: Tensor | Mapping[str, Any], see: See) -> None:
    device = next(model.parameters()).device
    arguments = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    on_device = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    with inference(model), _watched(model, see):
        model(**on_device)


@contextmanager
def _watched(model: nn.Module, see: See) -> Iterator[None]:
    """Shows the output of every layer, call by call; no hook stays behind."""
    calls: dict[str, int] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, Tensor) and first.is_floating_point():
                calls[name] = calls.get(name, 0) + 1
                see(name if calls[name] == 1 else f"{name}#{calls[name]}", first.detach())

        return hook

    layers = [(name, module) for name, module in model.named_modules() if name and _is_layer(model, name, module)]
    handles = [module.register_forward_hook(hook_of(name)) for name, module in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_layer(model: nn.Module, name: str, module: nn.Module) -> bool:
    return _is_block(model, name) or any(True for _ in module.parameters(recurse=False))


def _is_block(model: nn.Module, name: str) -> bool:
    """Whether a module is a member of a list of modules that have several children each."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return isinstance(parent, nn.ModuleList) and len(list(model.get_submodule(name).children())) > 1


def _kind(model: nn.Module, name: str) -> str:
    if name and _is_block(model, name):
        return "block"
    own = model.get_submodule(name).parameters(recurse=False)
    return "quantized" if any(isinstance(p, QuantizedTensor) for p in own) else "plain"


def _error(name: str, kind: str, x: Tensor, y: Tensor) -> LayerError:
    """Of outputs x (plain) and y; sums in float64, which hold the squares of any 16-bit number."""
    plain, difference = x.float(), x.float() - y.float()
    if not difference.isfinite().all():
        raise LlmQuantError("the outputs of a layer are not finite", where=name, hint="a dtype of wider range")
    energy, noise = (float(t.square().sum(dtype=torch.float64)) for t in (plain, difference))
    sqnr = math.inf if noise == 0 else 10 * math.log10(energy / noise) if energy else -math.inf
    return LayerError(name, kind, sqnr, float(difference.abs().mean()), float(plain.abs().mean()))


def _tokens(inputs: Tensor | Mapping[str, Any]) -> int:
    ids = inputs if isinstance(inputs, Tensor) else inputs.get("input_ids")
    return ids.numel() if isinstance(ids, Tensor) else 0


def worst(rows: Sequence[LayerError], count: int = 10) -> list[LayerError]:
    """Those of least SQNR, the worst first."""
    return sorted(rows, key=lambda row: row.sqnr)[:count]
