"""The text that models are measured on: the one CPython ships, WikiText-2, or a file of the user's own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmquant.errors import MissingDependencyError, TextError

BUILTIN = "builtin"
WIKITEXT2 = "wikitext2"


@dataclass(frozen=True)
class Text:
    """A text and its fingerprint.

    Attributes:
        name: `builtin`, `wikitext2`, or the path as the user gave it.
        content: the text, never empty, with its line ends as they are.
        sha256: hex digest of the content's UTF-8 bytes (for a file: of the file).
    """

    name: str
    content: str
    sha256: str


def load_text(name_or_path: str = BUILTIN, split: str = "test") -> Text:
    """Read a text by name (`builtin`, `wikitext2`) or from a UTF-8 file, byte for byte.

    `split` is that of WikiText-2, `test` or `train`: what is measured on the one may learn from the other. The two
    names win over files of the same name: write `./builtin` for such a file.

    Raises:
        TextError: the text is missing, empty, not UTF-8, or cannot be downloaded.
        MissingDependencyError: `wikitext2` without the `datasets` package.
    """
    named: dict[str, Callable[[], str]] = {BUILTIN: _builtin, WIKITEXT2: lambda: _wikitext2(split)}
    content = named[name_or_path]() if name_or_path in named else _file(name_or_path)
    if not content.strip():
        raise TextError("the text is empty", where=name_or_path, hint=f"a file with text in it, or `{BUILTIN}`")
    return Text(name_or_path, content, hashlib.sha256(content.encode()).hexdigest())


def _builtin() -> str:
    """CPython's own help topics: about 0.6 MB of English and code on any machine, slightly different per version."""
    from pydoc_data.topics import topics

    return "\n".join(topics[key] for key in sorted(topics))


def _wikitext2(split: str) -> str:
    """WikiText-2 raw; its rows end in newlines, so they are joined by nothing."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        hint = f"pip install llmquant[wikitext], or the text `{BUILTIN}`"
        raise MissingDependencyError("WikiText-2 needs the `datasets` package", where=WIKITEXT2, hint=hint) from error
    try:
        # The alias `wikitext` is refused by newer versions of huggingface_hub: they want a namespace.
        rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
    except Exception as error:  # the hub fails in too many types to list: HTTP, OSError, ValueError, its own
        hint = f"the text `{BUILTIN}`, which needs no download, or the path of a text file"
        raise TextError(f"WikiText-2 cannot be downloaded: {error}", where=WIKITEXT2, hint=hint) from error
    return "".join(rows["text"])


def _file(path: str) -> str:
    """The file's bytes as UTF-8, without translation of newlines."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        hint = "convert it, for example with `iconv -t UTF-8`"
        raise TextError(f"the text is not UTF-8 (byte {error.start})", where=path, hint=hint) from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = getattr(error, "strerror", None) or str(error)
        hint = f"the path of a UTF-8 text file, `{BUILTIN}` or `{WIKITEXT2}`"
        raise TextError(f"the text cannot be read: {reason}", where=path, hint=hint) from error
