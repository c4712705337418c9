"""A GGUF file for llama.cpp, with our codes in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmquant.checkpoint.files import check_space
from llmquant.errors import ExportError, MissingDependencyError
from llmquant.export.compressed_tensors import refuse
from llmquant.export.folder import QuantizedFolder
from llmquant.export.gguf_model import Architecture, find_architecture, notes, write_sizes
from llmquant.export.gguf_tokenizer import write_tokenizer
from llmquant.export.gguf_types import BLOCK, Blocks, Misfit, to_blocks
from llmquant.export.options import DEQUANTIZE, REFUSE, REQUANTIZE, Options
from llmquant.export.report import DEQUANTIZED, EXACT, PLAIN, REQUANTIZED, ROUNDED, Exported, ExportReport
from llmquant.quantize import Progress
from llmquant.tensor import QuantizedTensor

_FLOATS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
_ROPE_FACTORS = "rope_freqs.weight"


def write(
    source: QuantizedFolder, draft: Path, options: Options, report: ExportReport, progress: Progress | None
) -> None:
    """Chooses a type for each weight, refuses what has none, then writes the file, a weight in memory at a time."""
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError("GGUF needs the package gguf", hint='pip install "llmquant[export]"') from error
    architecture = find_architecture(source.skeleton.config)
    job = _Job(source, architecture, options, report, _names(source, architecture))
    total = 2 * len(source.names)
    for done, fqn in enumerate(source.names):
        if progress:
            progress(done, total, fqn)
        job.look(fqn)
    refuse(job.reasons, options if options.misfits != REQUANTIZE else Options(DEQUANTIZE))
    report.warnings += notes(architecture)
    name = source.folder.resolve().name
    writer = gguf.GGUFWriter(draft / f"{name}.gguf", architecture.name)
    write_sizes(writer, architecture, name)
    note = write_tokenizer(writer, source.folder, architecture.config, options.pre_tokenizer)
    report.warnings += [note] if note else []
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(job.file_type())
    factors = architecture.rope_factors()
    check_space(draft, sum(size for _, _, size in job.plan.values()))
    for fqn, (kind, shape, size) in job.plan.items():
        _announce(writer, job.names[fqn], kind, shape, size)
    if factors is not None:
        _announce(writer, _ROPE_FACTORS, "F32", factors.shape, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, fqn in enumerate(job.plan, len(source.names)):
        if progress:
            progress(done, total, fqn)
        writer.write_tensor_data(job.data(fqn))
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    writer.close()
    if progress:
        progress(total, total, "")


def _announce(writer: Any, name: str, kind: str, shape: tuple[int, ...], size: int) -> None:
    import gguf

    writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=gguf.GGMLQuantizationType[kind])


def _names(source: QuantizedFolder, architecture: Architecture) -> dict[str, str]:
    """FQN -> llama.cpp's name. Raises `ExportError` for a parameter that its architecture lacks."""
    import gguf

    arch = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[architecture.name]
    table = gguf.get_tensor_name_map(arch, architecture.config.num_hidden_layers)
    names = {fqn: table.get_name(fqn, try_suffixes=(".weight", ".bias")) for fqn in source.names}
    if lost := [fqn for fqn, name in names.items() if name is None]:
        raise ExportError(f"llama.cpp's {architecture.name} has no such parameter", where=", ".join(lost[:5]))
    return {fqn: str(name) for fqn, name in names.items()}


@dataclass
class _Job:
    """What becomes of each weight, found in a first pass, so that the file's head can be written before its data."""

    source: QuantizedFolder
    architecture: Architecture
    options: Options
    report: ExportReport
    names: dict[str, str]
    plan: dict[str, tuple[str, tuple[int, ...], int]] = field(default_factory=dict)
    """FQN -> type, shape, bytes."""
    reasons: dict[str, str] = field(default_factory=dict)

    def look(self, fqn: str) -> None:
        """Chooses a weight's type and reports it."""
        value = self.source.read(fqn)
        if isinstance(value, QuantizedTensor):
            try:
                blocks = self._blocks(fqn, value)
            except Misfit as error:
                self._other(fqn, value, str(error))
                return
            how = Exported(EXACT, blocks.kind)
            if blocks.rounded:
                reason = f"scales are float16 there, which changes them by up to {blocks.rounded:.0e} of their size"
                how = Exported(ROUNDED, blocks.kind, reason)
            self._add(fqn, blocks.kind, value, blocks.data.nbytes, how)
            return
        self._plain(fqn, value, Exported(PLAIN, self._float_kind(value)))

    def data(self, fqn: str) -> np.ndarray:
        """A weight as it stands in the file."""
        value, kind = self.source.read(fqn), self.plan[fqn][0]
        if isinstance(value, QuantizedTensor) and fqn not in self.reasons:
            return self._blocks(fqn, value).data
        plain = self._ordered(fqn, self.source.plain(fqn, value, torch.float32))
        if kind == "F32":
            return plain.numpy()
        if kind in ("F16", "BF16"):
            dtype = {name: dtype for dtype, name in _FLOATS.items()}[kind]
            return plain.to(dtype).view(torch.int16).numpy()
        return self._requantized(plain, kind)

    def file_type(self) -> int:
        """ggml's number for a file that is mostly of one type."""
        import gguf

        kinds = [kind for kind, shape, _ in self.plan.values() if len(shape) > 1]
        most = max(sorted(set(kinds)), key=kinds.count)
        names = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}
        return int(gguf.LlamaFileType[names.get(most, f"MOSTLY_{most}")])

    def _blocks(self, fqn: str, value: QuantizedTensor) -> Blocks:
        order = self.architecture.order(fqn, value.shape[0])
        return to_blocks(value, order, round_scales=self.options.misfits not in (REFUSE, DEQUANTIZE))

    def _other(self, fqn: str, value: QuantizedTensor, reason: str) -> None:
        """What becomes of a weight that no type holds: new codes, or floats."""
        self.reasons[fqn] = reason
        if self.options.misfits == REQUANTIZE and value.shape[1] % BLOCK == 0:
            kind = "Q4_1" if value.format.bits <= 4 else "Q5_1" if value.format.bits == 5 else "Q8_0"
            self._add(fqn, kind, value, _bytes(kind, value.numel()), Exported(REQUANTIZED, kind, reason))
            return
        self._plain(fqn, value, Exported(DEQUANTIZED, self._float_kind(value), reason))

    def _plain(self, fqn: str, value: Tensor, how: Exported) -> None:
        size = value.numel() * (4 if how.format == "F32" else 2)
        self._add(fqn, how.format, value, size, how)

    def _add(self, fqn: str, kind: str, value: Tensor, size: int, how: Exported) -> None:
        self.plan[fqn] = kind, tuple(value.shape), size
        self.report.weights[fqn] = how

    def _float_kind(self, value: Tensor) -> str:
        """llama.cpp wants vectors in float32."""
        return "F32" if value.dim() < 2 else _FLOATS[self.options.dtype or value.dtype]

    def _ordered(self, fqn: str, value: Tensor) -> Tensor:
        order = self.architecture.order(fqn, value.shape[0])
        return (value if order is None else value[order]).contiguous()

    def _requantized(self, plain: Tensor, kind: str) -> np.ndarray:
        import gguf

        return gguf.quants.quantize(plain.numpy(), gguf.GGMLQuantizationType[kind])


def _bytes(kind: str, elements: int) -> int:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return elements // block * size
