"""Products in other words: `torch.einsum`, and `torch.nn.functional.grouped_mm` of tokens sorted by their expert."""

from __future__ import annotations

import string
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmquant.tensor.base import QuantizedTensor, unsupported
from llmquant.tensor.products import linear, product
from llmquant.tensor.table import aten, dispatch, function


class _Terms(NamedTuple):
    """A plain tensor, a quantized one, and the letters of their dimensions and of those of the result."""

    x: Tensor
    of_x: str
    w: QuantizedTensor
    of_w: str
    out: str


@function(torch.einsum)
def einsum(equation: Any, *operands: Any) -> Tensor:
    """Sums over one dimension of a quantized matrix, or of each expert of a stack; anything else is refused."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    terms = _terms(equation, operands) if isinstance(equation, str) else None
    if terms is None:
        return unsupported(f"einsum of {equation!r}", *operands)
    return _of_experts(terms) if terms.w.dim() == 3 else _of_matrix(terms)


def _terms(equation: str, operands: tuple[Any, ...]) -> _Terms | None:
    """What an equation means, where it is a product that can be done."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if not arrow or len(inputs) != 2 or len(operands) != 2:
        return None
    if isinstance(operands[0], QuantizedTensor):
        inputs, operands = inputs[::-1], operands[::-1]
    (of_x, of_w), (x, w) = inputs, operands
    if isinstance(x, QuantizedTensor) or not isinstance(w, QuantizedTensor):
        return None
    if "..." in of_x and out.count("...") == 1:
        dots = _unused_letters(equation, x.dim() + 3 - len(of_x))
        of_x, out = of_x.replace("...", dots), out.replace("...", dots)
    terms = _Terms(x, of_x, w, of_w, out)
    return terms if _is_product(terms) else None


def _unused_letters(equation: str, count: int) -> str:
    return "".join(letter for letter in string.ascii_letters if letter not in equation)[:count]


def _is_product(terms: _Terms) -> bool:
    """Whether one of the matrix's letters is summed over, the other is new in the result, and all others stay."""
    x, of_x, w, of_w, out = terms
    if w.dim() not in (2, 3) or (len(of_x), len(of_w)) != (x.dim(), w.dim()) or "." in of_x + of_w + out:
        return False
    experts, matrix = set(of_w[:-2]), set(of_w[-2:])
    summed, new = matrix & set(of_x), matrix - set(of_x)
    return (
        all(len(set(letters)) == len(letters) for letters in (of_x, of_w, out))
        and (len(summed), len(new)) == (1, 1)
        and experts <= set(of_x)
        and set(out) == set(of_x) - summed | new
    )


def _of_experts(terms: _Terms) -> Tensor:
    x, of_x, w, of_w, out = terms
    expert = of_w[0]
    along = of_x.index(expert)
    if x.shape[along] != len(w):
        raise RuntimeError(f"einsum: {expert} is {x.shape[along]} in one tensor and {len(w)} in the other")
    if len(w) == 0:
        sizes = dict(zip(of_x + of_w, (*x.shape, *w.shape), strict=True))
        return x.new_empty([sizes[letter] for letter in out])
    in_x, in_w, in_out = (letters.replace(expert, "") for letters in (of_x, of_w, out))
    pairs = zip(x.unbind(along), w.unbind(), strict=True)
    return torch.stack([_of_matrix(_Terms(a, in_x, b, in_w, in_out)) for a, b in pairs], out.index(expert))  # type: ignore[arg-type]


def _of_matrix(terms: _Terms) -> Tensor:
    x, of_x, w, of_w, out = terms
    summed = next(letter for letter in of_w if letter in of_x)
    columns_last = w if of_w[1] == summed else w.t()
    found = linear(x.movedim(of_x.index(summed), -1), columns_last)
    order = of_x.replace(summed, "") + of_w.replace(summed, "")
    return found.permute([order.index(letter) for letter in out])


@dispatch(aten._grouped_mm)
def _grouped_mm(
    func: Any,
    x: Tensor,
    w: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [T, K] @ w [E, K, N]: tokens from `offs[e - 1]` to `offs[e]` by expert e, and 0 for those behind the last."""
    if not isinstance(w, QuantizedTensor) or isinstance(x, QuantizedTensor) or (x.dim(), w.dim()) != (2, 3):
        return unsupported(func, x, w)
    if offs is None or bias is not None or out_dtype not in (None, x.dtype):
        return unsupported(f"{func} without offsets, with a bias or to another dtype", w)
    ends = [0, *offs.tolist()]
    if len(ends) != len(w) + 1 or sorted(ends) != ends or ends[-1] > len(x):
        raise RuntimeError(f"_grouped_mm: offsets {ends[1:]} do not cut {len(x)} tokens for {len(w)} experts")
    out = x.new_zeros(len(x), w.shape[-1])
    for index, (start, stop) in enumerate(pairwise(ends)):
        if stop > start:
            out[start:stop] = product(x[start:stop], w[index])
    return out
