"""`export_checkpoint`: from a quantized folder to another program's format."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

from llmquant.checkpoint.files import check_target, new_folder, no_space_errors
from llmquant.errors import ConfigError, OutputExistsError
from llmquant.export.folder import QuantizedFolder, open_quantized
from llmquant.export.options import Options
from llmquant.export.report import ExportReport
from llmquant.quantize import Progress

TARGETS = {
    "compressed-tensors": "llmquant.export.compressed_tensors",
    "gguf": "llmquant.export.gguf",
    "torchao": "llmquant.export.torchao",
    "hf16": "llmquant.export.hf16",
}
"""Target -> the module that writes it."""


class Writer(Protocol):
    """What the module of a target offers."""

    def write(
        self, source: QuantizedFolder, draft: Path, options: Options, report: ExportReport, progress: Progress | None
    ) -> None:
        """Fills an empty folder and the report. Refuses what the target cannot hold before it writes anything."""


def export_checkpoint(
    folder: str | Path,
    to: str,
    output: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> ExportReport:
    """Writes a quantized checkpoint in another program's format; the output appears when it is complete.

    Args:
        folder: a folder or hub id of what llmquant quantized.
        to: `compressed-tensors` (transformers, vLLM), `gguf` (llama.cpp), `torchao`, or `hf16`: a plain checkpoint.
        output: the folder to make; of `gguf` a file, if its name ends in `.gguf`.
        overwrite: whether an existing output is replaced.
        progress: called before each weight.
        **options: `misfits`, `dtype`, `max_shard_bytes` and `pre_tokenizer` of `Options`.

    Returns:
        What became of each weight.

    Raises:
        ExportError: for weights, tokenizers and architectures that the target cannot hold.
        MissingDependencyError: for a package that the target needs.
        ModelNotFoundError, CheckpointError, ConfigError, OutputExistsError, NoSpaceError.
    """
    if to not in TARGETS:
        raise ConfigError(f"unknown target {to!r}", hint=f"one of {', '.join(TARGETS)}")
    started, asked, target = time.perf_counter(), Options(**options), Path(output)
    check_output(target, overwrite)
    writer = cast(Writer, importlib.import_module(TARGETS[to]))
    report = ExportReport(to)
    with new_output(target, overwrite) as draft:
        writer.write(open_quantized(folder), draft, asked, report, progress)
        report.bytes = sum(p.stat().st_size for p in draft.iterdir() if p.suffix in (".safetensors", ".gguf"))
    report.seconds = time.perf_counter() - started
    return report


def check_output(target: Path, overwrite: bool) -> None:
    """Raises `OutputExistsError` for an output that exists and may not be replaced."""
    if target.suffix != ".gguf":
        check_target(target, overwrite)
    elif target.is_dir() or (target.exists() and not overwrite):
        raise OutputExistsError("the output exists already", where=str(target), hint="another -o, or --overwrite")


@contextlib.contextmanager
def new_output(target: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to fill that becomes `target` when the block ends well, or whose one `.gguf` file does."""
    if target.suffix != ".gguf":
        with new_folder(target, overwrite) as draft:
            yield draft
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.parent / f".{target.name}.draft-{uuid.uuid4().hex[:8]}"
    draft.mkdir()
    try:
        with no_space_errors(draft):
            yield draft
        check_output(target, overwrite)  # it may have appeared meanwhile
        os.replace(next(draft.glob("*.gguf")), target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
