"""Quantizing a checkpoint tensor by tensor, from disk to disk: the model is never loaded."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoint.checksums import in_file, write_checksums
from llmquant.checkpoint.files import ShardWriter, check_space, check_target, new_folder, no_space_errors
from llmquant.checkpoint.manifest import new_manifest, shard_metadata
from llmquant.checkpoint.source import Source, open_source
from llmquant.checkpoint.state import components, entry, expected
from llmquant.config import recipe
from llmquant.config.base import QuantConfig
from llmquant.config.candidates import Candidate
from llmquant.errors import BadWeightError, CheckpointError
from llmquant.primitives.stats import InputStats
from llmquant.quantize import (
    Plan,
    Progress,
    QuantizationReport,
    check_stats,
    make_plan,
    quantize_weight,
    report_weight,
)
from llmquant.tensor import Meta

DEFAULT_SHARD_BYTES = 2_000_000_000


def quantize_checkpoint(
    model: str | Path,
    output: str | Path,
    config: Any,
    *,
    stats: Mapping[str, InputStats] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Writes a quantized copy of a checkpoint; the folder appears when it is complete.

    Args:
        model: local folder or hub id of a plain checkpoint.
        output: the folder to make.
        config: what `quantize_` takes.
        stats: FQN of a weight -> what a calibration run saw of its inputs, as `collect_stats` gives it; static
            activations need them.
        dtype: of what stays in float, and of the model when it is loaded; None keeps the checkpoint's.
        overwrite: whether an existing output folder is replaced.
        max_shard_bytes: largest shard; about that much is held in memory.
        progress: called before each weight.

    Raises:
        ModelNotFoundError, AlreadyQuantizedError, NothingToQuantizeError, ConfigError, BadWeightError,
        CalibrationError, CheckpointError, NoSpaceError, OutputExistsError.
    """
    started = time.perf_counter()
    resolved, target = recipe.to_config(config), Path(output)
    check_target(target, overwrite)
    source = open_source(model, dtype)
    plan = make_plan(source.skeleton, resolved)
    check_stats(plan, stats)
    manifest = new_manifest(recipe.to_pairs(resolved), _entries(plan), in_file())
    check_space(target, _output_bytes(source, manifest["weights"]))
    report = QuantizationReport(skipped=plan.skipped(source.skeleton), warnings=plan.resolution.warnings)
    with new_folder(target, overwrite) as draft:
        writer = ShardWriter(draft, shard_metadata(manifest), max_shard_bytes)
        for tensors in _converted(source, plan, stats or {}, report, progress):
            writer.add(tensors)
        writer.close()
        write_checksums(draft, writer.checksums)
        _write_rest(source, manifest, draft)
    report.bytes_after = writer.total_bytes
    report.seconds = time.perf_counter() - started
    return report


def _entries(plan: Plan) -> dict[str, Any]:
    """The manifest's entry of each weight that will be quantized, known before any is read."""
    return {candidate.name: _entry(candidate, config) for candidate, config in plan.chosen}


def _entry(candidate: Candidate, config: QuantConfig) -> dict[str, Any]:
    rows, columns = candidate.shape[:-3:-1] if candidate.transposed else candidate.shape[-2:]
    spec = config.spec(rows, columns)
    meta = Meta(spec.format.name, spec.block, columns, candidate.transposed, config.activation)
    return entry(meta, candidate.shape, spec.scale_dtype, spec.asymmetric)


def _output_bytes(source: Source, entries: dict[str, Any]) -> int:
    """Bytes of the result's tensors; tied weights count once."""
    quantized = sum(
        torch.Size(shape).numel() * dtype.itemsize
        for fqn, described in entries.items()
        for dtype, shape in expected(fqn, described).values()
    )
    return quantized + sum(p.nbytes for name, p in source.skeleton.named_parameters() if name not in entries)


def _converted(
    source: Source,
    plan: Plan,
    stats: Mapping[str, InputStats],
    report: QuantizationReport,
    progress: Progress | None,
) -> Iterator[dict[str, Tensor]]:
    """The plain tensors of each weight of the result."""
    chosen = {c.name: (c, config) for c, config in plan.chosen}
    canonical = _canonical_names(source)
    total, done = sum(p.numel() for p in source.skeleton.parameters()), 0
    cast = _Cast(source)
    written: dict[str, bytes] = {}  # fingerprints of tied weights, to compare a second copy with the first
    for name, value in source.parameters():
        first = canonical.get(name, name)
        if progress:
            progress(min(done, total), total, first)
        done += value.numel()
        value = cast(first, value)
        if first in written:
            _same_or_refuse(first, canonical, written[first], value, source)
            continue
        if first in canonical.values():
            written[first] = _fingerprint(value)
        report.bytes_before += value.nbytes
        yield _one(first, value, chosen.get(first), stats.get(first), report)
    if progress:
        progress(total, total, "")


def _one(
    fqn: str,
    value: Tensor,
    found: tuple[Candidate, QuantConfig] | None,
    stats: InputStats | None,
    report: QuantizationReport,
) -> dict[str, Tensor]:
    if found is None:
        return {fqn: value}
    candidate, config = found
    try:
        quantized = quantize_weight(value.reshape(candidate.shape), config, stats, transposed=candidate.transposed)
    except BadWeightError as error:
        raise BadWeightError(error.what, where=fqn, hint=error.hint) from error
    report.quantized[fqn] = report_weight(candidate.fqns, quantized, config, value.nbytes)
    return components(fqn, quantized)


class _Cast:
    """The dtype transformers gives each tensor: the model's, but for those a model keeps in float32."""

    def __init__(self, source: Source) -> None:
        from transformers.core_model_loading import build_glob_alternation

        self.dtype = source.dtype
        plan = source.skeleton._get_dtype_plan(source.dtype)  # type: ignore[operator]
        self.kept = build_glob_alternation(list(plan))[0] if plan else None

    def __call__(self, fqn: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return value.to(torch.float32 if self.kept is not None and self.kept.search(fqn) else self.dtype)


def _canonical_names(source: Source) -> dict[str, str]:
    """Tied name -> the name its weight is stored under."""
    return dict(getattr(source.skeleton, "all_tied_weights_keys", {}))


def _fingerprint(value: Tensor) -> bytes:
    return hashlib.sha256(value.contiguous().view(torch.uint8).numpy().data).digest()


def _same_or_refuse(first: str, canonical: dict[str, str], kept: bytes, value: Tensor, source: Source) -> None:
    if kept != _fingerprint(value):
        names = ", ".join(name for name, target in canonical.items() if target == first)
        raise CheckpointError(
            f"config.json ties {names} to {first}, but the checkpoint holds different values for them",
            where=str(source.folder),
            hint='set "tie_word_embeddings": false in config.json',
        )


def _write_rest(source: Source, manifest: dict[str, Any], draft: Path) -> None:
    """config.json with the manifest, and whatever else lies beside the weights."""
    config = {k: v for k, v in source.config.items() if k != "torch_dtype"}
    config |= {"dtype": str(source.dtype).removeprefix("torch."), "quantization_config": manifest}
    with no_space_errors(draft):
        (draft / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for path in source.extras():
            shutil.copy2(path, draft / path.name)
