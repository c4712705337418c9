"""Tensor parallel through transformers: each weight is made whole, then cut for this process.

Transformers would cut the tensors of the file before they become weights. A scale of a row must see the whole row, and
packed codes are no columns, so plain placeholders stand in for the sharded ones while a model is loaded. The parts are
then those of the whole quantized weight, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.distributed.sharding_utils import DtensorShardOperation

from llmquant.errors import ConfigError
from llmquant.tensor import QuantizedTensor


class Layout(NamedTuple):
    """How a weight is to be quantized, as far as cuts go.

    Attributes:
        block: rows and columns that share a scale, of the logical [out, in] matrix.
        transposed: whether the weight stands as [..., in, out].
    """

    block: tuple[int, int]
    transposed: bool


def load_whole(model: nn.Module, layout_of: Callable[[str], Layout | None]) -> None:
    """From now on `model.state_dict()` shows plain placeholders for sharded weights that have a layout.

    Nothing is sharded yet when this is called: the first state dict is what transformers begins its loading with, and
    then all cuts are checked, on every process alike.
    """
    checked = False

    def show_whole(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        nonlocal checked
        found = {name: layout for name, t in state.items() if isinstance(t, DTensor) and (layout := layout_of(name))}
        if not checked:
            _refuse_gathering(model, found)
            for name, layout in found.items():
                _check_cuts(name, state[name], layout)
        checked = True
        for name in found:
            state[name] = torch.empty(state[name].shape, dtype=state[name].dtype, device="meta")

    handle = model.register_state_dict_post_hook(show_whole)
    model._llmquant_load_whole = handle  # type: ignore[assignment]


def loaded(model: nn.Module) -> None:
    """Ends what `load_whole` began."""
    handle = model.__dict__.pop("_llmquant_load_whole", None)
    if handle is not None:
        handle.remove()


def own_part(weight: QuantizedTensor, module: nn.Module, name: str) -> QuantizedTensor:
    """What this process keeps of a weight: all of it, or where the parameter is sharded a copy of its part."""
    placeholder = module._parameters[name]
    if not isinstance(placeholder, DTensor):
        return weight
    if not isinstance(module, nn.Embedding):  # rows of a table in parts are found by DTensor
        module._hf_quantized_needs_local_tp = True  # type: ignore[assignment]  # transformers hands it plain tensors
    part: QuantizedTensor = DtensorShardOperation(placeholder).shard_tensor(weight)
    return part if part is weight else part.clone()  # type: ignore[return-value]


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def refuse_sharded(name: str, weight: Tensor) -> None:
    """Raises `ConfigError` for a weight that is sharded before it was quantized."""
    if isinstance(weight, DTensor):
        raise ConfigError(
            "the file has no tensor of this weight alone, so that it was sharded before it could be quantized",
            where=name,
            hint="quantize the checkpoint in one process, save it, and load that on several",
        )


def refuse_to_save(model: nn.Module) -> None:
    """Raises `ConfigError` for a model whose quantized weights are not all here: in parts, or taken away by hooks."""
    for name, tensor in model.named_parameters():
        if not isinstance(local(tensor), QuantizedTensor):
            continue
        if isinstance(tensor, DTensor):
            raise ConfigError(
                "a quantized weight that lies in parts on several processes cannot be saved",
                where=name,
                hint="save from a process that has the whole model, before it is sharded",
            )
        if tensor.is_meta:
            raise ConfigError(
                "a quantized weight that is offloaded cannot be saved",
                where=name,
                hint="call accelerate.hooks.remove_hook_from_submodules(model) first, or save before offloading",
            )


def _refuse_gathering(model: Any, found: dict[str, Layout]) -> None:
    if found and (getattr(model, "_fsdp_size", None) or 1) > 1:
        raise ConfigError(
            "transformers cannot shard quantized weights with FSDP while it loads them",
            where="distributed_config",
            hint="load the model without it, then call torch.distributed.fsdp.fully_shard on its layers",
        )


def _check_cuts(name: str, weight: DTensor, layout: Layout) -> None:
    for mesh_dim, placement in enumerate(weight.placements):
        dim: int | None = getattr(placement, "dim", None)
        if dim is None:
            continue
        side = dim % weight.dim() - weight.dim() + 2  # of the last two dimensions: 0 and 1
        if side < 0:
            continue
        step, size = layout.block[1 - side if layout.transposed else side], weight.shape[dim]
        parts = weight.device_mesh.size(mesh_dim)
        cut = [at for at in _cuts(size, parts, getattr(placement, "split_factor", 1)) if step < size and at % step]
        if cut:
            raise ConfigError(
                f"cutting {size} into parts for {parts} processes divides blocks of {step} weights that share a scale "
                f"(at {cut[0]})",
                where=name,
                hint=f"use groups whose size divides {cut[0]}, scales a row, or fewer processes, or keep this weight "
                'as it is with the scheme "none"',
            )


def _cuts(size: int, parts: int, groups: int) -> Iterator[int]:
    """Where a dimension is cut: each of its groups (merged weights have several) is cut into as many parts."""
    width = -(-size // groups)
    step = -(-width // parts)
    for start in range(0, size, width):
        yield from range(start, min(start + width, size), step)
