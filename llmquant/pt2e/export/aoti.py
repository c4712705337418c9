"""Converted graphs as AOTInductor packages (`.pt2`): compiled code and weights, which run without Python."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from llmquant.errors import ExportError
from llmquant.pt2e import _ops
from llmquant.pt2e.patterns import PRODUCTS, StaysFloat, TokenCodes, input_of, is_quantized, products, read_input

_CALL = re.compile(rb"(?:aoti_torch_\w+_|torch\.ops\.onednn\.)_?(?:qlinear|qconv2?d?)_pointwise\w*\(")


@dataclass(frozen=True)
class AotiReport:
    """What was written.

    Attributes:
        path: the package.
        bytes: its size.
        int8: calls of int8 kernels in the generated code.
    """

    path: Path
    bytes: int
    int8: int


def export_aoti(
    m: fx.GraphModule, inputs: Sequence[Any], path: str | os.PathLike[str], dynamic_shapes: Any = None
) -> AotiReport:
    """Compiles a converted graph ahead of time.

    A packed weight cannot be written to a file, so it is Inductor that packs here; the calls of int8 kernels in its
    code are counted, and fewer than the graph has quantized products are an error.

    Args:
        m: what `convert_pt2e` gave, not lowered.
        inputs: what it is called with.
        path: the package; must end in `.pt2`.
        dynamic_shapes: as in `torch.export.export`.

    Raises:
        ExportError: for another ending, and for graphs of which Inductor leaves products to floats.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ExportError("an AOTInductor package ends in .pt2", where=str(path))
    wanted = _products(m)
    partial = path.with_name(f"{path.stem}.partial.pt2")
    try:
        with _ops.freezing():
            program = torch.export.export(m, tuple(inputs), dynamic_shapes=dynamic_shapes)
            _ops.aoti_package(program, partial)
        found = _int8_calls(partial)
        if found < wanted:
            raise ExportError(
                f"Inductor runs {found} of {wanted} quantized products in int8",
                where=str(path),
                hint="lower(m) and compile it instead, which needs no pattern of Inductor's",
            )
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return AotiReport(path, path.stat().st_size, found)


def load_aoti(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """The package as a function of the graph's inputs."""
    return _ops.aoti_load(path)


def _products(m: fx.GraphModule) -> int:
    """How many products need an int8 kernel. Raises for those that Inductor would leave to floats."""
    wanted = [n for n in products(m.graph) if is_quantized(n) and PRODUCTS[n.target] != "embedding"]
    for node in wanted:
        try:
            found = read_input(input_of(node))
        except StaysFloat as reason:
            raise ExportError("there is no int8 kernel for a product", where=f"{node.name}: {reason}") from reason
        if isinstance(found, TokenCodes):
            raise ExportError(
                "Inductor has no int8 kernel for scales of tokens", where=node.name, hint="per-tensor activations"
            )
    return len(wanted)


def _int8_calls(package: Path) -> int:
    with zipfile.ZipFile(package) as files:
        sources = [name for name in files.namelist() if name.endswith(".wrapper.cpp")]
        return sum(len(_CALL.findall(files.read(name))) for name in sources)
