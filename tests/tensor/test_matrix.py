"""Every operation on every format passes or raises the named error: see `matrix`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import matrix
import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from cases import CASES, Case
from layouts import LAYOUTS
from matrix import Operation, cell, places, run, static_places, summary
from torch import Tensor, nn

from llmquant.errors import UnsupportedOpError
from llmquant.formats import FORMATS
from llmquant.tensor import QuantizedTensor


@pytest.fixture(scope="module")
def counts(request: pytest.FixtureRequest) -> Iterator[dict[str, Counter[str]]]:
    """What the cells of each format came to, printed after the last of them."""
    found: dict[str, Counter[str]] = {}
    yield found
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\nOperations on quantized weights:", *summary(found), sep="\n  ")


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("name", matrix.TABLE)
def test_every_cell_is_right_or_refused_by_name(name: str, format_name: str, counts: dict[str, Counter[str]]) -> None:
    counts.setdefault(format_name, Counter()).update(run(name, format_name))


@pytest.mark.parametrize("name", [name for name, row in matrix.TABLE.items() if row.gives != "products"])
def test_scales_of_inputs_go_where_their_weight_goes(name: str) -> None:
    """Products with them are another matter: see test_static.py."""
    for at in static_places():
        if matrix.TABLE[name].on(at):
            cell(name, at)


def test_the_table_is_met_by_every_layout_dtype_and_mode() -> None:
    for name in FORMATS:
        found = places(name)
        assert {at.case for at in found} == {case for case in CASES if case.format.name == name}
        assert {at.layout for at in found} == set(LAYOUTS)
        for what in ({at.dtype for at in found}, {at.mode for at in found}):
            assert len(what) == 3
    assert len({(at.dtype, at.mode) for at in places("int4")}) == 9


# --- the judge can see what is wrong ----------------------------------------------------------------------------

WRONG: dict[str, Operation] = {
    "another value": Operation(lambda t, at: at.other() if isinstance(t, QuantizedTensor) else t),
    "a plain tensor": Operation(lambda t, at: t.dequantize() if isinstance(t, QuantizedTensor) else t),
    "a weight in place of an answer": Operation(
        lambda t, at: t if isinstance(t, QuantizedTensor) else 1, gives="answers"
    ),
    "a product that is off": Operation(
        lambda t, at: t.dequantize() * 1.1 if isinstance(t, QuantizedTensor) else t, gives="products"
    ),
    "another shape": Operation(lambda t, at: t if isinstance(t, QuantizedTensor) else t[:1]),
    "nothing done in place": Operation(lambda t, at: None if isinstance(t, QuantizedTensor) else t.zero_() and None),
    "the source changed": Operation(lambda t, at: [x.zero_() for _, x in t.parts()] and None if _packed(t) else None),
    "an error without a name": Operation(lambda t, at: 1 // 0 if isinstance(t, QuantizedTensor) else t),
    "an error of torch": Operation(lambda t, at: t.view(7) if not _packed(t) else _raise(RuntimeError("no"))),
    "refused where it should not be": Operation(lambda t, at: t.sum() if _packed(t) else None),
    "not refused where it should be": Operation(lambda t, at: t, refused=matrix.always),
    "refused by another name": Operation(lambda t, at: t.sum(), refused=matrix.always),
    "refused without its format": Operation(
        lambda t, at: _raise(UnsupportedOpError("refused")) if _packed(t) else None, refused=matrix.always
    ),
}


def _packed(t: Tensor) -> bool:
    return isinstance(t, QuantizedTensor)


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_cell_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matrix.TABLE, name, WRONG[name])
    with pytest.raises((AssertionError, ZeroDivisionError, RuntimeError)) as caught:
        cell(name, places("int4")[0])
    assert not isinstance(caught.value, UnsupportedOpError)


# --- once, not for each format ----------------------------------------------------------------------------------


def _sum_of(weight: QuantizedTensor, answers: torch.multiprocessing.Queue) -> None:
    answers.put((weight.dequantize().double().sum().item(), weight.is_shared(), repr(weight)))


def test_another_process_reads_a_shared_weight() -> None:
    context = torch.multiprocessing.get_context("spawn")
    weight = LAYOUTS[3].quantize(Case("int3-g32-asym")).share_memory_()
    answers = context.Queue()
    child = context.Process(target=_sum_of, args=(weight, answers))
    child.start()
    found = answers.get(timeout=120)
    child.join(timeout=60)
    assert child.exitcode == 0
    assert found == (weight.dequantize().double().sum().item(), True, repr(weight))


def test_linear_compiles_whole() -> None:
    weight = LAYOUTS[0].quantize(Case("int4-g32-asym"))
    layer = nn.Linear(70, 6)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    x = torch.randn(3, 70)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_a_weight_whose_flag_is_set_has_the_gradient_of_a_plain_one() -> None:
    """What `nn.Parameter(w)` and `load_state_dict(assign=True)` make: no product may lose its gradient in silence."""
    weight = LAYOUTS[0].quantize(Case("int4-g32-asym"))
    plain = weight.dequantize().requires_grad_()
    x, ids = torch.randn(3, 70), torch.tensor([5, 0, 5, 2])
    for product in (
        lambda w: F.linear(x, w),
        lambda w: x @ w.t(),
        lambda w: F.embedding(ids, w, padding_idx=0),
        lambda w: F.embedding(ids, w, scale_grad_by_freq=True),
    ):
        flagged = nn.Parameter(weight)
        (found,) = torch.autograd.grad(product(flagged).square().sum(), flagged)
        (expected,) = torch.autograd.grad(product(plain).square().sum(), plain)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            assert not product(flagged).requires_grad


def test_copy_does_not_round_scales() -> None:
    weight = LAYOUTS[0].quantize(Case("int4-g32"))
    finer = weight.clone()
    finer.scale = finer.scale.float() * 1.0001
    with pytest.raises(UnsupportedOpError, match="rounds scales"):
        weight.copy_(finer)
    finer.copy_(weight)
    assert torch.equal(finer.dequantize(), weight.dequantize())
