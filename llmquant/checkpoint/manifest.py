"""The manifest: the `quantization_config` object of config.json, bound to every shard by its hash."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import llmquant
from llmquant.checkpoint.files import Header, read_header
from llmquant.checkpoint.state import expected
from llmquant.errors import CheckpointError

METHOD = "llmquant"
FORMAT_VERSION = 1
HASH_KEY, SAVE_KEY = "llmquant_manifest_sha256", "llmquant_save_id"


def new_manifest(config: Sequence[Any], entries: Mapping[str, Any], save_id: str | None = None) -> dict[str, Any]:
    """A manifest with a save id of its own.

    Args:
        config: the `FqnToConfig` as pairs of plain JSON, for people to read; loading does not need it.
        entries: FQN -> entry (see `state.entry`).
        save_id: None draws one. Two saves that share it must hold the same bits.
    """
    return {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "llmquant_version": llmquant.__version__,
        "save_id": save_id or uuid.uuid4().hex,
        "config": list(config),
        "weights": dict(entries),
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
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint has format version {version}, llmquant {llmquant.__version__} reads {FORMAT_VERSION}",
            where=where,
            hint="pip install --upgrade llmquant",
        )


def verify(manifest: Mapping[str, Any], files: Iterable[str | Path]) -> None:
    """Raises `CheckpointError` if shards are truncated, of another save, or miss a component of a weight."""
    paths = [Path(f) for f in files]
    check_version(manifest, str(paths[0].parent) if paths else "config.json")
    headers = {path: read_header(path) for path in paths}
    for path, header in headers.items():
        _verify_save(manifest, path, header)
    present = {key: header.tensors[key] for header in headers.values() for key in header.tensors}
    for fqn, described in _weights(manifest).items():
        for key, promised in expected(fqn, described).items():
            _verify_component(key, promised, present, paths)


def _weights(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    weights = manifest.get("weights")
    if not isinstance(weights, Mapping):
        raise CheckpointError("the manifest lists no weights", where="config.json", hint="save the model again")
    return weights


def _verify_save(manifest: Mapping[str, Any], path: Path, header: Header) -> None:
    if header.metadata.get(HASH_KEY) == digest(manifest):
        return
    other = header.metadata.get(SAVE_KEY)
    raise CheckpointError(
        f"this shard belongs to {f'another save ({other})' if other else 'a model that llmquant did not write'}, "
        f"config.json to save {manifest.get('save_id')}",
        where=str(path),
        hint="a save was interrupted, files of two saves lie here, or config.json was edited: save to a new folder",
    )


def _verify_component(key: str, promised: tuple[Any, Any], present: Mapping[str, Any], files: list[Path]) -> None:
    where = str(files[0].parent) if files else None
    if key not in present:
        raise CheckpointError(
            f"the checkpoint lacks {key}", where=where, hint="a shard is missing: save or copy it again"
        )
    if present[key] != promised:
        raise CheckpointError(f"{key} is {present[key]}, config.json promises {promised}", where=where)
