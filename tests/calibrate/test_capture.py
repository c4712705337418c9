"""What observers are shown, for each way to write a product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmquant.calibrate.capture import Capture, Watched
from llmquant.config.candidates import Candidate, Role

OUT, IN, EXPERTS, TOKENS = 6, 8, 3, 5


class Seen:
    """Keeps all inputs, for the tests."""

    def __init__(self) -> None:
        self.tokens, self.inputs = 0, list[Tensor]()

    def update(self, x: Tensor) -> None:
        self.tokens += x.shape[:-1].numel()
        self.inputs.append(x.detach().clone())

    def bounds(self) -> tuple[Tensor, Tensor]:
        raise AssertionError("nobody asks")


def watch(weight: Tensor, transposed: bool = False) -> Watched:
    candidate = Candidate(("w",), (Role.linear,), tuple(weight.shape), transposed, weight.dtype)
    return Watched(candidate, weight, [Seen() for _ in range(len(weight) if weight.dim() == 3 else 1)])


# (x [T, IN], weight [OUT, IN]) -> a product along the columns.
STRAIGHT: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "linear": lambda x, w: F.linear(x, w),
    "linear with bias": lambda x, w: F.linear(x, w, torch.ones(OUT)),
    "linear by keyword": lambda x, w: F.linear(x, weight=w, bias=None),
    "@": lambda x, w: x @ w.t(),
    "matmul": lambda x, w: torch.matmul(x, w.T),
    "mm": lambda x, w: x.mm(w.mT),
    "addmm": lambda x, w: torch.addmm(torch.ones(OUT), x, w.t()),
    "from the left": lambda x, w: w @ x.t(),
    "module": lambda x, w: _module(w)(x),
}


def _module(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(IN, OUT, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", STRAIGHT)
def test_the_input_is_shown_as_it_is(name: str, mode: Callable[[], Any]) -> None:
    x, watched = torch.randn(TOKENS, IN), watch(torch.randn(OUT, IN))
    with mode(), Capture([watched]):
        found = STRAIGHT[name](x, watched.weight)
    plain = STRAIGHT[name](x, watched.weight)
    assert torch.equal(found, plain)
    (seen,) = watched.observers[0].inputs
    assert torch.equal(seen, x)


@pytest.mark.parametrize("name", ["addmm", "@", "matmul", "mm"])
def test_weights_that_stand_transposed_are_known(name: str) -> None:
    x, watched = torch.randn(TOKENS, IN), watch(torch.randn(IN, OUT), transposed=True)
    with Capture([watched]):
        STRAIGHT[name](x, watched.weight.t())  # the function transposes it back: [IN, OUT] in memory
    assert torch.equal(watched.observers[0].inputs[0], x)


def test_products_along_the_rows_are_none_of_its_business() -> None:
    watched = watch(torch.randn(OUT, IN))
    with Capture([watched]):
        torch.randn(TOKENS, OUT) @ watched.weight
        watched.weight + 1
        F.embedding(torch.tensor([1, 2]), watched.weight)
        F.linear(torch.randn(TOKENS, IN), torch.randn(OUT, IN))
    assert watched.observers[0].tokens == 0


def test_each_expert_is_told_apart() -> None:
    x, watched = torch.randn(EXPERTS, TOKENS, IN), watch(torch.randn(EXPERTS, OUT, IN))
    with Capture([watched]):
        F.linear(x[2], watched.weight[2])
        F.linear(x[0, :2], watched.weight[0])
        F.linear(x[0, :0], watched.weight[1])
    assert [o.tokens for o in watched.observers] == [2, 0, TOKENS]
    assert torch.equal(watched.observers[2].inputs[0], x[2])


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_of_the_whole_stack_shows_each_its_own(transposed: bool) -> None:
    shape = (EXPERTS, IN, OUT) if transposed else (EXPERTS, OUT, IN)
    x, watched = torch.randn(EXPERTS, TOKENS, IN), watch(torch.randn(shape), transposed)
    with Capture([watched]):
        torch.bmm(x, watched.weight if transposed else watched.weight.mT)
    assert all(torch.equal(o.inputs[0], x[i]) for i, o in enumerate(watched.observers))


def test_a_stack_that_its_module_holds_as_a_matrix() -> None:
    """As DBRX does: one expert's rows under the other's."""
    flat = torch.randn(EXPERTS * OUT, IN)
    watched = watch(flat.view(EXPERTS, OUT, IN))
    x = torch.randn(TOKENS, IN)
    with Capture([watched]):
        F.linear(x, flat.chunk(EXPERTS)[1])
    assert [o.tokens for o in watched.observers] == [0, TOKENS, 0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_behind_after_an_interruption(error: type[BaseException]) -> None:
    watched = watch(torch.randn(OUT, IN))
    with pytest.raises(error), Capture([watched]):
        raise error
    F.linear(torch.randn(TOKENS, IN), watched.weight)
    assert watched.observers[0].tokens == 0
