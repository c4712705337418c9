"""What a finished thing is known by: a hash of all that its figures depend on, and of nothing else.

Names, paths, labels and the order in which a study lists things are not in it; a file that changes by one byte, another
context or another version of torch is. A key of something is made of the keys of what it came from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmquant.errors import ModelNotFoundError
from llmquant.measure import record

STUDY_SCHEMA = 1
"""Changes when a study's own figures change their meaning; `measure.record.SCHEMA` does so for measurements."""

_MODEL_FILES = (
    *("*.safetensors", "*.bin", "*.index.json", "config.json", "tokenizer*", "special_tokens_map.json"),
    *("added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*.py"),
)


def content_key(kind: str, **parts: Any) -> str:
    """Hex of a hash over plain JSON; the order of keys does not matter."""
    words = json.dumps([STUDY_SCHEMA, record.SCHEMA, kind, parts], sort_keys=True, allow_nan=False)
    return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()


def versions() -> dict[str, str]:
    """Of the packages that decide about numbers."""
    return {name: version for name, version in record.versions().items() if name != "python"}


class Digests:
    """Hashes of files, remembered by path, size and time of the last change.

    Args:
        known: what an earlier `known` held.

    Attributes:
        known: path -> [size, mtime in ns, hex], plain JSON.
    """

    def __init__(self, known: Mapping[str, Any] | None = None) -> None:
        self.known: dict[str, Any] = dict(known or {})

    def __call__(self, path: Path) -> str:
        """The hash of a file's bytes."""
        path = path.resolve()
        stat = path.stat()
        mark = [stat.st_size, stat.st_mtime_ns]
        found = self.known.get(str(path))
        if not (isinstance(found, list) and found[:2] == mark):
            found = self.known[str(path)] = [*mark, digest_file(path)]
        return str(found[2])


def digest_file(path: Path) -> str:
    """Hex blake2b of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def model_files(folder: Path) -> list[Path]:
    """The files of a model that its figures depend on: weights, config, tokenizer, code."""
    found = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
    if not found:
        raise ModelNotFoundError("the folder holds no model", where=str(folder))
    return found


def model_key(folder: Path, digests: Digests) -> str:
    """Of a model: the bytes of its files, by their names within the folder."""
    return content_key("model", files={path.name: digests(path) for path in model_files(folder)})


def folder_key(folder: Path, digests: Digests) -> str:
    """Of a folder of tasks: every file below it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    return content_key("folder", files={str(path.relative_to(folder)): digests(path) for path in files})


def reference_key(model: str, text: str, context: int, windows: int, dtype: str, threads: int) -> str:
    """Of a reference's logits: the model, the text's SHA-256, the windows, the dtype it computes in.

    Sums of floats depend on how many threads share them, so their number counts.
    """
    asked: dict[str, Any] = {"context": context, "windows": windows, "dtype": dtype, "threads": threads}
    return content_key("reference", model=model, text=text, versions=versions(), **asked)


def quantized_key(
    model: str,
    weights: Mapping[str, Any],
    changes: Mapping[str, Any],
    calibration: Mapping[str, Any] | None = None,
    budget: Mapping[str, Any] | None = None,
    threads: int | None = None,
) -> str:
    """Of a quantized model.

    Args:
        model: key of the plain one.
        weights: FQN -> config; for a budget, what is assumed before it has chosen.
        changes: what is done to the plain model first.
        calibration: SHA-256 of the text that is read, tokens, seed; None where nothing is read.
        budget: bits, schemes and algorithm.
        threads: only of a run of the model, whose sums depend on them; None where nothing is read.
    """
    asked: dict[str, Any] = {"weights": weights, "changes": changes, "calibration": calibration, "budget": budget}
    return content_key("quantized", model=model, threads=threads, versions=versions(), **asked)


def quality_key(quantized: str, reference: str, dtype: str) -> str:
    """Of a cell: which model, against which reference (whose key has the text, the windows and the threads)."""
    return content_key("quality", quantized=quantized, reference=reference, dtype=dtype)


def noise_key(reference: str) -> str:
    """Of a noise floor."""
    return content_key("noise", reference=reference)


def tasks_key(model: str, names: Mapping[str, Any], dtype: str, threads: int) -> str:
    """Of tasks on a model, plain or quantized; `names` says which tasks and how much of them."""
    return content_key("tasks", model=model, asked=names, dtype=dtype, threads=threads, versions=versions())


def performance_key(model: str, plain: str, asked: Mapping[str, Any], threads: int) -> str:
    """Of sizes and speed, which are those of this machine."""
    machine = {k: v for k, v in record.machine().items() if k != "torch_threads"}
    return content_key(
        "performance", model=model, plain=plain, asked=asked, machine=machine, threads=threads, versions=versions()
    )
