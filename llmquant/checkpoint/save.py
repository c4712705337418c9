"""Saving a model that lies in memory, so that the folder appears whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmquant.checkpoint.files import check_space, make_readable, new_folder, no_space_errors


def save(model: Any, path: str | Path, *, overwrite: bool = False, extras: Iterable[Path] = (), **kwargs: Any) -> Path:
    """`model.save_pretrained` into a sibling folder that is renamed to `path` when it is complete.

    Args:
        model: a transformers model, quantized or not.
        path: the folder to make.
        overwrite: whether an existing folder is replaced (files of it that are no model files go too).
        extras: files to lay beside the weights, for instance those of the tokenizer.
        **kwargs: for `save_pretrained`, for instance `max_shard_size="2GB"`.

    Raises:
        OutputExistsError, NoSpaceError.
    """
    target = Path(path)
    check_space(target, sum(p.nbytes for p in model.parameters()))
    with new_folder(target, overwrite) as draft:
        model.save_pretrained(draft, **kwargs)
        for shard in draft.glob("*.safetensors"):
            make_readable(shard)
        with no_space_errors(draft):
            for extra in extras:
                if not (draft / extra.name).exists():
                    shutil.copy2(extra, draft / extra.name)
    return target
