"""A sha256 of every tensor of a checkpoint, over its bytes as they lie in the file.

A save that holds all tensors before it writes the first has them in the manifest, which its hash covers; one that
streams knows them when it is done, and lays them into a file beside the weights (`docs/format.md`, section 5).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.documents import read_json
from llmquant.errors import CheckpointError, ChecksumError, DocumentError

FILE, ALGORITHM = "llmquant_checksums.json", "sha256"
VERSION = 1
_HEX = re.compile("[0-9a-f]{64}")


def checksum(tensor: Tensor) -> str:
    """sha256, in hexadecimal, of a tensor's bytes: row-major, little end first."""
    plain = tensor.detach().cpu().contiguous()
    return hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def in_manifest(checksums: Mapping[str, str]) -> dict[str, Any]:
    """What the manifest says where it has the checksums itself."""
    return {"algorithm": ALGORITHM, "tensors": dict(checksums)}


def in_file() -> dict[str, Any]:
    """What the manifest says where they lie in the file."""
    return {"algorithm": ALGORITHM, "file": FILE}


def write_checksums(folder: Path, checksums: Mapping[str, str]) -> None:
    """Writes the file."""
    content = {"version": VERSION, "algorithm": ALGORITHM, "tensors": dict(checksums)}
    (folder / FILE).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_checksums(folder: Path, manifest: Mapping[str, Any]) -> dict[str, str] | None:
    """Tensor -> sha256; None for a checkpoint that came before there were any.

    Raises:
        ChecksumError: for ones that are promised and missing, and for what is none.
    """
    said = manifest.get("checksums")
    if said is None and not (folder / FILE).exists():
        return None
    if isinstance(said, Mapping) and "tensors" in said:
        return _checked(said, f"{folder / 'config.json'}: quantization_config.checksums")
    where = str(folder / FILE)
    try:
        content = read_json(folder / FILE)
    except DocumentError as error:
        raise _bad(error.what, where) from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise _bad(f"their version is not {VERSION}", where)
    return _checked(content, where)


def _checked(content: Mapping[str, Any], where: str) -> dict[str, str]:
    found = content.get("tensors")
    if content.get("algorithm") != ALGORITHM or not isinstance(found, dict):
        raise _bad(f"no {ALGORITHM} for each tensor", where)
    if wrong := [key for key, text in found.items() if not isinstance(text, str) or not _HEX.fullmatch(text)]:
        raise _bad(f"that of {wrong[0]!r:.200} is no {ALGORITHM}", where)
    return found


def _bad(why: str, where: str) -> CheckpointError:
    return ChecksumError(f"the checksums cannot be read: {why}", where=where, hint="copy or save the model again")
