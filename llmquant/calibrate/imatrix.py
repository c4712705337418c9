"""Importance matrices on disk: what a run saw of the inputs of each column, to be used again.

A safetensors file: for each weight its FQN with the mean squares, float32 [in] or [experts, in].
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from llmquant.checkpoint.files import no_space_errors
from llmquant.errors import CalibrationError
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
        with safe_open(path, framework="pt") as file:
            version = (file.metadata() or {}).get(_MARK)
            found = {name: InputStats(mean_square=file.get_tensor(name)) for name in sorted(file.keys())}
    except Exception as error:  # of safetensors, in many types
        raise CalibrationError(f"cannot read the importance matrix: {error}", where=str(path)) from error
    if version != _VERSION:
        raise CalibrationError(
            "not an importance matrix of this version", where=str(path), hint="delete it to gather it anew"
        )
    if plan is not None:
        _check_fit(found, plan, str(path))
    return found


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
