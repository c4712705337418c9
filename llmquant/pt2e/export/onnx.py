"""Converted graphs as ONNX files: the portable QDQ form, and one that ONNX Runtime always multiplies in int8."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from llmquant.errors import ConfigError, ExportError, MissingDependencyError
from llmquant.pt2e import _ops

OPSET = 21
FORMS = ("qdq", "integer")
_LARGEST_MESSAGE = 2**31 - 2**20  # what a protobuf file can hold, with some room


@dataclass(frozen=True)
class OnnxReport:
    """What was written.

    Attributes:
        path: the file.
        bytes: its size, that of the tensors beside it included.
        dequantized: pairs of codes and floats in it (`DequantizeLinear` nodes).
        integer: products that read codes themselves (`MatMulIntegerToFloat`); none in the QDQ form, where it is left to
            the runtime to find them.
        floating: names of the matrix products of floats that are left.
    """

    path: Path
    bytes: int
    dequantized: int
    integer: int
    floating: tuple[str, ...]


def export_onnx(
    m: fx.GraphModule,
    inputs: Sequence[Any],
    path: str | os.PathLike[str],
    form: str = "qdq",
    dynamic_shapes: Any = None,
) -> OnnxReport:
    """Writes a converted float32 graph with per-tensor activations to an ONNX file of opset 21.

    Args:
        m: what `convert_pt2e` gave, not lowered.
        inputs: what it is called with.
        path: the file; written beside it first, so that there is a whole one or none.
        form: `qdq`, Q/DQ pairs of the standard alone, which every runtime reads, and ONNX Runtime may run as floats; or
            `integer`, products of codes by ONNX Runtime's operator `com.microsoft.MatMulIntegerToFloat`, which it never
            does.
        dynamic_shapes: as in `torch.export.export`.

    Raises:
        ConfigError: for another form.
        ExportError: for graphs that ONNX cannot say: codes of seven bits, scales a token, operators without
            translation, and graphs that are not float32.
        MissingDependencyError: without onnx and onnxscript.
    """
    if form not in FORMS:
        raise ConfigError(f"no such form of an ONNX file: {form!r}", hint=" or ".join(FORMS))
    onnx = _package("onnx")
    _package("onnxscript")
    _check(m)
    proto = _translate(m, tuple(inputs), dynamic_shapes)
    if form == "integer":
        from llmquant.pt2e.export.onnx_integer import multiply_codes

        multiply_codes(proto)
    onnx.checker.check_model(proto)
    size = _save(proto, Path(path))
    return _report(proto, Path(path), size)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(f"an ONNX file needs {name}", hint="pip install 'llmquant[onnx]'") from error


def _check(m: fx.GraphModule) -> None:
    """Raises for what would become another function on the way."""
    for node in m.graph.nodes:
        if node.target in (_ops.quantize_per_token, _ops.dequantize_per_token):
            raise ExportError("an ONNX file has no scales for tokens", where=node.name, hint="a per-tensor activation")
        if "onednn" in str(node.target):
            raise ExportError("the graph is lowered already", where=node.name, hint="export what convert_pt2e gave")
        if node.target in (_ops.quantize_per_tensor, _ops.quantize_per_tensor_tensor):
            low, high, dtype = node.args[3:6]
            limits = torch.iinfo(dtype)
            if (low, high) != (limits.min, limits.max):
                raise ExportError(
                    f"codes from {low} to {high} are no whole {dtype}, which is all that QuantizeLinear knows",
                    where=node.name,
                    hint="a quantizer with reduce_range=False",
                )
    narrow = {p.dtype for p in m.parameters() if p.is_floating_point()} - {torch.float32}
    if narrow:
        raise ExportError(f"the graph computes in {narrow.pop()}", hint="model.float() before torch.export")


def _translate(m: fx.GraphModule, inputs: tuple[Any, ...], dynamic_shapes: Any) -> Any:
    with torch.no_grad(), _quiet():
        program = torch.export.export(m, inputs, dynamic_shapes=dynamic_shapes)
        try:
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=_dynamic_operators(),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(
                "torch.onnx cannot translate the graph", where=str(error.__cause__ or error).strip()[:300]
            ) from error
    assert made is not None
    proto = made.model_proto
    del proto.graph.value_info[:]  # types of the torch graph, where scales of dynamic codes are doubles
    return proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter from telling about packages that it can do without."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _dynamic_operators() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations that torch.onnx does not have: codes whose scale is made from each input."""
    from onnxscript import opset21 as op

    def choose(x: Any, quant_min: int, quant_max: int, eps: float, dtype: int) -> Any:
        _, scale, zero_point = op.DynamicQuantizeLinear(x)
        return scale, zero_point

    def quantize(x: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int, dtype: int) -> Any:
        return op.QuantizeLinear(x, scale, zero_point)

    def dequantize(
        codes: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int, dtype: int, out_dtype: int = -1
    ) -> Any:
        return op.DequantizeLinear(codes, scale, zero_point)

    return {
        _ops.choose_qparams: choose,
        _ops.quantize_per_tensor_tensor: quantize,
        _ops.dequantize_per_tensor_tensor: dequantize,
    }


def _save(proto: Any, path: Path) -> int:
    """Writes the file, with large tensors in one beside it; gives their size together."""
    onnx = _package("onnx")
    partial, tensors = path.with_name(path.name + ".partial"), path.name + ".data"
    large = proto.ByteSize() > _LARGEST_MESSAGE
    try:
        onnx.save_model(proto, str(partial), save_as_external_data=large, location=tensors)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path.stat().st_size + (path.with_name(tensors).stat().st_size if large else 0)


def _report(proto: Any, path: Path, size: int) -> OnnxReport:
    kinds = [node.op_type for node in proto.graph.node]
    floating = tuple(node.name for node in proto.graph.node if node.op_type in ("MatMul", "Gemm"))
    return OnnxReport(path, size, kinds.count("DequantizeLinear"), kinds.count("MatMulIntegerToFloat"), floating)
