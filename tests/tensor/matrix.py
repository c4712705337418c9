"""The operations matrix: what quantized weights do for each operation, against the same on the dequantized weight.

A cell is one operation on one format, in one of its granularities and mappings, layout and dtype. It passes or refuses:

- passed: results that are weights are quantized tensors that dequantize to the plain result, bit for bit; results that
  are plain tensors come only from operations that are marked as products, within the product's tolerance, or as
  answers, exactly. Nothing grows in silence: every other result must be packed. Afterwards the weight itself holds
  what the plain one holds, so that an operation in place which does nothing fails, as does one that changes more.
- refused: `UnsupportedOpError` that names operation and format, with the weight as it was. Each row says where it may.

Anything else is an `AssertionError`. `python tests/tensor/matrix.py` prints the counts of each format.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from cases import CASES, DTYPES, STATIC, Case
from layouts import COLUMNS, EXPERTS, LAYOUTS, ROWS, Layout

from llmquant.errors import UnsupportedOpError
from llmquant.formats import FORMATS
from llmquant.tensor import QuantizedTensor

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
MODES = (torch.enable_grad, torch.inference_mode, torch.no_grad)


@dataclass(frozen=True)
class At:
    """Where a cell stands: the weight's layout, how it shares its scales, its dtype, whether gradients are recorded."""

    layout: Layout
    case: Case
    dtype: torch.dtype
    mode: Callable[[], Any]

    @property
    def r(self) -> int:
        return self.layout.r

    @property
    def c(self) -> int:
        return self.layout.c

    @property
    def block(self) -> tuple[int, int]:
        return _weight(self).meta.block

    @property
    def one_matrix_scale(self) -> bool:
        """Whether a whole matrix shares a second scale, or one of its inputs."""
        return self.case.format.tensor_scale or self.case in STATIC

    @property
    def packed_together(self) -> int:
        """Columns that are packed together."""
        return self.case.format.packing.STEP

    def weight(self) -> QuantizedTensor:
        return self.layout.quantize(self.case, self.dtype)

    def other(self) -> QuantizedTensor:
        """Another weight of the same kind."""
        return self.layout.quantize(self.case, self.dtype, seed=1)

    def like(self, t: Tensor, part: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
        """(A part of) `other`, plain where t is plain."""
        found = part(self.other())
        return found if isinstance(t, QuantizedTensor) else found.dequantize()

    def __str__(self) -> str:
        return f"{self.case}, {self.layout}, {str(self.dtype).removeprefix('torch.')}, {self.mode.__name__}"


@cache
def _weight(at: At) -> QuantizedTensor:
    """Only for looking at."""
    return at.weight()


When = Callable[[At], bool]


def never(at: At) -> bool:
    return False


def always(at: At) -> bool:
    return True


def straight(at: At) -> bool:
    return not at.layout.transposed


def transposed(at: At) -> bool:
    return at.layout.transposed


def matrices(at: At) -> bool:
    return not at.layout.experts


def experts(at: At) -> bool:
    return at.layout.experts


def straight_matrices(at: At) -> bool:
    return straight(at) and matrices(at)


def cuts_columns(start: int) -> When:
    """Where a block of several, or codes that are packed together, begin before that column and end behind it."""
    return lambda at: (at.block[1] < COLUMNS and start % at.block[1] != 0) or start % at.packed_together != 0


def shares_rows(at: At) -> bool:
    return at.block[0] > 1


def cuts_rows(start: int) -> When:
    return lambda at: at.block[0] < ROWS and start % at.block[0] != 0


@dataclass(frozen=True)
class Operation:
    """One row of the table.

    Attributes:
        run: (weight or plain tensor, where) -> result.
        refused: where the quantized tensor must raise `UnsupportedOpError`; everywhere else it must not.
        on: where the operation means something at all.
        named: what the refusal calls it, as a regular expression; the row's own first word by default.
        gives: "weights", "products" or "answers", see the module.
        oracle: what the result must be worth, where it is not `run` of the plain tensor.
    """

    run: Callable[[Any, At], Any]
    refused: When = never
    on: When = always
    named: str | None = None
    gives: str = "weights"
    oracle: Callable[[QuantizedTensor, At], Any] | None = None


def unknown(weight: QuantizedTensor, at: At) -> None:
    """For what is refused and means nothing, or is random, on the plain tensor."""


# --- products -------------------------------------------------------------------------------------------------


@cache
def _random(*shape: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def given(t: Tensor, *shape: int) -> Tensor:
    """Activations in the weight's dtype."""
    return _random(*shape).to(t.dtype)


def _product(run: Callable[[Any, At], Any], **rest: Any) -> Operation:
    return Operation(run, gives="products", **rest)


def _both(t: Tensor) -> tuple[int, int]:
    return t.shape[-2], t.shape[-1]


def folds_experts(at: At) -> bool:
    """Torch takes a stack for one long matrix, which a transposed one, or one with scales of matrices, is not."""
    return experts(at) and (transposed(at) or at.one_matrix_scale)


ENDS = torch.tensor([1, 1, 6], dtype=torch.int32)  # of seven tokens: one, none, five, and one that no expert takes


def _token_by_token(w: QuantizedTensor, at: At) -> Tensor:
    """What `_grouped_mm` of torch gives, which wants other sizes, and leaves the last row as it was."""
    x, plain = given(w, 7, w.shape[-2]).float(), w.dequantize(torch.float32)
    rows = [x[i] @ plain[e] for i, e in enumerate((0, 2, 2, 2, 2, 2))]
    return torch.stack([*rows, torch.zeros_like(rows[0])]).to(w.dtype)


PRODUCTS: dict[str, Operation] = {
    "linear": _product(lambda t, at: F.linear(given(t, 3, t.shape[-1]), t), on=matrices),
    "linear with bias": _product(lambda t, at: F.linear(given(t, 2, 3, t.shape[-1]), t, given(t, len(t))), on=matrices),
    "linear of a token": _product(lambda t, at: F.linear(given(t, t.shape[-1]), t), on=matrices),
    "linear of t": _product(lambda t, at: F.linear(given(t, 3, len(t)), t.t()), on=matrices),
    "linear of rows": _product(
        lambda t, at: F.linear(given(t, 3, COLUMNS), t[1:4]), on=straight_matrices, refused=cuts_rows(1), named="slice"
    ),
    "linear of every second row": _product(
        lambda t, at: F.linear(given(t, 3, COLUMNS), t[1::2]),
        on=straight_matrices,
        refused=lambda at: 1 < at.block[0] < ROWS,
        named="slice",
    ),
    "linear of an expert": _product(lambda t, at: F.linear(given(t, 3, t.shape[-1]), t[1]), on=experts),
    "linear of experts": _product(
        lambda t, at: F.linear(given(t, 3, t.shape[-1]), t), on=experts, refused=always, oracle=unknown
    ),
    "linear by a weight": _product(lambda t, at: F.linear(t, given(t, 4, t.shape[-1])), refused=always),
    "matmul @ t": _product(lambda t, at: given(t, 3, t.shape[-2]) @ t),
    "matmul t @": _product(lambda t, at: t @ given(t, t.shape[-1], 3), refused=folds_experts, named="matmul|view"),
    "matmul @ mT": _product(lambda t, at: given(t, 2, 3, t.shape[-1]) @ t.mT, on=matrices),
    "matmul by a vector": _product(lambda t, at: t @ given(t, t.shape[-1]), refused=folds_experts, named="matmul|view"),
    "matmul of a vector": _product(lambda t, at: given(t, t.shape[-2]) @ t, on=matrices),
    "matmul of two": _product(lambda t, at: t @ t.mT, refused=always, named="mm"),
    "matmul of batches of experts": _product(lambda t, at: given(t, 2, EXPERTS, 3, t.shape[-1]) @ t.mT, on=experts),
    "matmul of experts": _product(lambda t, at: given(t, EXPERTS, 3, t.shape[-2]) @ t, on=experts),
    "mm": _product(lambda t, at: torch.mm(given(t, 3, len(t)), t), on=matrices),
    "mm from the left": _product(lambda t, at: torch.mm(t, given(t, t.shape[-1], 3)), on=matrices),
    "mv": _product(lambda t, at: torch.mv(t, given(t, t.shape[-1])), on=matrices),
    "addmv": _product(lambda t, at: torch.addmv(given(t, len(t)), t, given(t, t.shape[-1]), alpha=0.5), on=matrices),
    "addmm": _product(lambda t, at: torch.addmm(given(t, t.shape[-1]), given(t, 3, len(t)), t), on=matrices),
    "addmm from the left": _product(
        lambda t, at: torch.addmm(given(t, len(t), 3), t, given(t, t.shape[-1], 3), beta=0.5, alpha=2.0), on=matrices
    ),
    "addmm to a weight": _product(
        lambda t, at: torch.addmm(t, given(t, len(t), 4), given(t, 4, t.shape[-1])), on=matrices, refused=always
    ),
    "bmm": _product(lambda t, at: torch.bmm(given(t, EXPERTS, 3, t.shape[-2]), t), on=experts),
    "bmm from the left": _product(lambda t, at: torch.bmm(t, given(t, EXPERTS, t.shape[-1], 3)), on=experts),
    "bmm of picked experts": _product(
        lambda t, at: torch.bmm(given(t, 4, 3, t.shape[-1]), t[torch.tensor([2, 2, 0, 1])].mT), on=experts
    ),
    "bmm of two": _product(lambda t, at: torch.bmm(t, t.mT), on=experts, refused=always),
    "bmm of stacked matrices": _product(
        lambda t, at: torch.bmm(given(t, 2, 3, t.shape[-1]), torch.stack([t, at.like(t)]).mT), on=matrices
    ),
    "baddbmm": _product(
        lambda t, at: torch.baddbmm(given(t, EXPERTS, 1, t.shape[-1]), given(t, EXPERTS, 3, t.shape[-2]), t, alpha=0.5),
        on=experts,
    ),
    "einsum": _product(lambda t, at: torch.einsum("bk,nk->bn", given(t, 3, t.shape[-1]), t), on=matrices),
    "einsum in another order": _product(
        lambda t, at: torch.einsum("nk, akb -> bna", [t, given(t, 2, t.shape[-1], 3)]), on=matrices
    ),
    "einsum along the rows": _product(
        lambda t, at: torch.einsum("...n,nk->...k", given(t, 2, 3, len(t)), t), on=matrices
    ),
    "einsum of experts": _product(
        lambda t, at: torch.einsum("bek,enk->nbe", given(t, 2, EXPERTS, t.shape[-1]), t), on=experts
    ),
    "einsum of no experts": _product(
        lambda t, at: torch.einsum("bek,enk->nbe", given(t, 2, 0, t.shape[-1]), t[:0]), on=experts
    ),
    "einsum of all experts": _product(
        lambda t, at: torch.einsum("bk,enk->ben", given(t, 2, t.shape[-1]), t), on=experts, refused=always
    ),
    "einsum of two": _product(lambda t, at: torch.einsum("...nk,...mk->...nm", t, t), refused=always),
    "_grouped_mm": _product(
        lambda t, at: torch._grouped_mm(given(t, 7, t.shape[-2]), t, ENDS), on=experts, oracle=_token_by_token
    ),
    "grouped_mm of mT": _product(
        lambda t, at: F.grouped_mm(given(t, 7, t.shape[-1]), t.mT, offs=ENDS),
        on=experts,
        oracle=lambda w, at: _token_by_token(w.mT, at),
    ),
    "_grouped_mm of a weight's rows": _product(
        lambda t, at: torch._grouped_mm(t[0], t, ENDS), on=experts, refused=always, oracle=unknown
    ),
    "embedding": _product(
        lambda t, at: F.embedding(torch.tensor([[5, 0], [0, 3]]), t), on=matrices, refused=transposed
    ),
    "embedding of torch": _product(
        lambda t, at: torch.embedding(t, torch.tensor([5, 0])), on=matrices, refused=transposed
    ),
    "dequantize": _product(lambda t, at: t.dequantize() if isinstance(t, QuantizedTensor) else t.clone()),
}


# --- shapes ---------------------------------------------------------------------------------------------------

IN_STEPS = "slice in steps"
SHAPES: dict[str, Operation] = {
    "t": Operation(lambda t, at: t.t(), on=matrices),
    "T": Operation(lambda t, at: t.T, on=matrices),
    "mT": Operation(lambda t, at: t.mT),
    "mT twice": Operation(lambda t, at: t.mT.mT),
    "transpose": Operation(lambda t, at: t.transpose(-1, -2)),
    "transpose experts": Operation(lambda t, at: t.transpose(0, 1), on=experts, refused=always),
    "t_": Operation(lambda t, at: t.t_(), on=matrices, refused=always),
    "permute": Operation(lambda t, at: t.permute(*range(t.dim() - 2), -1, -2)),
    "permute experts": Operation(lambda t, at: t.permute(1, 2, 0), on=experts, refused=always),
    "movedim": Operation(lambda t, at: t.movedim(-1, -2)),
    "view": Operation(lambda t, at: t.view(t.shape)),
    "view with -1": Operation(lambda t, at: t.view(-1, *t.shape[1:])),
    "view behind a new axis": Operation(lambda t, at: t.view(1, *t.shape)),
    "view of rows as experts": Operation(
        lambda t, at: t.view(3, 2, COLUMNS), on=straight_matrices, refused=lambda at: 2 % at.block[0] != 0
    ),
    "view across rows": Operation(lambda t, at: t.view(12, 35), on=straight_matrices, refused=always),
    "view as bytes": Operation(lambda t, at: t.view(torch.uint8), refused=always, oracle=unknown),
    "reshape": Operation(lambda t, at: t.reshape(1, 1, *t.shape)),
    "reshape to a vector": Operation(lambda t, at: t.reshape(-1), refused=always, named="view|reshape"),
    "flatten": Operation(lambda t, at: t.flatten(), refused=always, named="view|flatten|reshape"),
    "flatten experts": Operation(
        lambda t, at: t.flatten(0, 1),
        on=lambda at: experts(at) and straight(at),
        refused=lambda at: ROWS % at.block[0] != 0 or at.one_matrix_scale,
        named="flatten|view",
    ),
    "unsqueeze": Operation(lambda t, at: t.unsqueeze(0)),
    "unsqueeze in the middle": Operation(lambda t, at: t.unsqueeze(1), refused=matrices),
    "unsqueeze at the end": Operation(lambda t, at: t.unsqueeze(-1), refused=always),
    "unsqueeze by None": Operation(lambda t, at: t[None]),
    "squeeze": Operation(lambda t, at: t.unsqueeze(0).squeeze(0)),
    "squeeze nothing": Operation(lambda t, at: t.squeeze()),
    "squeeze all": Operation(lambda t, at: t.view(1, 1, *t.shape).squeeze()),
    "squeeze several": Operation(lambda t, at: t.view(1, 1, *t.shape).squeeze((0, 1, 2))),
    "squeeze one row": Operation(lambda t, at: t.narrow(at.r, 0, 1).squeeze(at.r), refused=always),
    "expand": Operation(lambda t, at: t.expand(2, *t.shape)),
    "expand nothing": Operation(lambda t, at: t.expand(*[-1] * t.dim())),
    "expand a row": Operation(lambda t, at: t.narrow(at.r, 0, 1).expand(t.shape), refused=always),
    "expand and clone": Operation(lambda t, at: t.unsqueeze(0).expand(2, *t.shape).clone()),
    "repeat": Operation(lambda t, at: t.repeat(2, *[1] * (t.dim() - 1)), refused=always),
    "slice rows": Operation(lambda t, at: t.narrow(at.r, 1, 3), refused=cuts_rows(1)),
    "slice rows from the end": Operation(lambda t, at: torch.ops.aten.slice(t, at.r, -2, -1), refused=cuts_rows(4)),
    "slice no rows": Operation(lambda t, at: torch.ops.aten.slice(t, at.r, 4, 2)),
    "slice beyond the rows": Operation(lambda t, at: torch.ops.aten.slice(t, at.r, 0, 10**9)),
    "slice every second row": Operation(
        lambda t, at: torch.ops.aten.slice(t, at.r, 1, 6, 2), refused=lambda at: 1 < at.block[0] < ROWS
    ),
    "slice every second column": Operation(lambda t, at: torch.ops.aten.slice(t, at.c, 0, 70, 2), refused=always),
    "slice columns at a block": Operation(lambda t, at: t.narrow(at.c, 32, 32), refused=cuts_columns(32)),
    "slice columns inside blocks": Operation(lambda t, at: t.narrow(at.c, 5, 9), refused=cuts_columns(5)),
    "slice columns from the start": Operation(lambda t, at: t.narrow(at.c, 0, 37)),
    "slice the last columns": Operation(lambda t, at: torch.ops.aten.slice(t, at.c, -6), refused=cuts_columns(64)),
    "slice no columns": Operation(lambda t, at: t.narrow(at.c, 7, 0)),
    "slice of an empty slice": Operation(lambda t, at: t.narrow(at.c, 7, 0).narrow(at.c, 0, 0).narrow(at.r, 0, 2)),
    "slice of no rows": Operation(lambda t, at: t.narrow(at.r, 6, 0).narrow(at.r, 0, 0).narrow(at.c, 0, 8)),
    "slice of a slice": Operation(
        lambda t, at: t.narrow(at.r, 1, 4).narrow(at.r, 2, 2).narrow(at.c, 0, 64).narrow(at.c, 32, 7),
        refused=lambda at: cuts_rows(1)(at) or cuts_columns(32)(at),
    ),
    "slice experts": Operation(lambda t, at: t[-2:], on=experts),
    "slice every second expert": Operation(lambda t, at: t[::2], on=experts),
    "slice no experts": Operation(lambda t, at: t[3:], on=experts),
    "slice everything": Operation(lambda t, at: t[..., :]),
    "narrow": Operation(lambda t, at: t.narrow(at.r, -2, 2), refused=cuts_rows(4), named="slice|narrow"),
    "split": Operation(lambda t, at: t.split(2, at.r), refused=cuts_rows(2), named="slice|split"),
    "split columns": Operation(lambda t, at: t.split(32, at.c), refused=cuts_columns(32), named="slice|split"),
    "split by sizes": Operation(lambda t, at: t.split([1, 3, 2], at.r), refused=cuts_rows(1), named="slice|split"),
    "chunk": Operation(lambda t, at: t.chunk(3, at.r), refused=cuts_rows(2), named="slice|split|chunk"),
    "chunk columns": Operation(lambda t, at: t.chunk(2, at.c), refused=cuts_columns(35), named="slice|split|chunk"),
    "tensor_split": Operation(lambda t, at: t.tensor_split(3, at.r), refused=cuts_rows(2), named="slice"),
    "unbind": Operation(lambda t, at: t.unbind(), refused=matrices, named="select|unbind"),
    "iteration": Operation(lambda t, at: list(t), refused=matrices, named="select|unbind"),
    "select": Operation(lambda t, at: t.select(0, 1), refused=matrices),
    "select a column": Operation(lambda t, at: t.select(at.c, 3), refused=always),
    "int index": Operation(lambda t, at: t[-1], refused=matrices, named="select"),
    "int index of an element": Operation(lambda t, at: t[(1,) * t.dim()], refused=always, named="select"),
    "index of an expert and its rows": Operation(
        lambda t, at: t[2].narrow(at.r - 1, 2, 3), on=experts, refused=cuts_rows(2), named="slice"
    ),
    "index by a 0-d tensor": Operation(lambda t, at: t[torch.tensor(1)], refused=matrices, named="select"),
}


# --- picking and joining --------------------------------------------------------------------------------------


def _by_rows(at: At) -> bool:
    return straight(at) and matrices(at)


def _ends_in_a_block(at: At) -> bool:
    return COLUMNS % at.block[1] != 0 or COLUMNS % at.packed_together != 0


PICKS: dict[str, Operation] = {
    "index by a tensor": Operation(
        lambda t, at: t[torch.tensor([1, 0, -1])], on=lambda at: experts(at) or straight(at)
    ),
    "index of rows by a tensor": Operation(lambda t, at: t[(slice(None),) * at.r + (torch.tensor([3, 3, -1]),)]),
    "index of columns by a tensor": Operation(
        lambda t, at: t[(slice(None),) * at.c + (torch.tensor([3, 3, -1]),)], refused=always
    ),
    "index by a list": Operation(lambda t, at: t[[2, 0]], on=lambda at: experts(at) or straight(at)),
    "index by nothing": Operation(
        lambda t, at: t[torch.tensor([], dtype=torch.int64)], on=lambda at: experts(at) or straight(at)
    ),
    "index by a mask": Operation(lambda t, at: t[torch.arange(len(t)) != 1], on=lambda at: experts(at) or straight(at)),
    "index by a mask of bytes": Operation(
        lambda t, at: t[(torch.arange(len(t)) == 1).byte()], on=lambda at: experts(at) or straight(at)
    ),
    "index by a mask of elements": Operation(lambda t, at: t[torch.ones(t.shape, dtype=torch.bool)], refused=always),
    "index by a matrix": Operation(
        lambda t, at: t[torch.tensor([[0, 1], [1, 2], [-1, 0]])], on=lambda at: experts(at) or straight(at)
    ),
    "index along two axes": Operation(lambda t, at: t[torch.tensor([0, 1]), torch.tensor([0, 1])], refused=always),
    "index_select": Operation(lambda t, at: t.index_select(at.r, torch.tensor([5, 0, 0, 3]))),
    "index_select of columns": Operation(
        lambda t, at: t.index_select(at.c, torch.tensor([5, 0])), refused=always, named="index"
    ),
    "gather": Operation(lambda t, at: t.gather(0, torch.zeros(t.shape, dtype=torch.int64)), refused=always),
    "cat": Operation(
        lambda t, at: torch.cat([t, at.like(t)], at.r),
        refused=lambda at: ROWS % at.block[0] != 0 or at.one_matrix_scale,
        named="cat|tensor_scale|act_scale",
    ),
    "cat to itself": Operation(lambda t, at: torch.cat([t, t], at.r), refused=lambda at: ROWS % at.block[0] != 0),
    "cat columns": Operation(
        lambda t, at: torch.cat([t, at.like(t)], at.c),
        refused=lambda at: _ends_in_a_block(at) or at.one_matrix_scale,
    ),
    "cat of split columns": Operation(
        lambda t, at: torch.cat(t.split(32, at.c), at.c),
        refused=lambda at: at.block[1] >= COLUMNS or 32 % at.block[1] != 0,  # parts do not know that they share a scale
        named="slice|cat",
    ),
    "cat experts": Operation(lambda t, at: torch.cat([t, at.like(t)]), on=experts),
    "cat with a plain tensor": Operation(
        lambda t, at: torch.cat([t, torch.ones(t.shape, dtype=t.dtype)]), refused=always
    ),
    "stack": Operation(lambda t, at: torch.stack([t, at.like(t)])),
    "stack behind experts": Operation(lambda t, at: torch.stack([t, t], 1), refused=matrices, named="stack|unsqueeze"),
    "stack of experts": Operation(lambda t, at: torch.stack(list(t)), on=experts),
    "hstack": Operation(
        lambda t, at: torch.hstack([t, t]),
        on=lambda at: straight(at) and matrices(at),
        refused=_ends_in_a_block,
        named="cat|hstack",
    ),
    "flip": Operation(lambda t, at: t.flip(0), refused=always),
    "diagonal": Operation(lambda t, at: t.diagonal(0, -2, -1), refused=always),
    "as_strided": Operation(lambda t, at: t.as_strided((2, 2), (1, 1)), refused=always),
    "as_strided as it is": Operation(lambda t, at: t.as_strided(t.shape, t.stride())),
    "as_strided of the first": Operation(lambda t, at: t.as_strided((t.shape[0] - 1, *t.shape[1:]), t.stride())),
    "tril": Operation(lambda t, at: t.tril(), refused=always),
    "sort": Operation(lambda t, at: t.sort(), refused=always),
}


# --- copies, dtypes, devices ----------------------------------------------------------------------------------


def _saved(value: object) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _cast(run: Callable[[Any], Any], dtype: torch.dtype) -> Operation:
    """Codes and scales stay, so that a cast to a wider dtype keeps what a plain weight has lost."""
    return Operation(lambda t, at: run(t), oracle=lambda w, at: w.dequantize(dtype))


def _apart(copied: Any, t: Any) -> Any:
    """A copy that shares no memory with its source."""
    assert copied is not t and copied.data_ptr() != t.data_ptr()
    return copied


COPIES: dict[str, Operation] = {
    "clone": Operation(lambda t, at: _apart(t.clone(), t)),
    "clone of a view": Operation(lambda t, at: t.narrow(at.c, 0, 37).clone()),
    "detach": Operation(lambda t, at: t.detach()),
    "data": Operation(lambda t, at: t.data),
    "alias": Operation(lambda t, at: torch.ops.aten.alias(t)),
    "contiguous": Operation(lambda t, at: t.mT.contiguous()),
    "deepcopy": Operation(lambda t, at: _apart(copy.deepcopy(t), t)),
    "deepcopy of a view": Operation(lambda t, at: copy.deepcopy(t.narrow(at.c, 0, 37))),
    "pickle": Operation(lambda t, at: _apart(pickle.loads(pickle.dumps(t)), t)),
    "pickle of a view": Operation(lambda t, at: pickle.loads(pickle.dumps(t.narrow(at.c, 0, 37).mT))),
    "torch.save": Operation(lambda t, at: _saved(t)),
    "torch.save of a parameter": Operation(lambda t, at: _saved({"w": nn.Parameter(t, requires_grad=False)})["w"]),
    "share_memory_": Operation(lambda t, at: t.share_memory_()),
    "to": Operation(lambda t, at: t.to("cpu")),
    "to a copy": Operation(lambda t, at: _apart(t.to(t.dtype, copy=True), t)),
    "to bfloat16": _cast(lambda t: t.to(torch.bfloat16), torch.bfloat16),
    "to float16 by keyword": _cast(lambda t: t.to(dtype=torch.float16, copy=True), torch.float16),
    "to device and dtype": _cast(lambda t: t.to("cpu", torch.float32), torch.float32),
    "to another's dtype": _cast(lambda t: t.to(torch.empty(0, dtype=torch.float64)), torch.float64),
    "to a narrower dtype of a view": _cast(lambda t: t.mT.half().mT, torch.float16),
    "float": _cast(lambda t: t.float(), torch.float32),
    "half": _cast(lambda t: t.half(), torch.float16),
    "bfloat16": _cast(lambda t: t.bfloat16(), torch.bfloat16),
    "double": _cast(lambda t: t.double(), torch.float64),
    "type": _cast(lambda t: t.type(torch.float16), torch.float16),
    "type_as": _cast(lambda t: t.type_as(torch.empty(0)), torch.float32),
    "to integers": Operation(lambda t, at: t.to(torch.int8), refused=always, named="_to_copy.* to torch.int8"),
    "to float8": Operation(lambda t, at: t.to(torch.float8_e5m2), refused=always, named="_to_copy.* to torch.float8"),
    "to meta": Operation(lambda t, at: _on_meta(t.to("meta")), gives="answers"),
    "empty_like": Operation(lambda t, at: _filled(torch.empty_like(t), at)),
    "empty_like on meta": Operation(lambda t, at: _on_meta(torch.empty_like(t, device="meta")), gives="answers"),
    "zeros_like": Operation(lambda t, at: torch.zeros_like(t), refused=always),
    "ones_like": Operation(lambda t, at: torch.ones_like(t), refused=always),
    "rand_like": Operation(lambda t, at: torch.rand_like(t), refused=always),
    "new_empty": Operation(lambda t, at: t.new_empty(0, 2), refused=always),
    "pad": Operation(lambda t, at: F.pad(t, (0, 1)), refused=always, named="constant_pad_nd"),
    "new_zeros": Operation(lambda t, at: t.new_zeros(2, 2), refused=always),
    "new_zeros of its shape": Operation(lambda t, at: t.new_zeros(t.shape)),
    "new_zeros of half": Operation(
        lambda t, at: t.new_zeros((t.shape[0] // 2, *t.shape[1:])),
        refused=lambda at: transposed(at) and matrices(at),
    ),
}


def _on_meta(t: Any) -> tuple[Any, ...]:
    assert all(inner.is_meta for _, inner in t.parts()) if isinstance(t, QuantizedTensor) else True
    return t.device.type, tuple(t.shape), t.dtype


def _filled(empty: Any, at: At) -> Any:
    return empty.copy_(at.like(empty))


# --- writing --------------------------------------------------------------------------------------------------


def _write(part: Callable[[Any, At], Any]) -> Callable[[Any, At], None]:
    """Copies a part of another weight to the same part of this one."""

    def run(t: Any, at: At) -> None:
        part(t, at).copy_(at.like(t, lambda other: part(other, at)))

    return run


def _assign_data(t: Any, at: At) -> None:
    t.data = at.like(t)


def _sliceable(at: At) -> bool:
    """Whether other weights can be cut in rows at all, so that there is something to write."""
    return not 1 < at.block[0] < ROWS


def _part_shares(at: At) -> bool:
    """Whether rows 2..4 share a scale with others."""
    return at.one_matrix_scale or (at.block[0] > 1 and (2 % at.block[0] != 0 or at.block[0] >= ROWS))


def _columns_share(start: int, stop: int) -> When:
    """Whether columns start..stop share a scale or a byte of codes or zero points with others, or cut a block."""

    def shares(at: At) -> bool:
        step, bits = at.block[1], at.case.format.bits
        outer = at.one_matrix_scale or at.case.row_scale
        if outer or step >= COLUMNS or start % step or (stop != COLUMNS and stop % step):
            return True
        odd = [start, stop] if stop != COLUMNS else [start]
        blocks = [n // step for n in odd] if at.case.asymmetric else []
        return any(n * bits % 8 for n in (*odd, *blocks))

    return shares


WRITES: dict[str, Operation] = {
    "copy_": Operation(_write(lambda t, at: t)),
    "copy_ through mT": Operation(_write(lambda t, at: t.mT)),
    "copy_ to rows": Operation(
        _write(lambda t, at: t.narrow(at.r, 2, 2)),
        on=_sliceable,
        refused=_part_shares,
        named="copy_|slice|tensor_scale|act_scale",
    ),
    "copy_ to every second row": Operation(
        _write(lambda t, at: torch.ops.aten.slice(t, at.r, 0, 6, 2)),
        on=_sliceable,
        refused=lambda at: shares_rows(at) or at.one_matrix_scale,
        named="copy_|slice|tensor_scale|act_scale",
    ),
    "copy_ to columns": Operation(
        _write(lambda t, at: t.narrow(at.c, 32, 32)),
        refused=_columns_share(32, 64),
        named="copy_|slice|tensor_scale|act_scale",
    ),
    "copy_ to columns inside blocks": Operation(
        _write(lambda t, at: t.narrow(at.c, 0, 37)),
        refused=_columns_share(0, 37),
        named="copy_|slice|tensor_scale|act_scale",
    ),
    "copy_ to the last columns": Operation(
        _write(lambda t, at: t.narrow(at.c, 64, 6)),
        refused=_columns_share(64, 70),
        named="copy_|slice|tensor_scale|act_scale",
    ),
    "copy_ to a slice of a part": Operation(
        _write(lambda t, at: t.narrow(at.c, 0, 37).mT.detach()),
        refused=_columns_share(0, 37),
        named="copy_|slice|tensor_scale|act_scale",
    ),
    "copy_ to all columns": Operation(_write(lambda t, at: t.narrow(at.c, 0, 70).narrow(at.r, 0, 6))),
    "copy_ to an expert": Operation(_write(lambda t, at: t[1]), on=experts),
    "copy_ to every second expert": Operation(_write(lambda t, at: t[::2]), on=experts),
    "copy_ to an unsqueezed weight": Operation(_write(lambda t, at: t.unsqueeze(0))),
    "copy_ to a view": Operation(_write(lambda t, at: t.view(1, *t.shape)[0])),
    "copy_ from a plain tensor": Operation(lambda t, at: t.copy_(torch.ones(t.shape, dtype=t.dtype)), refused=always),
    "copy_ to a plain tensor": Operation(lambda t, at: torch.ones(t.shape, dtype=t.dtype).copy_(t), refused=always),
    "assignment of rows": Operation(
        lambda t, at: t.__setitem__(slice(2, 4), at.like(t, lambda other: other[2:4])),
        on=lambda at: straight_matrices(at) and _sliceable(at),
        refused=_part_shares,
        named="copy_|slice|tensor_scale|act_scale",
    ),
    "assignment of an expert": Operation(
        lambda t, at: t.__setitem__(1, at.like(t, lambda other: other[0])), on=experts
    ),
    "assignment by a tensor": Operation(
        lambda t, at: t.__setitem__(torch.tensor([0, 1]), at.like(t, lambda other: other[:2])),
        on=lambda at: experts(at) or straight(at),
        refused=always,
        named="index_put_|copy_",
    ),
    "assignment of a number": Operation(
        lambda t, at: t.__setitem__(slice(0, 2), 0.0), refused=always, named="fill_|copy_|slice"
    ),
    "data assigned": Operation(_assign_data),
    "data assigned plainly": Operation(
        lambda t, at: setattr(t, "data", torch.ones(t.shape, dtype=t.dtype)), refused=always
    ),
    "zero_": Operation(lambda t, at: t.zero_(), refused=always),
    "fill_": Operation(lambda t, at: t.fill_(1.0), refused=always),
    "mul_": Operation(lambda t, at: t.mul_(2), refused=always),
    "add_": Operation(lambda t, at: t.add_(1), refused=always),
    "clamp_": Operation(lambda t, at: t.clamp_(-1, 1), refused=always),
    "normal_": Operation(lambda t, at: nn.init.normal_(t), refused=always, oracle=unknown),
    "masked_fill_": Operation(lambda t, at: t.masked_fill_(torch.ones(t.shape, dtype=torch.bool), 0.0), refused=always),
    "index_copy_": Operation(
        lambda t, at: t.index_copy_(0, torch.tensor([0]), at.like(t, lambda other: other.narrow(at.r, 0, 1))),
        on=straight_matrices,
        refused=always,
        named="index_copy_|slice",
    ),
    "resize_": Operation(lambda t, at: t.resize_(2, 2), refused=always),
    "set_": Operation(lambda t, at: t.set_(), refused=always),
}


# --- arithmetic and answers -----------------------------------------------------------------------------------


def _answer(run: Callable[[Any, At], Any], **rest: Any) -> Operation:
    return Operation(run, gives="answers", **rest)


def one_element(t: Any, at: At) -> Any:
    return t.narrow(at.r, 0, 1).narrow(at.c, 0, 1)


ANSWERS: dict[str, Operation] = {
    "add": Operation(lambda t, at: t + 1, refused=always),
    "add to a plain tensor": Operation(lambda t, at: torch.ones(t.shape, dtype=t.dtype) + t, refused=always),
    "sub": Operation(lambda t, at: 1 - t, refused=always),
    "mul": Operation(lambda t, at: t * 2, refused=always),
    "div": Operation(lambda t, at: t / 2, refused=always),
    "pow": Operation(lambda t, at: t**2, refused=always),
    "neg": Operation(lambda t, at: -t, refused=always),
    "abs": Operation(lambda t, at: t.abs(), refused=always),
    "relu": Operation(lambda t, at: torch.relu(t), refused=always),
    "softmax": Operation(lambda t, at: F.softmax(t, -1), refused=always),
    "where": Operation(lambda t, at: torch.where(torch.ones(t.shape, dtype=torch.bool), t, t), refused=always),
    "eq": Operation(lambda t, at: t == t, refused=always),
    "sum": _answer(lambda t, at: t.sum(), refused=always),
    "mean": _answer(lambda t, at: t.mean(-1), refused=always),
    "max": _answer(lambda t, at: t.max(), refused=always),
    "max along an axis": _answer(lambda t, at: t.max(-1), refused=always),
    "argmax": _answer(lambda t, at: t.argmax(), refused=always),
    "norm": _answer(lambda t, at: t.norm(), refused=always),
    "any": _answer(lambda t, at: t.any(), refused=always),
    "isnan": _answer(lambda t, at: t.isnan(), refused=always, named="isnan|ne"),
    "isfinite": _answer(lambda t, at: t.isfinite(), refused=always, named="isfinite|abs|eq|ne"),
    "allclose": _answer(lambda t, at: torch.allclose(t, t), refused=always, named="allclose|isclose"),
    "contains": _answer(lambda t, at: 0.5 in t, refused=always, named="eq|contains"),
    "numpy": _answer(lambda t, at: t.numpy(), refused=always, oracle=unknown),
    "__array__": _answer(lambda t, at: t.__array__(), refused=always, oracle=unknown),
    "__dlpack__": _answer(lambda t, at: t.__dlpack__(), refused=always, oracle=unknown),
    "tolist": _answer(lambda t, at: t.tolist(), refused=always, oracle=unknown),
    "item": _answer(lambda t, at: one_element(t, at).item(), refused=always, on=matrices),
    "item of many": _answer(lambda t, at: t.item(), refused=always, oracle=unknown),
    "float of one": _answer(
        lambda t, at: float(one_element(t, at)), on=matrices, refused=always, named="item|_local_scalar"
    ),
    "bool of one": _answer(
        lambda t, at: bool(one_element(t, at)), on=matrices, refused=always, named="is_nonzero|_local_scalar|item"
    ),
    "equal": _answer(lambda t, at: torch.equal(t, t.clone())),
    "equal to another": _answer(lambda t, at: torch.equal(t, at.like(t))),
    "equal to its mT": _answer(lambda t, at: torch.equal(t, t.mT)),
    "equal to a part": _answer(lambda t, at: torch.equal(t, t.narrow(at.r, 0, 3))),
    "repr": _answer(lambda t, at: (at.case.format.name in f"{t!r}{t}") if isinstance(t, QuantizedTensor) else True),
    "hash": _answer(lambda t, at: (len({t, t}), t in {t}, len({t, t.clone()}))),
    "shape": _answer(lambda t, at: (t.shape, t.dim(), t.numel(), len(t), t.dtype, t.device, t.size(-1), t.layout)),
    "is_floating_point": _answer(lambda t, at: (t.is_floating_point(), t.is_complex(), t.is_leaf, t.requires_grad)),
    "storage known": _answer(lambda t, at: t.data_ptr() != 0 and t.nbytes > 0),
    "is_pinned": _answer(lambda t, at: t.is_pinned()),
}


# --- modules --------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """One weight of any shape."""

    def __init__(self, weight: Tensor, frozen: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=not frozen)


def _meta_state(t: Any, assign: bool) -> Any:
    """A state loaded into a module on `meta`; without `assign` nothing arrives there, and torch warns of it."""
    module = Holder(torch.empty_like(t, device="meta"))
    assert not module.load_state_dict(Holder(t).state_dict(), assign=assign).missing_keys
    assert module.weight.is_meta == (not assign)
    return module.weight if assign else None


def _loaded(t: Any, at: At) -> Any:
    module = Holder(at.like(t))
    kept = module.weight
    module.load_state_dict(Holder(t).state_dict())
    assert module.weight is kept
    return module.weight


def _trained(t: Any, at: At) -> Any:
    """The gradient of a weight whose flag is set."""
    weight = nn.Parameter(t)
    assert weight.requires_grad
    out = F.linear(given(t, 3, t.shape[-1]), weight, given(t, len(t)))
    (gradient,) = torch.autograd.grad(out.square().sum(), weight)
    return gradient


def _step(t: Any, at: At) -> None:
    weight = nn.Parameter(t)
    optimizer = torch.optim.SGD([weight], lr=0.1, foreach=False)
    with torch.inference_mode(False), torch.enable_grad():
        F.linear(given(t, 3, t.shape[-1]), weight).sum().backward()
        optimizer.step()


def _watched(at: At) -> bool:
    return matrices(at) and at.mode is torch.enable_grad


MODULES: dict[str, Operation] = {
    "Parameter": Operation(lambda t, at: nn.Parameter(t, requires_grad=False)),
    "requires_grad_": Operation(lambda t, at: t.requires_grad_(False)),
    "gradient of a weight": _product(_trained, on=_watched),
    "step of an optimizer": Operation(_step, on=_watched, refused=always, named="add_"),
    "module.to": _cast(lambda t: Holder(t).to(torch.bfloat16).weight, torch.bfloat16),
    "module.to a device": Operation(lambda t, at: Holder(t).to("cpu").weight),
    "module.half": _cast(lambda t: Holder(t).half().weight, torch.float16),
    "module.float": _cast(lambda t: Holder(t).float().weight, torch.float32),
    "module.to_empty": Operation(lambda t, at: _filled(Holder(t).to_empty(device="cpu").weight.detach(), at)),
    "module to meta": _answer(lambda t, at: _on_meta(Holder(t).to("meta").weight)),
    "module deepcopy": Operation(lambda t, at: copy.deepcopy(Holder(t)).weight),
    "module share_memory": Operation(lambda t, at: Holder(t).share_memory().weight),
    "state_dict": Operation(lambda t, at: Holder(t).state_dict()["weight"]),
    "load_state_dict": Operation(_loaded),
    "load_state_dict on meta by assign": Operation(lambda t, at: _meta_state(t, True)),
    "load_state_dict on meta": Operation(lambda t, at: _meta_state(t, False)),
    "load_state_dict of a trained module": Operation(
        lambda t, at: _assigned(t).detach(),
    ),
    "load_state_dict of plain weights": Operation(
        lambda t, at: Holder(t).load_state_dict({"weight": torch.ones(t.shape, dtype=t.dtype)}),
        refused=always,
        named="copy_",
    ),
}


def _assigned(t: Any) -> Any:
    module = Holder(torch.empty(t.shape, dtype=t.dtype, device="meta"), frozen=False)
    module.load_state_dict({"weight": t}, assign=True)
    return module.weight


TABLE: dict[str, Operation] = {**PRODUCTS, **SHAPES, **PICKS, **COPIES, **WRITES, **ANSWERS, **MODULES}


# --- cells ----------------------------------------------------------------------------------------------------


@cache
def places(format_name: str) -> tuple[At, ...]:
    """Every granularity, mapping and layout of a format; dtypes and modes take turns."""
    return _taking_turns([case for case in CASES if case.format.name == format_name])


@cache
def static_places() -> tuple[At, ...]:
    """The same of weights that bring along the scales of their inputs."""
    return _taking_turns(STATIC)


def _taking_turns(cases: list[Case]) -> tuple[At, ...]:
    turns = [(case, layout) for case in cases for layout in LAYOUTS]
    return tuple(
        At(layout, case, DTYPES[i % len(DTYPES)], MODES[(i + i // len(DTYPES)) % len(MODES)])
        for i, (case, layout) in enumerate(turns)
    )


@cache
def _plain(at: At) -> Tensor:
    with torch.inference_mode(False):
        return _weight(at).dequantize()


def cell(name: str, at: At) -> str:
    """Runs one cell: "passed" or "refused", or an `AssertionError`."""
    operation, what = TABLE[name], f"{name}: {at}"
    weight, before = at.weight(), _plain(at)
    plain = before.clone()
    with at.mode():
        expected = operation.oracle(weight, at) if operation.oracle else operation.run(plain, at)
        try:
            found = operation.run(weight, at)
        except (UnsupportedOpError, RuntimeError) as error:
            refusal = _refusal(error)
            assert refusal is not None, f"{what}: {type(error).__name__}: {error}"
            assert operation.refused(at), f"{what} should not be refused: {refusal}"
            named = operation.named or re.escape(name.split()[0])
            assert re.search(named, refusal), f"{what} is not named: {refusal}"
            assert re.search(rf"\b{at.case.format.name}\b", refusal), f"{what}: no format in {refusal}"
            assert torch.equal(weight, _weight(at)), f"{what}: the weight changed"
            return "refused"
    assert not operation.refused(at), f"{what} should be refused, not {found!r}"
    _compare(found, expected, operation, what)
    if torch.equal(plain, before):
        assert torch.equal(weight, _weight(at)), f"{what}: the weight changed"
    else:
        assert torch.equal(weight.dequantize(), plain), f"{what}: the weight afterwards"
    return "passed"


def _refusal(error: Exception) -> str | None:
    """The words of an `UnsupportedOpError`, also where torch's `load_state_dict` reports it in words of its own."""
    if isinstance(error, UnsupportedOpError):
        return str(error)
    return str(error) if "loading state_dict" in str(error) and "not supported for" in str(error) else None


def _compare(found: Any, expected: Any, operation: Operation, what: str) -> None:
    if isinstance(expected, (list, tuple)) and not isinstance(expected, torch.Size) and operation.gives == "weights":
        assert len(found) == len(expected), what
        for a, b in zip(found, expected, strict=True):
            _compare(a, b, operation, what)
    elif isinstance(found, QuantizedTensor):
        assert isinstance(expected, Tensor), f"{what}: {found!r}"
        assert found.shape == expected.shape and found.dtype == expected.dtype, f"{what}: {found!r}"
        assert found.nbytes == sum(t.nbytes for _, t in found.parts()), what
        assert torch.equal(found.dequantize(), expected), f"{what}: other values"
    elif isinstance(expected, Tensor):
        assert operation.gives != "weights", f"{what}: a plain tensor"
        tolerance = TOLERANCE[expected.dtype] if operation.gives == "products" else 0.0
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(
            found, expected, rtol=tolerance, atol=tolerance * scale, msg=lambda m: f"{what}: {m}"
        )
    else:
        assert found == expected, f"{what}: {found!r}, not {expected!r}"


def run(name: str, format_name: str) -> Counter[str]:
    """All cells of one operation and format."""
    return Counter(cell(name, at) for at in places(format_name) if TABLE[name].on(at))


def summary(counts: dict[str, Counter[str]]) -> Iterator[str]:
    """A line a format."""
    for name, count in counts.items():
        yield f"{name:14} {count['passed']:6} passed {count['refused']:6} refused"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("\n".join(summary({f: sum((run(name, f) for name in TABLE), Counter()) for f in FORMATS})))
