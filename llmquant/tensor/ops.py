"""What quantized tensors do for each function and aten operator. Anything not in these tables is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmquant.errors import UnsupportedOpError
from llmquant.kernels import ops
from llmquant.tensor import slicing
from llmquant.tensor.base import DISPATCH, FUNCTIONS, KEEPS_GRADIENTS, Field, QuantizedTensor, unsupported

aten = torch.ops.aten


def function(*targets: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a handler for torch functions; it gets their arguments."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        FUNCTIONS.update(dict.fromkeys(targets, handler))
        return handler

    return register


def dispatch(*packets: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a handler for aten operators (all overloads); it gets the overload and its arguments."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        DISPATCH.update(dict.fromkeys(packets, handler))
        return handler

    return register


# --- products -------------------------------------------------------------------------------------------


@function(F.linear)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input @ weight.T + bias for a quantized weight, with the input quantized as the weight says."""
    if not isinstance(weight, QuantizedTensor) or isinstance(input, QuantizedTensor) or weight.qdata.dim() != 2:
        return unsupported("linear", input, weight)
    if weight.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        out = torch.matmul(input, weight.mT)  # arrives here again below autograd, which has taken note of the weight
        return out if bias is None else out + bias
    if torch.compiler.is_exporting() and not isinstance(weight, torch.nn.Parameter):
        # torch.export follows a part of a parameter (an expert) as a whole only: its graph gets torch's own operator.
        with torch._C.DisableTorchFunctionSubclass():
            return F.linear(input, weight, bias)
    return linear_below(input, weight, bias)


def linear_below(input: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """`linear` below autograd and export, which have taken note of it."""
    if weight.meta.transposed:
        # Sums here run over the logical rows; `activation` is said of inputs along the columns, so this one stays.
        out = ops.matmul(input, weight.packed())
        return out if bias is None else out + bias
    return ops.linear_as(input, weight.packed(), weight.meta.activation, bias, weight.static_scale)


@function(F.embedding)
def embedding(
    indices: Tensor,
    weight: QuantizedTensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of a quantized table, decoded to its dtype.

    Options about gradients matter only where the scale is trained: the codes are frozen. Nor does `activation` matter:
    indices are no activations.
    """
    del norm_type, sparse
    if max_norm is not None:
        raise UnsupportedOpError("max_norm would rewrite the quantized table in place", where=repr(weight))
    if weight.meta.transposed or weight.dim() != 2:
        return unsupported("embedding", weight)
    if weight.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
        return torch.embedding(weight, indices, padding, scale_grad_by_freq)
    rows = ops.embedding(indices, weight.packed(), weight.dtype)
    if not rows.requires_grad:
        return rows
    if scale_grad_by_freq:
        raise UnsupportedOpError("scales of a quantized table have no gradient by frequency", where=repr(weight))
    if padding_idx is None:
        return rows
    return torch.where((indices == padding_idx % weight.shape[0]).unsqueeze(-1), rows.detach(), rows)


def product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y of two matrices, one of them quantized."""
    if isinstance(x, QuantizedTensor):
        if isinstance(y, QuantizedTensor):
            return unsupported(aten.mm, x, y)
        return product(y.t(), x.t()).t()
    return linear_below(x, _turned(y))


def _turned(w: Tensor) -> QuantizedTensor:
    turned = w.t()
    assert isinstance(turned, QuantizedTensor)
    return turned


@dispatch(aten.embedding)
def _embedding(func: Any, weight: QuantizedTensor, indices: Tensor, *_: Any) -> Tensor:
    return embedding(indices, _alike(func, weight))  # without its own flag, which autograd has taken note of


@dispatch(aten.mm)
def _mm(func: Any, x: Tensor, y: Tensor) -> Tensor:
    return product(x, y)


@dispatch(aten.mv)
def _mv(func: Any, x: Tensor, y: Tensor) -> Tensor:
    if isinstance(y, QuantizedTensor):
        return unsupported(func, y)
    return product(x, y.unsqueeze(-1)).squeeze(-1)


@dispatch(aten.addmm)
def _addmm(func: Any, bias: Tensor, x: Tensor, y: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if isinstance(bias, QuantizedTensor):
        return unsupported(func, bias, x, y)
    if not isinstance(x, QuantizedTensor) and beta == alpha == 1 and bias.dim() == 1:
        return linear_below(x, _turned(y), bias)
    return beta * bias + alpha * product(x, y)


@dispatch(aten.bmm)
def _bmm(func: Any, x: Tensor, y: Tensor) -> Tensor:
    if isinstance(x, QuantizedTensor) and isinstance(y, QuantizedTensor):
        return unsupported(func, x, y)
    if x.shape[0] != y.shape[0]:
        raise RuntimeError(f"bmm of {tuple(x.shape)} and {tuple(y.shape)}: the batches differ")
    if x.shape[0] == 0:
        return (y if isinstance(x, QuantizedTensor) else x).new_empty(0, x.shape[1], y.shape[2])
    return torch.stack([product(x[i], y[i]) for i in range(x.shape[0])])


@dispatch(aten.baddbmm)
def _baddbmm(func: Any, bias: Tensor, x: Tensor, y: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if isinstance(bias, QuantizedTensor):
        return unsupported(func, bias, x, y)
    return beta * bias + alpha * _bmm(func, x, y)


@dispatch(aten.addmv)
def _addmv(func: Any, bias: Tensor, x: Tensor, y: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if isinstance(bias, QuantizedTensor):
        return unsupported(func, bias, x, y)
    return beta * bias + alpha * _mv(func, x, y)


# --- shape ----------------------------------------------------------------------------------------------


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
        return _alike(func, w)
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
        return _alike(func, w)
    if shape == [w.numel()] and w._whole is not None:
        return _alike(func, w)  # FSDP2 keeps a flat view of a shard, which it only reads where tensors are plain
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


# --- copies, dtype, device ------------------------------------------------------------------------------


@dispatch(aten.detach)
def _detach(func: Any, w: QuantizedTensor) -> QuantizedTensor:
    return w.rebuild(lambda _, t: t.detach())


@dispatch(aten.alias)
def _alike(func: Any, w: QuantizedTensor) -> QuantizedTensor:
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
