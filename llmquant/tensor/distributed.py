"""Quantized weights on several processes: what `distribute_tensor` and FSDP2 (`fully_shard`) ask of a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmquant.errors import UnsupportedOpError
from llmquant.primitives.blocks import block_counts
from llmquant.tensor import slicing
from llmquant.tensor.base import Field, QuantizedTensor, unsupported
from llmquant.tensor.table import aten, dispatch

LEAVE_OUT = "name it in `ignored_params` of fully_shard"


@dispatch(aten.new_zeros)
def _new_zeros(
    func: Any, w: QuantizedTensor, size: Any, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any
) -> QuantizedTensor:
    """A weight of zeros with other rows or experts, as a place for a shard: codes and scales are zero."""
    shape = [*size[:-2], size[-1], size[-2]] if w.meta.transposed else list(size)
    if len(shape) != w.dim() or dtype not in (None, w.dtype):
        return unsupported(f"{func} of {tuple(size)}", w)
    if shape[-1] != w.meta.columns:
        raise UnsupportedOpError(
            f"{func}: shards of a weight have its whole rows of {w.meta.columns}, not {shape[-1]}",
            where=repr(w),
            hint=LEAVE_OUT,
        )
    rows, step = w.qdata.shape[-2], w.meta.block[0]
    shares = step > 1 or any(field.per == "matrix" for field, _ in w.parts())
    if w.dim() == 2 and shares and rows % shape[0]:
        raise UnsupportedOpError(
            f"{func}: shards of {shape[0]} of {rows} rows, which share scales, are not all of one size",
            where=repr(w),
            hint=f"choose a number of processes that divides {rows}, or {LEAVE_OUT}",
        )
    block = (shape[-2] if step >= rows else step, w.meta.block[1])
    across = block_counts(shape[-2], shape[-1], block)[0]
    count = {"element": shape[-2], "block": across, "row": across, "matrix": 1}

    def zeros(field: Field, tensor: Tensor) -> Tensor:
        return tensor.new_zeros(*shape[:-2], count[field.per], tensor.shape[-1], device=device)

    result = w.rebuild(zeros, copied=True, block=block)
    result._whole = w._whole or w.meta
    return result


@dispatch(aten.as_strided)
def _as_strided(func: Any, w: QuantizedTensor, size: Any, stride: Any, offset: int | None = None) -> QuantizedTensor:
    """The first rows or experts, which is all that FSDP2 asks for."""
    if offset or tuple(stride) != w.stride() or list(size[1:]) != list(w.shape[1:]) or size[0] > w.shape[0]:
        return unsupported(func, w)
    return slicing.take_slice(w, slicing.logical_axis(w, 0), 0, size[0])


@dispatch(aten.constant_pad_nd)
def _pad(func: Any, w: QuantizedTensor, *_: Any, **__: Any) -> QuantizedTensor:
    """`distribute_tensor` pads parts to one size."""
    raise UnsupportedOpError(
        f"{func} is not supported for {w.meta.format} weights: parts of them must be of one size as they are",
        where=repr(w),
        hint="to cut this weight, choose a number of processes that divides the dimension; or leave it whole",
    )


@dispatch(torch.ops.c10d.scatter_, torch.ops.c10d.broadcast_)
def _send(func: Any, outputs: list[QuantizedTensor], *args: Any) -> tuple[list[QuantizedTensor], Any]:
    """From one process to others, part by part."""
    work = None
    for field, tensor in outputs[0].parts():
        target = tensor.contiguous()
        *_, work = func([target], *(_part(arg, field.name) for arg in args))
        work.wait()
        if target is not tensor:
            tensor.copy_(target)
    QuantizedTensor.writes += 1
    return outputs, work


def _part(value: Any, name: str) -> Any:
    """One inner tensor of each quantized tensor in an argument, ready to be sent."""
    if isinstance(value, list):
        return [_part(v, name) for v in value]
    return getattr(value, name).contiguous() if isinstance(value, QuantizedTensor) else value
