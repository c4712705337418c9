"""Copies of quantized tensors, in other dtypes and on other devices; and what takes them for plain memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import UnsupportedOpError
from llmquant.tensor import slicing
from llmquant.tensor.base import FUNCTIONS, KEEPS_GRADIENTS, QuantizedTensor, unsupported
from llmquant.tensor.table import aten, dispatch, function


@dispatch(aten.detach)
def _detach(func: Any, w: QuantizedTensor) -> QuantizedTensor:
    return w.rebuild(lambda _, t: t.detach())


@dispatch(aten.alias)
def alike(func: Any, w: QuantizedTensor) -> QuantizedTensor:
    return w.rebuild(lambda _, t: t)


KEEPS_GRADIENTS |= {aten.detach, aten.alias, aten.t, aten.transpose, aten.permute}
KEEPS_GRADIENTS |= {aten.equal, aten.is_pinned, aten.empty_like}


@dispatch(aten.clone)
def _clone(func: Any, w: QuantizedTensor, **_: Any) -> QuantizedTensor:
    return w.rebuild(lambda _, t: t.clone(), copied=True)


@dispatch(aten.empty_like)
def _empty_like(
    func: Any, w: QuantizedTensor, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any
) -> QuantizedTensor:
    return w.rebuild(lambda _, t: torch.empty_like(t, device=device), _float_dtype(func, w, dtype), copied=True)


@dispatch(aten._to_copy)
def _to_copy(
    func: Any,
    w: QuantizedTensor,
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
    non_blocking: bool = False,
    **_: Any,
) -> QuantizedTensor:
    dtype = _float_dtype(func, w, dtype)
    return w.rebuild(lambda _, t: t.to(device=device, non_blocking=non_blocking, copy=True), dtype, copied=True)


@dispatch(aten._pin_memory)
def _pin_memory(func: Any, w: QuantizedTensor, *args: Any) -> QuantizedTensor:
    return w.rebuild(lambda _, t: t.pin_memory(*args), copied=True)


@dispatch(aten.is_pinned)
def _is_pinned(func: Any, w: QuantizedTensor, *args: Any) -> bool:
    return all(t.is_pinned(*args) for _, t in w.parts())


@dispatch(aten.copy_)
def _copy(func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not _same_kind(target, source):
        return unsupported(func, target, source)
    assert isinstance(target, QuantizedTensor) and isinstance(source, QuantizedTensor)
    if target._read_only:
        raise UnsupportedOpError(
            f"{func} into a part of a {target.meta.format} weight that shares scales or bytes with the rest of it",
            where=repr(target),
            hint="write to whole blocks, or to a clone()",
        )
    if torch.promote_types(target.scale.dtype, source.scale.dtype) != target.scale.dtype:
        return unsupported(f"{func} that rounds scales to {target.scale.dtype}", target)
    slicing.check_writable(target, source)
    for field, tensor in target.parts():
        tensor.copy_(getattr(source, field.name), non_blocking)
    QuantizedTensor.writes += 1
    return target


@dispatch(aten.equal)
def _equal(func: Any, a: Tensor, b: Tensor) -> bool:
    if not _same_kind(a, b) or a.dtype != b.dtype:
        return False
    assert isinstance(a, QuantizedTensor)
    return all(torch.equal(tensor, getattr(b, field.name)) for field, tensor in a.parts())


@function(Tensor.data.__set__)  # type: ignore[attr-defined]
def _set_data(target: Tensor, source: Tensor) -> None:
    if not _same_kind(target, source):
        return unsupported("setting .data", target, source)
    assert isinstance(target, QuantizedTensor) and isinstance(source, QuantizedTensor)
    if target.dtype != source.dtype:
        with torch._C.DisableTorchFunctionSubclass():
            torch.Tensor.data.__set__(target, source)  # type: ignore[attr-defined]  # the dtype, the parts follow
    for field, tensor in source.detach().parts():  # type: ignore[attr-defined]
        setattr(target, field.name, tensor)
    target._read_only = source._read_only


def no_plain_memory(name: str, w: Tensor, *_: Any, **__: Any) -> Any:
    """Refuses what takes a weight for an array in memory."""
    assert isinstance(w, QuantizedTensor)
    raise UnsupportedOpError(
        f"{name} is not supported for {w.meta.format} weights",
        where=repr(w),
        hint="call .dequantize() first if a plain tensor is what you want; to offload weights with accelerate, keep "
        "them in memory (cpu_offload): it writes plain arrays to disk only",
    )


# Torch would refuse the first three without a name, and hand out memory that is not there.
for _name in ("numpy", "tolist", "item", "__array__", "__dlpack__"):
    FUNCTIONS[getattr(Tensor, _name)] = partial(no_plain_memory, _name)


def _same_kind(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are quantized alike, so that their inner tensors correspond."""
    return (
        isinstance(a, QuantizedTensor)
        and isinstance(b, QuantizedTensor)
        and (a.meta, a.shape) == (b.meta, b.shape)
        and [f.name for f, _ in a.parts()] == [f.name for f, _ in b.parts()]
    )


def _float_dtype(func: Any, w: QuantizedTensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None and dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return unsupported(f"{func} to {dtype}", w)
    return dtype or w.dtype
