"""Another library's quantized checkpoint as one of ours, tensor by tensor, from disk to disk."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmquant.checkpoint.checksums import in_file, write_checksums
from llmquant.checkpoint.files import check_space, check_target, new_folder, no_space_errors
from llmquant.checkpoint.manifest import new_manifest, shard_metadata
from llmquant.checkpoint.shards import GrowingShards
from llmquant.checkpoint.source import extras
from llmquant.checkpoint.state import components, describe
from llmquant.config.base import QuantConfig
from llmquant.config.schemes import parse_scheme
from llmquant.errors import CheckpointError
from llmquant.foreign.detect import LEGACY
from llmquant.foreign.report import ImportedWeight, ImportReport, worst
from llmquant.foreign.source import Asked, Opened, kept_names, open_foreign
from llmquant.foreign.spec import Reader, Taken
from llmquant.quantize import Progress
from llmquant.tensor import QuantizedTensor

DEFAULT_SHARD_BYTES = 2_000_000_000


class Planned(NamedTuple):
    """One tensor of the result before its values are read: `keys` of the plain checkpoint that it is made of."""

    keys: tuple[str, ...]
    sketch: Tensor


def import_checkpoint(
    model: str | Path,
    output: str | Path,
    *,
    requantize: str | QuantConfig | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
    readers: tuple[Reader, ...] | None = None,
) -> ImportReport:
    """Writes a quantized checkpoint of another library as one of llmquant; the folder appears when it is complete.

    Codes are taken over as they are, without going through 16 bits. What is not quantized is copied.

    Args:
        model: local folder or hub id.
        output: the folder to make.
        requantize: a scheme or config for weights that no format holds (they are refused without it); the scheme
            `none` leaves them plain.
        dtype: of the model when it is loaded; None keeps the checkpoint's.
        overwrite: whether an existing output folder is replaced.
        max_shard_bytes: largest shard; about that much is held in memory.
        progress: called before each tensor.
        readers: what is looked for; None is `llmquant.foreign.READERS`.

    Raises:
        ModelNotFoundError, AlreadyQuantizedError, ConfigError, BadWeightError, NoSpaceError, OutputExistsError.
        CheckpointError: for a checkpoint of an unknown kind, tensors that do not fit each other or their config, and
            weights that no format of ours holds.
    """
    from llmquant.foreign import READERS

    started, target = time.perf_counter(), Path(output)
    asked = _asked(requantize)
    check_target(target, overwrite)
    opened = open_foreign(model, READERS if readers is None else readers, asked, dtype)
    plan = make_plan(opened)
    entries = {fqn: describe(p.sketch) for fqn, p in plan.items() if isinstance(p.sketch, QuantizedTensor)}
    manifest = new_manifest([], entries, checksums=in_file())
    report = _report(opened, plan)
    check_space(target, report.bytes_after)
    with new_folder(target, overwrite) as draft:
        writer = GrowingShards(draft, shard_metadata(manifest), max_shard_bytes)
        for tensors in _converted(opened, plan, progress):
            writer.add(tensors)
        writer.close()
        write_checksums(draft, writer.digests)
        _write_rest(opened, manifest, draft)
    report.bytes_after, report.seconds = writer.total_bytes, time.perf_counter() - started
    return report


def make_plan(opened: Opened) -> dict[str, Planned]:
    """FQN -> what each tensor of the result will be. Reads no values, and refuses what cannot be taken over."""
    read: list[str] = []
    source = opened.source(sketch=True, on_read=read.append)
    tied = dict(getattr(source.skeleton, "all_tied_weights_keys", {}))
    plan: dict[str, Planned] = {}
    keys: tuple[str, ...] = ()
    for name, sketch in source.parameters():
        keys = tuple(read) or keys  # several parameters may come of the same keys
        read.clear()
        first = tied.get(name, name)
        if first in plan and isinstance(sketch, QuantizedTensor) | isinstance(plan[first].sketch, QuantizedTensor):
            raise _differing(first, tied, opened)
        plan.setdefault(first, Planned(keys, sketch))
    _check_left_out(opened, {key for planned in plan.values() for key in planned.keys})
    return plan


def _asked(requantize: str | QuantConfig | None) -> Asked:
    if requantize is None:
        return Asked()
    return Asked(True, parse_scheme(requantize) if isinstance(requantize, str) else requantize)


def _check_left_out(opened: Opened, used: set[str]) -> None:
    """Refuses to leave out a bias that is not zero: some writers add zeros where a model has no bias."""
    modules = {name.removesuffix(".weight") for name in opened.weights}
    for key in opened.store:
        module, _, part = key.rpartition(".")
        if part == "bias" and module in modules and key not in used and bool(opened.store.read(key).any()):
            raise CheckpointError("the model has no such bias, and it is not zero", where=key)


def _converted(opened: Opened, plan: dict[str, Planned], progress: Progress | None) -> Iterator[dict[str, Tensor]]:
    """The tensors of each weight of the result."""
    source = opened.source(sketch=False)
    tied = dict(getattr(source.skeleton, "all_tied_weights_keys", {}))
    written: dict[str, bytes] = {}  # fingerprints of tied tensors, to compare a second copy with the first
    total, done = sum(p.sketch.numel() for p in plan.values()), 0
    for name, value in source.parameters():
        first = tied.get(name, name)
        if progress:
            progress(min(done, total), total, first)
        if first in written:
            if _fingerprint(value) != written[first]:
                raise _differing(first, tied, opened)
            continue
        if first in tied.values() and not isinstance(value, QuantizedTensor):
            written[first] = _fingerprint(value)
        done += value.numel()
        yield components(first, value) if isinstance(value, QuantizedTensor) else {first: value}
    if progress:
        progress(total, total, "")


def _fingerprint(value: Tensor) -> bytes:
    return hashlib.sha256(value.contiguous().view(torch.uint8).numpy().data).digest()


def _differing(first: str, tied: dict[str, str], opened: Opened) -> CheckpointError:
    names = ", ".join(name for name, target in tied.items() if target == first)
    return CheckpointError(
        f"config.json ties {names} to {first}, but the checkpoint holds different values for them",
        where=str(opened.folder),
        hint='set "tie_word_embeddings": false in config.json',
    )


def _report(opened: Opened, plan: dict[str, Planned]) -> ImportReport:
    """All that is known before values are read."""
    report = ImportReport(opened.reader.name)
    for fqn, planned in plan.items():
        before = sum(map(opened.bytes_of, planned.keys))
        after = sum(t.nbytes for t in _pieces(planned.sketch))
        report.bytes_before += before
        report.bytes_after += after
        found = [opened.weights[key] for key in planned.keys if key in opened.weights]
        if not found:
            report.copied.append(fqn)
            continue
        notes = "; ".join(dict.fromkeys(weight.note for weight in found if weight.note))
        taken = worst(weight.taken for weight in found)
        shape = tuple(planned.sketch.shape)
        report.weights[fqn] = ImportedWeight(shape, _scheme(planned.sketch), taken, notes, before, after)
    used = {key for planned in plan.values() for key in planned.keys}
    report.left_out = [key for key in kept_names(opened) if key not in used]
    report.warnings = tuple(_warnings(opened, report))
    return report


def _warnings(opened: Opened, report: ImportReport) -> Iterator[str]:
    yield from opened.reader.warnings(opened.settings)
    if report.left_out:
        shown = ", ".join(report.left_out[:3]) + (", ..." if len(report.left_out) > 3 else "")
        yield f"{len(report.left_out)} tensors belong to no parameter of the model and are left out: {shown}"
    again = [fqn for fqn, weight in report.weights.items() if weight.taken is Taken.requantized]
    if again:
        yield f"{len(again)} weights had to be decoded: {report.weights[again[0]].note}"


def _pieces(tensor: Tensor) -> list[Tensor]:
    return [t for _, t in tensor.parts()] if isinstance(tensor, QuantizedTensor) else [tensor]


def _scheme(tensor: Tensor) -> str:
    """Format, block and scales in words: `int4 1x64 float16 + zero`."""
    if not isinstance(tensor, QuantizedTensor):
        return str(tensor.dtype).removeprefix("torch.")
    scale = str(tensor.scale_dtype).removeprefix("torch.") + (" + zero" if tensor.zero_point is not None else "")
    return f"{tensor.meta.format} {'x'.join(map(str, tensor.meta.block))} {scale}"


def _write_rest(opened: Opened, manifest: dict[str, Any], draft: Path) -> None:
    """config.json with the manifest, and whatever else lies beside the weights."""
    config = {key: value for key, value in opened.config.items() if key != "torch_dtype"}
    config |= {"dtype": str(opened.dtype).removeprefix("torch."), "quantization_config": manifest}
    with no_space_errors(draft):
        (draft / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for path in extras(opened.folder):
            if path.name not in LEGACY:
                shutil.copy2(path, draft / path.name)
