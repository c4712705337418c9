"""Converted graphs as ExecuTorch programs (`.pte`), their products handed to XNNPACK."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from llmquant.errors import ExportError, MissingDependencyError
from llmquant.pt2e.patterns import has_unsigned_input, named_products

INSTALL = "pip install 'llmquant[executorch]'"


@dataclass(frozen=True)
class ExecutorchReport:
    """What was written.

    Attributes:
        path: the file.
        bytes: its size.
        delegates: calls of XNNPACK in it.
        left: the operators outside of these calls, which ExecuTorch's portable kernels run, and how often each.
    """

    path: Path
    bytes: int
    delegates: int
    left: Counter[str]


def export_executorch(
    m: fx.GraphModule, inputs: Sequence[Any], path: str | os.PathLike[str], dynamic_shapes: Any = None
) -> ExecutorchReport:
    """Writes a converted graph as an ExecuTorch program for XNNPACK.

    XNNPACK takes signed activations (`XNNPACKQuantizer`): dynamic ones, or static ones whose outputs are quantized.

    Args:
        m: what `convert_pt2e` gave, not lowered; or a float graph.
        inputs: what it is called with.
        path: the file; written beside it first, so that there is a whole one or none.
        dynamic_shapes: as in `torch.export.export`.

    Raises:
        ExportError: for unsigned codes, and for graphs whose quantized products XNNPACK does not take whole.
        MissingDependencyError: without executorch.
    """
    lower_to_edge, partitioner = _packages()
    unsigned = [name for name, node in named_products(m.graph) if has_unsigned_input(node)]
    if unsigned:
        raise ExportError("XNNPACK takes no unsigned codes", where=", ".join(unsigned), hint="XNNPACKQuantizer")
    with torch.no_grad():
        program = torch.export.export(m, tuple(inputs), dynamic_shapes=dynamic_shapes)
    edge = lower_to_edge(program, partitioner=[partitioner()])
    calls = _calls(edge.exported_program().graph_module)
    codes = [name for name in calls if "quantized_decomposed" in name]
    if codes:
        raise ExportError(
            "XNNPACK leaves some codes to float kernels, which ExecuTorch does not have for them",
            where=", ".join(codes),
            hint="dynamic activations, or a quantizer that quantizes the outputs of products, too (XNNPACKQuantizer)",
        )
    size = _write(edge.to_executorch().buffer, Path(path))
    delegates = calls.pop("executorch_call_delegate", 0)
    return ExecutorchReport(Path(path), size, delegates, calls)


def run_executorch(path: str | os.PathLike[str], *inputs: Any) -> list[Any]:
    """The outputs of a program's `forward`, by ExecuTorch's own runtime.

    Raises:
        MissingDependencyError: without executorch.
    """
    try:
        from executorch.runtime import Runtime
    except ImportError as error:
        raise MissingDependencyError("running a .pte file needs executorch", hint=INSTALL) from error
    method = Runtime.get().load_program(Path(path).read_bytes()).load_method("forward")
    return list(method.execute(list(inputs)))


def _packages() -> tuple[Any, Any]:
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    except ImportError as error:
        raise MissingDependencyError(
            f"an ExecuTorch program needs executorch and what it needs itself ({error})", hint=INSTALL
        ) from error
    return to_edge_transform_and_lower, XnnpackPartitioner


def _calls(graph: fx.GraphModule) -> Counter[str]:
    """How often each operator is called; reading an output of a call is none."""
    names = (getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes if "call" in node.op)
    return Counter(name for name in names if name != "getitem")


def _write(content: bytes, path: Path) -> int:
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return len(content)
