"""Views, slices and joints of quantized tensors: what changes their shape and keeps their codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmquant.tensor import slicing
from llmquant.tensor.base import Field, QuantizedTensor, unsupported
from llmquant.tensor.copies import alike, no_plain_memory
from llmquant.tensor.table import aten, dispatch


@dispatch(aten.t, aten.transpose, aten.permute)
def _transpose(func: Any, w: QuantizedTensor, *dims: Any) -> QuantizedTensor:
    order = list(range(w.dim()))
    if func.overloadpacket is aten.permute:
        order = [d % w.dim() for d in dims[0]]
    else:
        a, b = dims or (-2, -1)
        order[a], order[b] = order[b], order[a]
    straight = list(range(w.dim()))
    if order == straight:
        return alike(func, w)
    if order != [*straight[:-2], straight[-1], straight[-2]]:
        return unsupported(func, w)
    return w.rebuild(lambda _, t: t, transposed=not w.meta.transposed)


@dispatch(aten.expand)
def _expand(func: Any, w: QuantizedTensor, shape: Any, **_: Any) -> QuantizedTensor:
    if any(n not in (-1, size) for n, size in zip(shape[-2:], w.shape[-2:], strict=True)):
        return unsupported(func, w)
    return w.rebuild(lambda _, t: t.expand(*shape[:-2], -1, -1))


@dispatch(aten.view, aten._unsafe_view, aten._reshape_alias)
def _view(func: Any, w: QuantizedTensor, shape: Any, *_: Any) -> QuantizedTensor:
    if isinstance(shape, torch.dtype):
        return no_plain_memory(f"{func} as {shape}", w)
    known = [n for n in shape if n != -1]
    if -1 in shape:
        rest = 1
        for n in known:
            rest *= n
        shape = [n if n != -1 else w.numel() // max(rest, 1) for n in shape]
    shape = list(shape)
    if shape == list(w.shape):
        return alike(func, w)
    if shape == [w.numel()] and w._whole is not None:
        return alike(func, w)  # FSDP2 keeps a flat view of a shard, which it only reads where tensors are plain
    if len(shape) < 2 or _count(shape) != w.numel():
        return unsupported(func, w)
    if shape[-2:] == list(w.shape[-2:]):  # only the dimensions of experts change
        return _reshape(w, lambda _, t: t.reshape(*shape[:-2], *t.shape[-2:]))
    rows, step = w.qdata.shape[-2], w.meta.block[0]
    if w.meta.transposed or shape[-1] != w.meta.columns or rows % step or shape[-2] % step:
        return unsupported(func, w)
    if w.dim() > 2 and any(field.per == "matrix" for field, _ in w.parts()):
        return unsupported(func, w)  # rows of several matrices would share a scale

    def regroup(field: Field, tensor: Tensor) -> Tensor:
        if field.per == "matrix":
            return tensor.expand(*shape[:-2], 1, 1)
        return tensor.reshape(*shape[:-2], shape[-2] // (1 if field.per == "element" else step), tensor.shape[-1])

    return _reshape(w, regroup)


def _count(shape: Any) -> int:
    return int(torch.Size(shape).numel())


def _reshape(w: QuantizedTensor, change: Callable[[Field, Tensor], Tensor]) -> QuantizedTensor:
    result = w.rebuild(change)
    alias = torch._C._is_alias_of  # type: ignore[attr-defined]
    result._read_only |= not all(alias(tensor, getattr(w, field.name)) for field, tensor in result.parts())
    return result


@dispatch(aten.unsqueeze)
def _unsqueeze(func: Any, w: QuantizedTensor, dim: int) -> QuantizedTensor:
    dim = _wrap(dim, w.dim() + 1)
    if dim > w.dim() - 2:
        return unsupported(func, w)
    return w.rebuild(lambda _, t: t.unsqueeze(dim))


@dispatch(aten.squeeze)
def _squeeze(func: Any, w: QuantizedTensor, dims: Any = None) -> QuantizedTensor:
    asked = range(w.dim()) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = [d for d in (_wrap(d, w.dim()) for d in asked) if w.shape[d] == 1]
    if any(d >= w.dim() - 2 for d in gone):
        return unsupported(func, w)
    return w.rebuild(lambda _, t: t.squeeze(tuple(gone)))


def _wrap(dim: int, count: int) -> int:
    if not -count <= dim < count:
        raise IndexError(f"dimension {dim} is out of range for {count} dimensions")
    return dim % count


@dispatch(aten.slice)
def _slice(
    func: Any, w: QuantizedTensor, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
) -> QuantizedTensor:
    axis = slicing.logical_axis(w, dim)
    first, last, _ = slice(start, stop).indices(slicing.logical_size(w, axis))
    if step > 1 and last > first:
        return slicing.take_steps(w, axis, first, last, step)
    return slicing.take_slice(w, axis, first, max(first, last))


@dispatch(aten.split, aten.split_with_sizes)
def _split(func: Any, w: QuantizedTensor, sizes: Any, dim: int = 0) -> list[QuantizedTensor]:
    total = slicing.logical_size(w, slicing.logical_axis(w, dim))
    if isinstance(sizes, int):
        sizes = [min(sizes, total - i) for i in range(0, total, sizes)]
    if sum(sizes) != total:
        raise RuntimeError(f"split sizes {list(sizes)} do not add up to {total}, the size of dimension {dim}")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_slice(func, w, dim, start, start + size) for start, size in zip(starts, sizes, strict=True)]


@dispatch(aten.select)
def _select(func: Any, w: QuantizedTensor, dim: int, index: int) -> QuantizedTensor:
    return slicing.select(w, slicing.logical_axis(w, dim), index)


@dispatch(aten.unbind)
def _unbind(func: Any, w: QuantizedTensor, dim: int = 0) -> list[QuantizedTensor]:
    return [_select(func, w, dim, i) for i in range(w.shape[dim])]


@dispatch(aten.index)
def _index(func: Any, w: QuantizedTensor, indices: list[Tensor | None]) -> QuantizedTensor:
    picked = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(picked) != 1:
        return unsupported(func, w)
    dim, index = picked[0]
    if index.dtype in (torch.bool, torch.uint8):
        if index.dim() != 1:
            return unsupported(func, w)
        if len(index) != w.shape[dim]:
            raise IndexError(f"a mask of {len(index)} does not fit dimension {dim} of {tuple(w.shape)}")
        index = index.nonzero().squeeze(-1)
    rows = _index_select(func, w, dim, torch.where(index < 0, index + w.shape[dim], index).flatten())
    return rows if index.dim() == 1 else _view(func, rows, [*w.shape[:dim], *index.shape, *w.shape[dim + 1 :]])


@dispatch(aten.index_select)
def _index_select(func: Any, w: QuantizedTensor, dim: int, index: Tensor) -> QuantizedTensor:
    return slicing.take_rows(w, slicing.logical_axis(w, dim), index)


@dispatch(aten.cat)
def _cat(func: Any, tensors: list[Any], dim: int = 0) -> QuantizedTensor:
    if not all(isinstance(t, QuantizedTensor) for t in tensors):
        return unsupported(func, tensors)
    return slicing.join(tensors, slicing.logical_axis(tensors[0], dim))


@dispatch(aten.stack)
def _stack(func: Any, tensors: list[Any], dim: int = 0) -> QuantizedTensor:
    if not all(isinstance(t, QuantizedTensor) for t in tensors):
        return unsupported(func, tensors)
    return _cat(func, [_unsqueeze(func, t, dim) for t in tensors], dim)
