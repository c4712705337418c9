"""The manifest: the `quantization_config` object of config.json, bound to every shard by its hash."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import llmquant
from llmquant.checkpoint.header import LONGEST_NAME, MOST_TENSORS, Header, read_header
from llmquant.checkpoint.index import check_once
from llmquant.checkpoint.state import expected
from llmquant.errors import CheckpointError, ManifestError

METHOD = "llmquant"
FORMAT_VERSION = 1
HASH_KEY, SAVE_KEY = "llmquant_manifest_sha256", "llmquant_save_id"


Component = tuple[torch.dtype | None, tuple[int, ...]]
"""Dtype and shape of one tensor."""


def new_manifest(
    config: Sequence[Any],
    entries: Mapping[str, Any],
    save_id: str | None = None,
    checksums: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A manifest with a save id of its own.

    Args:
        config: the `FqnToConfig` as pairs of plain JSON, for people to read; loading does not need it.
        entries: FQN -> entry (see `state.entry`).
        save_id: None draws one. Two saves that share it must hold the same bits.
        checksums: where the checksums of the tensors are (see `checksums`).
    """
    return {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "llmquant_version": llmquant.__version__,
        "save_id": save_id or uuid.uuid4().hex,
        "config": list(config),
        "weights": dict(entries),
        **({"checksums": dict(checksums)} if checksums is not None else {}),
    }


def digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of the manifest as JSON with sorted keys and no spaces."""
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def shard_metadata(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What every shard of a save carries in its header."""
    return {"format": "pt", HASH_KEY: digest(manifest), SAVE_KEY: str(manifest["save_id"])}


def check_version(manifest: Mapping[str, Any], where: str) -> None:
    """Raises `CheckpointError` for a manifest that this version cannot read."""
    version = manifest.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        own = f"llmquant {llmquant.__version__} reads {FORMAT_VERSION}"
        raise CheckpointError(
            f"the checkpoint has format version {version!r:.100}, {own}",
            where=where,
            hint="pip install --upgrade llmquant",
        )


def verify(manifest: Mapping[str, Any], files: Iterable[str | Path]) -> None:
    """Raises `CheckpointError` if shards are truncated, of another save, or miss a component of a weight."""
    verify_headers(manifest, {Path(file): read_header(Path(file)) for file in files})


def verify_headers(manifest: Mapping[str, Any], headers: Mapping[Path, Header]) -> None:
    """The same from headers that are read already."""
    promised = promises(manifest, where=str(next(iter(headers)).parent) if headers else "config.json")
    check_once(headers)
    for path, header in headers.items():
        check_save(manifest, path, header)
    present = {key: header.tensors[key] for header in headers.values() for key in header.tensors}
    for key, component in promised.items():
        check_component(key, component, present, headers)


def promises(manifest: Mapping[str, Any], where: str = "config.json") -> dict[str, Component]:
    """Dtype and shape of every component of every weight, by checkpoint key: all that a manifest says of the files.

    Raises:
        ManifestError: for a manifest that says something impossible, or two things of one tensor.
        CheckpointError: for one of another version.
    """
    check_version(manifest, where)
    found: dict[str, Component] = {}
    for fqn, described in _weights(manifest).items():
        for key, component in expected(fqn, described).items():
            if key in found:
                raise ManifestError(f"two weights of the manifest lay claim to {key}", where=fqn)
            found[key] = component
    return found


def _weights(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    weights = manifest.get("weights")
    if not isinstance(weights, Mapping):
        raise ManifestError("the manifest lists no weights", where="config.json", hint="save the model again")
    if len(weights) > MOST_TENSORS:
        raise ManifestError(f"the manifest lists more than {MOST_TENSORS:,} weights", where="config.json")
    for fqn in weights:
        if not isinstance(fqn, str) or not fqn or not fqn.isprintable() or len(fqn) > LONGEST_NAME:
            raise ManifestError(f"{fqn!r:.200} is no name of a weight", where="config.json")
    return weights


def check_save(manifest: Mapping[str, Any], path: Path, header: Header) -> None:
    """Raises `CheckpointError` if a shard is not of the save that the manifest is of."""
    if header.metadata.get(HASH_KEY) == digest(manifest):
        return
    other = header.metadata.get(SAVE_KEY)
    raise CheckpointError(
        f"this shard belongs to {f'another save ({other:.100})' if other else 'a model that llmquant did not write'}, "
        f"config.json to save {manifest.get('save_id')!s:.100}",
        where=str(path),
        hint="a save was interrupted, files of two saves lie here, or config.json was edited: save to a new folder",
    )


def check_component(key: str, promised: Component, present: Mapping[str, Component], files: Iterable[Path]) -> None:
    """Raises `CheckpointError` if a component is missing, or of another dtype or shape."""
    where = next((str(path.parent) for path in files), None)
    if key not in present:
        raise CheckpointError(
            f"the checkpoint lacks {key}", where=where, hint="a shard is missing: save or copy it again"
        )
    if present[key] != promised:
        raise CheckpointError(f"{key} is {present[key]}, config.json promises {promised}", where=where)
