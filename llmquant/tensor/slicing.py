"""Slices, rows and joins of quantized tensors, all in the packed form.

`axis` counts from the end of the logical [..., out, in] shape: -1 columns, -2 rows, lower ones experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import UnsupportedOpError
from llmquant.formats import Format
from llmquant.primitives.blocks import block_counts
from llmquant.tensor.base import Field, QuantizedTensor


def logical_axis(w: QuantizedTensor, dim: int) -> int:
    """The dimension `dim` of the tensor as it stands, as an axis of the logical shape, counted from the end."""
    if not -w.dim() <= dim < w.dim():
        raise IndexError(f"dimension {dim} is out of range for {w!r}")
    axis = dim if dim < 0 else dim - w.dim()
    return -3 - axis if w.meta.transposed and axis >= -2 else axis


def logical_size(w: QuantizedTensor, axis: int) -> int:
    """Length of a logical axis."""
    return w.meta.columns if axis == -1 else w.qdata.shape[axis]


def take_slice(w: QuantizedTensor, axis: int, start: int, stop: int) -> QuantizedTensor:
    """Elements start..stop of an axis. Rows and experts are views; columns too where they fall on whole bytes."""
    if axis < -2:
        return w.rebuild(lambda _, t: t.narrow(axis, start, stop - start))
    side = axis + 2
    size, step = logical_size(w, axis), w.meta.block[side]
    if axis == -1 and stop > start:
        _check_step(w, start)
    blocks = _block_range(w, start, stop, size, step)
    meta: dict[str, Any] = {"columns": stop - start} if axis == -1 else {}
    if step >= size and stop > start:  # one block spans the axis: its parts keep the scale
        meta["block"] = (stop - start, w.meta.block[1]) if side == 0 else (w.meta.block[0], stop - start)
    copies = False

    def cut(field: Field, tensor: Tensor) -> Tensor:
        nonlocal copies
        if field.per == "matrix" or (field.per == "row" and axis == -1):
            return tensor
        first, last = (start, stop) if field.per == "element" else blocks
        if axis == -2 or not field.packed:
            return tensor.narrow(axis, first, last - first)
        length = size if field.per == "element" else -(-size // step)
        copies |= not _on_bytes(w.format, length, first, last)
        return _cut_packed(tensor, w.format, length, first, last)

    part = w.rebuild(cut, **meta)
    shares = axis == -1 and w.row_scale is not None and stop - start != size
    part._read_only |= copies or shares or (stop != size and stop % step != 0) or start % step != 0
    return part


def take_steps(w: QuantizedTensor, axis: int, start: int, stop: int, step: int) -> QuantizedTensor:
    """Every `step`-th row or expert from start to stop, as a view."""
    if axis == -1 or (axis == -2 and 1 < w.meta.block[0] < logical_size(w, axis)):
        raise UnsupportedOpError(
            f"a slice in steps of {step} takes blocks apart that share a scale",
            where=repr(w),
            hint="take steps along axes whose elements have scales of their own, or dequantize()",
        )

    def pick(field: Field, tensor: Tensor) -> Tensor:
        if field.per == "matrix" and axis == -2:
            return tensor
        return torch.ops.aten.slice(tensor, axis, start, stop, step)

    if axis < -2 or w.meta.block[0] == 1:
        return w.rebuild(pick)
    part = take_slice(w, axis, start, stop)  # rows of one scale
    part = part.rebuild(lambda f, t: t[..., ::step, :] if f.per == "element" else t)
    part._read_only = True
    part.meta = replace(part.meta, block=(max(part.qdata.shape[-2], 1), w.meta.block[1]))
    return part


def take_rows(w: QuantizedTensor, axis: int, indices: Tensor) -> QuantizedTensor:
    """Rows or experts picked by a 1-D index tensor, in its order; a copy."""
    if axis == -1:
        raise UnsupportedOpError("index: columns of a quantized weight cannot be picked by index", where=repr(w))
    step = w.meta.block[0] if axis == -2 else 1

    def pick(field: Field, tensor: Tensor) -> Tensor:
        if field.per == "matrix" and axis == -2:
            return tensor
        return tensor.index_select(axis, indices if field.per == "element" else indices // step)

    return w.rebuild(pick, copied=True, block=(1, w.meta.block[1]) if axis == -2 else w.meta.block)


def select(w: QuantizedTensor, axis: int, index: int) -> QuantizedTensor:
    """One expert of a stack, as a view."""
    if axis >= -2:
        raise UnsupportedOpError(
            "select: a single row or column of a quantized weight has no packed form",
            where=repr(w),
            hint="slice it instead",
        )
    return w.rebuild(lambda _, t: t.select(axis, index))


def join(parts: list[QuantizedTensor], axis: int) -> QuantizedTensor:
    """Concatenation of weights of one format and block shape along an axis."""
    first = parts[0]
    _check_joinable(parts, axis)
    tensors = {field.name: _join_field(parts, field, axis) for field, _ in first.parts()}
    columns = sum(p.meta.columns for p in parts) if axis == -1 else first.meta.columns
    return type(first)(tensors, replace(first.meta, columns=columns), first.dtype)


def check_writable(target: QuantizedTensor, source: QuantizedTensor) -> None:
    """Refuses to write to a part of a matrix what would change a scale that its other parts share."""
    for field, tensor in target.parts():
        if field.per != "matrix" or tensor.is_meta or torch.equal(tensor, getattr(source, field.name)):
            continue
        matrices = tensor.untyped_storage().nbytes() // tensor.element_size()
        if target.qdata.untyped_storage().nbytes() != matrices * target.qdata.shape[-2] * target.qdata.shape[-1]:
            raise UnsupportedOpError(
                f"a part of a matrix has no {field.name} of its own", where=repr(target), hint="copy the whole matrix"
            )


def _block_range(w: QuantizedTensor, start: int, stop: int, size: int, step: int) -> tuple[int, int]:
    if stop == start:
        return 0, 0
    if step >= size:
        return 0, 1
    if start % step:
        raise UnsupportedOpError(
            f"a slice from {start} cuts a block of {step} that shares a scale",
            where=repr(w),
            hint=f"start at a multiple of {step}, or dequantize()",
        )
    return start // step, -(-stop // step)


def _check_step(w: QuantizedTensor, start: int) -> None:
    step = w.format.packing.STEP
    if start % step:
        raise UnsupportedOpError(
            f"a slice from {start} cuts {step} neighbours of {w.meta.format} that are packed together",
            where=repr(w),
            hint=f"start at a multiple of {step}, or dequantize()",
        )


def _cut_packed(packed: Tensor, fmt: Format, length: int, start: int, stop: int) -> Tensor:
    packing = fmt.packing
    if _on_bytes(fmt, length, start, stop):
        codes, width = packing.unit(fmt.bits)
        first = start // codes * width
        return packed[..., first : first + packing.row_bytes(stop - start, fmt.bits)]
    return packing.pack(packing.unpack(packed, fmt.bits, length)[..., start:stop], fmt.bits)


def _on_bytes(fmt: Format, length: int, start: int, stop: int) -> bool:
    codes, _ = fmt.packing.unit(fmt.bits)
    return start % codes == 0 and (stop == length or stop % codes == 0)


def _check_joinable(parts: list[QuantizedTensor], axis: int) -> None:
    first = parts[0]
    for part in parts:
        alike = (
            isinstance(part, QuantizedTensor)
            and type(part) is type(first)
            and (
                part.meta == first.meta or (axis == -1 and replace(part.meta, columns=first.meta.columns) == first.meta)
            )
            and part.dtype == first.dtype
            and [field.name for field, _ in part.parts()] == [field.name for field, _ in first.parts()]
        )
        if not alike:
            raise UnsupportedOpError(
                "cat: only weights of one format, block shape and dtype can be joined", where=f"{first!r} and {part!r}"
            )
    side = axis + 2
    whole = side < 0 or all(logical_size(p, axis) % p.meta.block[side] == 0 for p in parts[:-1])
    if not whole:
        raise UnsupportedOpError("cat: blocks that share a scale would not line up", where=repr(first))
    step = first.format.packing.STEP
    if axis == -1 and any(p.meta.columns % step for p in parts[:-1]):
        raise UnsupportedOpError(
            f"cat: {step} neighbours that are packed together would not line up", where=repr(first)
        )


def _join_field(parts: list[QuantizedTensor], field: Field, axis: int) -> Tensor:
    tensors = [getattr(p, field.name) for p in parts]
    if (field.per == "matrix" and axis >= -2) or (field.per == "row" and axis == -1):
        return _the_same(parts, field)
    if axis != -1 or not field.packed:
        return torch.cat(tensors, axis)
    packing, bits = parts[0].format.packing, parts[0].format.bits
    lengths = [_entries(p, field) for p in parts]
    codes = [packing.unpack(t, bits, n) for t, n in zip(tensors, lengths, strict=True)]
    return packing.pack(torch.cat(codes, -1), bits)


def _the_same(parts: list[QuantizedTensor], field: Field) -> Tensor:
    """What all parts of one matrix, or of its rows, must share."""
    first, *others = (getattr(part, field.name) for part in parts)
    if not all(torch.equal(first, other) for other in others):
        raise UnsupportedOpError(
            f"cat: {parts[0].meta.format} weights with a {field.name} each cannot become one matrix",
            where=repr(parts[0]),
            hint="dequantize() first, or keep them apart",
        )
    return first.clone()  # type: ignore[no-any-return]


def _entries(w: QuantizedTensor, field: Field) -> int:
    """Entries of a field along a row."""
    return w.meta.columns if field.per == "element" else block_counts(1, w.meta.columns, w.meta.block)[1]
