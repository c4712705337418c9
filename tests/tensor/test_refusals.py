"""Nothing dequantizes in silence: what has no packed form raises, and says which operator and which format."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import ONE_PER_FORMAT, Case, make_weight
from layouts import LAYOUTS
from torch import Tensor, nn

from llmquant.errors import LlmQuantError, UnsupportedOpError

# call, and what the message must name.
REFUSED: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "w + 1": (lambda w: w + 1, "add"),
    "1 - w": (lambda w: 1 - w, "sub"),
    "w * 2": (lambda w: w * 2, "mul"),
    "w / 2": (lambda w: w / 2, "div"),
    "-w": (lambda w: -w, "neg"),
    "w += 1": (lambda w: w.add_(1), "add_"),
    "plain + w": (lambda w: make_weight((6, 70)) + w, "add"),
    "w == w": (lambda w: w == w, "eq"),
    "sum": (lambda w: w.sum(), "sum"),
    "mean": (lambda w: w.mean(-1), "mean"),
    "max": (lambda w: w.max(), "max"),
    "norm": (lambda w: w.norm(), "norm"),
    "abs": (lambda w: w.abs(), "abs"),
    "relu": (torch.relu, "relu"),
    "softmax": (lambda w: F.softmax(w, -1), "softmax"),
    "sort": (lambda w: w.sort(), "sort"),
    "isnan": (torch.isnan, "isnan|ne"),
    "where": (lambda w: torch.where(torch.ones(6, 70, dtype=torch.bool), w, w), "where"),
    "zero_": (lambda w: w.zero_(), "zero_"),
    "fill_": (lambda w: w.fill_(1.0), "fill_"),
    "normal_": (lambda w: nn.init.normal_(w), "normal_"),
    "zeros_like": (torch.zeros_like, "zeros_like"),
    "rand_like": (torch.rand_like, "rand_like"),
    "stack with a plain tensor": (lambda w: torch.stack([w, make_weight((6, 70))]), "stack"),
    "cat with a plain tensor": (lambda w: torch.cat([w, make_weight((6, 70))]), "cat"),
    "repeat": (lambda w: w.repeat(2, 1), "repeat"),
    "unsqueeze between rows": (lambda w: w.unsqueeze(1), "unsqueeze"),
    "flatten": (lambda w: w.flatten(), "view|flatten|reshape"),
    "view across rows": (lambda w: w.view(12, 35), "view"),
    "view as bytes": (lambda w: w.view(torch.uint8), "view.*uint8"),
    "expand of its own rows": (lambda w: w[:1].expand(6, 70), "expand"),
    "to integers": (lambda w: w.to(torch.int8), "int8"),
    "to float8": (lambda w: w.to(torch.float8_e5m2), "float8_e5m2"),
    "every second column": (lambda w: w[:, ::2], "slice"),
    "one row": (lambda w: w[3], "row"),
    "one column": (lambda w: w[:, 3], "column"),
    "one element": (lambda w: w[3, 4], "row"),
    "columns by index": (lambda w: w[:, torch.tensor([0, 1])], "column"),
    "elements by a mask": (lambda w: w[torch.ones(6, 70, dtype=torch.bool)], "index"),
    "rows and columns by index": (lambda w: w[torch.tensor([0, 1]), torch.tensor([0, 1])], "index"),
    "assignment": (lambda w: w.__setitem__(slice(0, 2), 0.0), "fill_|copy_"),
    "linear on its bias side": (lambda w: F.linear(w, make_weight((6, 70))), "linear"),
    "linear of two": (lambda w: F.linear(w, w), "linear"),
    "mm of two": (lambda w: torch.mm(w, w.t()), "mm"),
    "einsum that only multiplies": (lambda w: torch.einsum("nk,nk->nk", make_weight((6, 70)), w), "einsum"),
    "einsum of three": (lambda w: torch.einsum("k,nk,n->n", make_weight((70,)), w, make_weight((6,))), "einsum"),
    "einsum without a result's letters": (lambda w: torch.einsum("bk,nk", make_weight((3, 70)), w), "einsum"),
    "einsum of a sum": (lambda w: torch.einsum("bk,nk->n", make_weight((3, 70)), w), "einsum"),
    "einsum of a diagonal": (lambda w: torch.einsum("bk,kk->b", make_weight((3, 70)), w), "einsum"),
    "einsum of it alone": (lambda w: torch.einsum("nk->kn", w), "einsum"),
    "_grouped_mm of a matrix": (lambda w: torch._grouped_mm(make_weight((3, 6)), w, torch.tensor([3])), "_grouped_mm"),
    "conv": (lambda w: F.conv1d(make_weight((1, 70, 3)), w.view(6, 70, 1)), "view|conv"),
    "embedding of the transposed": (lambda w: F.embedding(torch.tensor([0]), w.t()), "embedding"),
    "embedding that renormalises": (lambda w: F.embedding(torch.tensor([0]), w, max_norm=1.0), "max_norm"),
    "embedding_bag": (lambda w: F.embedding_bag(torch.tensor([[0]]), w), "embedding_bag"),
}


@pytest.mark.parametrize("case", ONE_PER_FORMAT, ids=str)
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str, case: Case) -> None:
    call, named = REFUSED[name]
    weight = LAYOUTS[0].quantize(case)
    before = weight.clone()
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode(), pytest.raises(UnsupportedOpError, match=named) as caught:
            call(weight)
        assert case.format.name in str(caught.value)
        assert isinstance(caught.value, LlmQuantError) and isinstance(caught.value, NotImplementedError)
    assert torch.equal(weight, before)


def test_a_refusal_says_what_to_try() -> None:
    with pytest.raises(UnsupportedOpError, match=r"dequantize\(\)"):
        LAYOUTS[0].quantize(Case("int4-g32")) + 1


OF_EXPERTS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "linear": (lambda w: F.linear(make_weight((3, 70)), w), "linear"),
    "embedding": (lambda w: F.embedding(torch.tensor([0]), w), "embedding"),
    "permute experts": (lambda w: w.permute(1, 0, 2), "permute"),
    "one row of an expert": (lambda w: w[0, 1], "row"),
    "rows of all experts at once": (lambda w: w[:, 1], "row"),
    "addbmm": (lambda w: torch.addbmm(torch.zeros(2, 6), make_weight((3, 2, 70)), w.mT), "addbmm"),
}


@pytest.mark.parametrize("case", ONE_PER_FORMAT, ids=str)
@pytest.mark.parametrize("name", OF_EXPERTS)
def test_refused_for_experts(name: str, case: Case) -> None:
    call, named = OF_EXPERTS[name]
    with pytest.raises(UnsupportedOpError, match=named) as caught:
        call(LAYOUTS[2].quantize(case))
    assert case.format.name in str(caught.value)


@pytest.mark.parametrize("start", [1, 16, 31, 33, 63, 65])
@pytest.mark.parametrize("scheme", [c.scheme for c in ONE_PER_FORMAT if "-g32" in c.scheme])
def test_a_slice_that_cuts_a_block_is_refused(start: int, scheme: str) -> None:
    weight = LAYOUTS[0].quantize(Case(scheme))
    for call in (lambda: weight[:, start:], lambda: weight.t()[start:], lambda: weight.narrow(1, start, 2)):
        with pytest.raises(UnsupportedOpError, match=f"from {start} cuts a block of 32"):
            call()


def test_joins_that_would_mix_blocks_are_refused() -> None:
    def make(scheme: str, shape: tuple[int, int] = (6, 70), dtype: torch.dtype = torch.float32) -> Tensor:
        return Case(scheme).quantize(make_weight(shape, dtype))

    weight = make("int4-g32")
    others = {
        "group": make("int4-g16"),
        "mapping": make("int4-g32-asym"),
        "format": make("int8-g32"),
        "dtype": make("int4-g32", dtype=torch.bfloat16),
        "columns": make("int4-g32", (6, 64)),
        "transposed": make("int4-g32", (70, 6)).t(),
        "class": make("float8"),
    }
    for name, other in others.items():
        with pytest.raises(UnsupportedOpError, match="joined"):
            torch.cat([weight, other])
        assert name
    for call in (
        lambda: torch.cat([weight, weight], 1),  # the first ends inside a block
        lambda: torch.cat([make("int8-tensor"), make("int8-tensor")[:3]]),
    ):
        with pytest.raises(UnsupportedOpError, match=r"line up|joined"):
            call()


def test_rows_of_one_scale_keep_it_when_cut_and_may_follow_one_another() -> None:
    weight = Case("int8-tensor").quantize(make_weight((6, 70)))
    assert torch.equal(torch.cat([weight, weight]).dequantize(), weight.dequantize().repeat(2, 1))
    assert torch.equal(torch.cat([weight, weight], 1).dequantize(), weight.dequantize().repeat(1, 2))
    both = torch.cat([weight, weight])
    assert torch.equal(both[6:].dequantize(), weight.dequantize())
    x = torch.randn(2, 70)
    torch.testing.assert_close(F.linear(x, both), x @ both.dequantize().t())
