"""`einsum` and `grouped_mm` where the operations matrix does not look: gradients, graphs, sizes that do not fit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import Case, make_weight
from layouts import LAYOUTS
from torch import Tensor, nn

from llmquant.tensor import QuantizedTensor

SCHEMES = ("int4-g32-asym", "nvfp4")
EXPERTS, ROWS, COLUMNS = 3, 6, 70
MATRIX = LAYOUTS[0]
STACK = next(at for at in LAYOUTS if at.experts and not at.transposed)


def ends(*counts: int) -> Tensor:
    return torch.tensor(counts, dtype=torch.int32)


# (x [12, K], matrix [N, K], stack [E, N, K]) -> a product that is linear in x.
PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "einsum": lambda x, w, s: torch.einsum("bk,nk->nb", x, w),
    "einsum by another letter": lambda x, w, s: torch.einsum("bn,nk->bk", x[:, :ROWS], w),
    "einsum of experts": lambda x, w, s: torch.einsum("...ek,enk->...en", x.view(2, 2, EXPERTS, COLUMNS), s),
    "grouped_mm": lambda x, w, s: F.grouped_mm(x, s.mT, offs=ends(5, 5, 12)),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_and_their_gradients_are_those_of_plain_weights(name: str, scheme: str) -> None:
    weights = [at.quantize(Case(scheme)) for at in (MATRIX, STACK)]
    plain = [w.dequantize() for w in weights]
    x = torch.randn(4 * EXPERTS, COLUMNS)
    found, wanted = [], []
    for into, (matrix, stack) in ((found, weights), (wanted, plain)):
        seen = x.clone().requires_grad_()
        if name == "grouped_mm" and into is wanted:  # torch's own wants strides of 16 bytes
            out = torch.cat([seen[:5] @ stack[0].T, seen[5:] @ stack[2].T])
        else:
            out = PRODUCTS[name](seen, matrix, stack)
        out.square().sum().backward()
        into.extend([out.detach(), seen.grad])
    assert not any(isinstance(t, QuantizedTensor) for t in found)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
        assert b.abs().max() > 0


BAD: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]] = {
    "sizes of a letter": (lambda x, w, s: torch.einsum("bk,nk->bn", x[:, 1:], w), "69"),
    "more experts than there are": (
        lambda x, w, s: torch.einsum("ek,enk->en", x, s),
        "e is 12 in one tensor and 3 in the other",
    ),
    "offsets of too few experts": (lambda x, w, s: torch._grouped_mm(x, s.mT, ends(5, 12)), r"\[5, 12\].*3 experts"),
    "offsets that fall": (lambda x, w, s: torch._grouped_mm(x, s.mT, ends(5, 4, 12)), "do not cut 12 tokens"),
    "offsets beyond the tokens": (lambda x, w, s: torch._grouped_mm(x, s.mT, ends(5, 6, 13)), "do not cut 12 tokens"),
    "negative offsets": (lambda x, w, s: torch._grouped_mm(x, s.mT, ends(-1, 6, 12)), "do not cut 12 tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_sizes_that_do_not_fit(name: str) -> None:
    run, said = BAD[name]
    matrix, stack = (at.quantize(Case("int4-g32")) for at in (MATRIX, STACK))
    with pytest.raises(RuntimeError, match=said):
        run(make_weight((12, COLUMNS)), matrix, stack)


class Contracting(nn.Module):
    """A layer that says its product in letters."""

    def __init__(self, scheme: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(MATRIX.quantize(Case(scheme)), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bsk,nk->bns", x, self.weight)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_einsum_compiles_without_graph_breaks(scheme: str) -> None:
    model, x = Contracting(scheme), torch.randn(2, 5, COLUMNS)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
