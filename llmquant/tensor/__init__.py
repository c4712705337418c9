"""Quantized weights as tensor subclasses: one class a kind of storage, thin named ones on top."""

from __future__ import annotations

import torch

from llmquant.formats import Format
from llmquant.primitives.dynamic import Activation
from llmquant.tensor import contractions as _contractions  # noqa: F401  (fills the dispatch tables, as do the next)
from llmquant.tensor import distributed as _distributed  # noqa: F401
from llmquant.tensor import shapes as _shapes  # noqa: F401
from llmquant.tensor.affine import AffineTensor, Int4Tensor, Int8Tensor, IntxTensor
from llmquant.tensor.base import Meta, QuantizedTensor, _rebuild
from llmquant.tensor.scaled import Float8Tensor, MXTensor, NF4Tensor, NVFP4Tensor, ScaledTensor
from llmquant.tensor.semisparse import Float8SemiSparseTensor, SemiSparseTensor

STORAGE: dict[str, type[QuantizedTensor]] = {
    "affine": AffineTensor,
    "scaled": ScaledTensor,
    "semisparse": SemiSparseTensor,
}
NAMED: tuple[type[QuantizedTensor], ...] = (
    Int4Tensor,
    Int8Tensor,
    IntxTensor,
    Float8SemiSparseTensor,
    Float8Tensor,
    MXTensor,
    NF4Tensor,
    NVFP4Tensor,
)


def tensor_class(fmt: Format) -> type[QuantizedTensor]:
    """The named class of a format, or the plain class of its kind of storage."""
    return next((named for named in NAMED if fmt.name in named.formats), STORAGE[fmt.storage])


torch.serialization.add_safe_globals([*STORAGE.values(), *NAMED, Activation, Meta, _rebuild])

__all__ = ["NAMED", "STORAGE", "AffineTensor", "Meta", "QuantizedTensor", "ScaledTensor", "tensor_class"]
