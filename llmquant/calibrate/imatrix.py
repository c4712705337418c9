"""Importance matrices on disk: what a run saw of the inputs of each column, to be used again.

A safetensors file: for each weight its FQN with the mean squares, float32 [in] or [experts, in].
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llmquant.checkpoint.files import no_space_errors
from llmquant.checkpoint.header import read_header
from llmquant.errors import CalibrationError, CheckpointError
from llmquant.primitives.stats import InputStats
from llmquant.quantize import Plan
from llmquant.quantize.plan import is_embedding

_MARK, _VERSION = "llmquant_imatrix", "1"


def save_imatrix(stats: Mapping[str, InputStats], path: str | Path, about: Mapping[str, str] | None = None) -> None:
    """Writes the mean squares in statistics to a file, which appears whole or not at all.

    Args:
        stats: FQN -> statistics; those without mean squares are left out.
        path: the file.
        about: what the reader should know, for instance the text.

    Raises:
        NoSpaceError: for a full disk.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: s.mean_square.float().contiguous() for name, s in stats.items() if s.mean_square is not None}
    draft = target.with_name(target.name + ".part")
    with no_space_errors(target.parent):
        save_file(tensors, draft, metadata={**(about or {}), _MARK: _VERSION})
        os.replace(draft, target)


def load_imatrix(path: str | Path, plan: Plan | None = None) -> dict[str, InputStats]:
    """FQN -> statistics with mean squares.

    Args:
        path: a file of `save_imatrix`.
        plan: what it is to serve; every weight that is multiplied must be there, with as many columns.

    Raises:
        CalibrationError: for a file that is none, or of another model.
    """
    try:
        header = read_header(Path(path))
    except CheckpointError as error:
        raise CalibrationError(f"cannot read the importance matrix: {error.what}", where=str(path)) from error
    if header.metadata.get(_MARK) != _VERSION:
        raise CalibrationError(
            "not an importance matrix of this version", where=str(path), hint="delete it to gather it anew"
        )
    for name, (dtype, shape) in header.tensors.items():
        if dtype != torch.float32 or len(shape) not in (1, 2):
            raise _no_squares(name, f"{dtype} {shape}", path)
    found = {name: InputStats(mean_square=values) for name, values in sorted(load_file(path).items())}
    for name, stats in found.items():
        if not (stats.mean_square >= 0).all() or not stats.mean_square.isfinite().all():  # type: ignore[union-attr, operator]
            raise _no_squares(name, "negative or not finite", path)
    if plan is not None:
        _check_fit(found, plan, str(path))
    return found


def _no_squares(name: str, why: str, path: str | Path) -> CalibrationError:
    return CalibrationError(
        f"{name} is no list of mean squares: {why}", where=str(path), hint="delete it to gather it anew"
    )


def _check_fit(found: Mapping[str, InputStats], plan: Plan, where: str) -> None:
    for candidate, _ in plan.chosen:
        if is_embedding(candidate):
            continue
        columns = candidate.shape[-2] if candidate.transposed else candidate.shape[-1]
        own = found.get(candidate.name)
        if own is None or own.mean_square is None or own.mean_square.shape[-1] != columns:
            what = "lacks" if own is None else "has another width for"
            raise CalibrationError(
                f"the importance matrix {what} {candidate.name}",
                where=where,
                hint="it may be that of another model; delete it to gather it anew",
            )
