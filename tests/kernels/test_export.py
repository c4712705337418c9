"""Exported and compiled models: every product is one operator, and the numbers stay."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import ONE_PER_FORMAT, Case, make_weight
from torch import Tensor, nn

OPERATORS = {
    "int4-g32": torch.ops.llmquant.linear.default,
    "int3-g16-asym": torch.ops.llmquant.linear.default,
    "float8-row": torch.ops.llmquant.linear.default,
    "f8-float8": torch.ops.llmquant.linear_float8.default,
    "s8-asym-int8": torch.ops.llmquant.linear_int8_static.default,
    "sf8-float8": torch.ops.llmquant.linear_float8_static.default,
    "nvfp4": torch.ops.llmquant.linear.default,
    "a8-int4-g32": torch.ops.llmquant.linear_int8.default,
    "a8-token-asym-int8-g32-asym": torch.ops.llmquant.linear_int8.default,
}
every_scheme = pytest.mark.parametrize("scheme", OPERATORS)
CODECS = set(OPERATORS.values())
ROWS = torch.export.Dim("rows", min=1, max=64)


def module(scheme: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two quantized layers, one with a bias, around one that stays as it was."""
    made = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 32, bias=False))
    for i in (0, 4):
        made[i].weight = nn.Parameter(Case(scheme).quantize(made[i].weight.detach()), requires_grad=False)
    return made.to(dtype).eval()


@torch.no_grad()
def export(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model, (x,), dynamic_shapes=({0: ROWS},))


def products(graph: torch.fx.Graph) -> Counter:
    """How often each operator of this library, or a dense product, is called."""
    called = Counter(node.target for node in graph.nodes if node.op == "call_function")
    return Counter({op: n for op, n in called.items() if op in CODECS or any(s in str(op) for s in ("linear", "mm"))})


@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_an_exported_program_calls_one_operator_for_each_product(scheme: str, dtype: torch.dtype) -> None:
    model, x = module(scheme, dtype), torch.randn(5, 64).to(dtype)
    program = export(model, x)
    assert products(program.graph) == {OPERATORS[scheme]: 2, torch.ops.aten.linear.default: 1}
    for rows in (5, 1, 17):
        x = torch.randn(rows, 64).to(dtype)
        assert torch.equal(program.module()(x), model(x))
    lowered = program.run_decompositions()
    assert products(lowered.graph)[OPERATORS[scheme]] == 2
    assert not any("Quantized" in str(value) for value in (lowered.graph, *lowered.state_dict))


@every_scheme
@torch.no_grad()
def test_a_compiled_model_calls_the_same_operators(scheme: str) -> None:
    model, x = module(scheme), torch.randn(5, 64)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 2, 17):
        x = torch.randn(rows, 64)
        assert torch.equal(compiled(x), model(x))


QUICK = ("int4-g32", "int3-g16-asym", "f8-float8", "mxfp4-g32", "nvfp4", "a8-token-int8")
SLOW = [*map(str, ONE_PER_FORMAT), *OPERATORS, "int8-tensor", "float8-b16", "f8-tensor-int4-g32", "f8-g16-mxfp8"]
SLOW += ["a8-mxfp4", "a8-nvfp4"]
every_kind = pytest.mark.parametrize(
    "scheme", [*QUICK, *(pytest.param(s, marks=pytest.mark.slow) for s in dict.fromkeys(SLOW) if s not in QUICK)]
)


class Mixture(nn.Module):
    """Every way a model meets a weight: a table, linears, weights stored [in, out], and stacks of experts of both."""

    def __init__(self, scheme: str) -> None:
        super().__init__()
        self.scheme = scheme
        self.table, self.head = self.weight(32, 64), self.weight(32, 64)
        self.flipped = self.weight(64, 64, transposed=True)
        self.experts, self.flipped_experts = self.weight(3, 64, 64), self.weight(3, 64, 64, transposed=True)
        self.bias = nn.Parameter(torch.randn(64), requires_grad=False)

    def weight(self, *shape: int, transposed: bool = False) -> nn.Parameter:
        made = Case(self.scheme).quantize(make_weight(shape, seed=len(self._parameters)), transposed)
        return nn.Parameter(made, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.table)
        x = x + (x.flatten(0, 1) @ self.flipped).view(x.shape)
        x = x + torch.stack([F.linear(x, expert, self.bias) for expert in self.experts.unbind()]).sum(0)
        x = x + F.linear(x, self.experts[1])
        x = x + (x.flatten(0, 1).expand(3, -1, -1) @ self.flipped_experts).sum(0).view(x.shape)
        return F.linear(x, self.head)


SIZES = ((2, 5), (3, 7), (1, 33))  # sequences, tokens
BOTH = {0: torch.export.Dim("sequences", min=1, max=8), 1: torch.export.Dim("tokens", min=1, max=64)}


@every_kind
@torch.no_grad()
def test_sequences_and_tokens_of_an_exported_program_may_vary(scheme: str) -> None:
    model = Mixture(scheme)
    program = torch.export.export(model, (torch.zeros(2, 5, dtype=torch.int64),), dynamic_shapes=(BOTH,))
    lowered = program.run_decompositions()
    assert not any("Quantized" in str(value) for value in (lowered.graph, *lowered.state_dict))
    assert not any(".mm." in str(node.target) or ".bmm." in str(node.target) for node in lowered.graph.nodes)
    for size in SIZES:
        ids = torch.randint(0, 32, size)
        assert torch.equal(program.module()(ids), model(ids))
        assert torch.equal(lowered.module()(ids), model(ids))


@every_kind
@torch.no_grad()
def test_and_so_they_may_of_a_compiled_model(scheme: str) -> None:
    model = Mixture(scheme)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for size in SIZES[:2]:
        ids = torch.randint(0, 32, size)
        for dim in (0, 1):
            torch._dynamo.mark_dynamic(ids, dim)
        with torch.compiler.set_stance("default" if size == SIZES[0] else "fail_on_recompile"):
            assert torch.equal(compiled(ids), model(ids))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int4-g32", "a8-int4-g32"])
@torch.no_grad()
def test_a_package_compiled_ahead_of_time_gives_the_same(scheme: str, tmp_path: Path) -> None:
    """AOTInductor: no Python between the operators."""
    model, x = module(scheme), torch.randn(5, 64)
    path = torch._inductor.aoti_compile_and_package(export(model, x), package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    for rows in (5, 1, 17):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-6)
