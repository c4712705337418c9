"""tokenizer.json as llama.cpp keeps it: byte-level BPE, and BPE with bytes as a fallback (SentencePiece's)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmquant.errors import ExportError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_PATTERNS = {_LLAMA3: "llama-bpe", _QWEN2: "qwen2"}


def write_tokenizer(writer: Any, folder: Path, config: Any, pre_tokenizer: str | None = None) -> str:
    """Writes the tokenizer of a folder. Returns what a user should know, or nothing.

    Args:
        writer: a `gguf.GGUFWriter`.
        folder: with tokenizer.json; without one the file takes and gives numbers of tokens only.
        config: transformers' config, for the size of the vocabulary and the special tokens.
        pre_tokenizer: llama.cpp's name for how text is cut into words, if it is not to be found out.

    Raises:
        ExportError: for a kind of tokenizer that llama.cpp has no counterpart of.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        writer.add_tokenizer_model("none")
        return "there is no tokenizer.json: the file takes and gives numbers of tokens, no text"
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content["model"]
    if model.get("type") != "BPE":
        raise ExportError(f"a tokenizer of the kind {model.get('type')!r} is not exported", where=str(path))
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(_scores(content, config.vocab_size))
        writer.add_add_space_prefix(_prefixes_space(content))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer or find_pre_tokenizer(content, path))
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    tokens, types = tokens_of(content, config.vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _write_special(writer, folder, config, path)
    return ""


def tokens_of(content: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Texts and ggml types of all tokens by number; numbers that the tokenizer lacks get unused ones."""
    import gguf

    kinds = gguf.TokenType
    by_number = {number: text for text, number in content["model"]["vocab"].items()}
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    size = max(size, *(number + 1 for number in (*by_number, *added)))
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [int(kinds.UNUSED)] * size
    for number, text in by_number.items():
        tokens[number], types[number] = text, int(kinds.BYTE if _is_byte(text, content) else kinds.NORMAL)
    for number, token in added.items():
        tokens[number] = token["content"]
        types[number] = int(kinds.CONTROL if token.get("special") else kinds.USER_DEFINED)
    unknown = content["model"].get("unk_token")
    if content["model"].get("byte_fallback") and unknown in tokens:
        types[tokens.index(unknown)] = int(kinds.UNKNOWN)
    return tokens, types


def find_pre_tokenizer(content: Mapping[str, Any], path: Path) -> str:
    """llama.cpp's name for how text is cut into words. Raises `ExportError` where it cannot be told."""
    found = content.get("pre_tokenizer") or {}
    parts = found.get("pretokenizers", [found])
    match [part.get("type") for part in parts]:
        case ["ByteLevel"] if parts[0].get("use_regex", True):
            return "gpt-2"
        case ["Digits", "ByteLevel"] if parts[0].get("individual_digits") and parts[1].get("use_regex", True):
            return "smollm"
        case ["Split", "ByteLevel"] if not parts[1].get("use_regex", True):
            name = _PATTERNS.get(str(parts[0].get("pattern", {}).get("Regex")))
            if name:
                return name
    raise ExportError(
        "it is not known how llama.cpp calls this way to cut text into words",
        where=f"{path}: pre_tokenizer",
        hint="--pre-tokenizer NAME, a name of llama.cpp's llama-vocab.cpp (for instance tekken)",
    )


def _is_byte(text: str, content: Mapping[str, Any]) -> bool:
    return bool(content["model"].get("byte_fallback")) and len(text) == 6 and text.startswith("<0x")


def _scores(content: Mapping[str, Any], size: int) -> list[float]:
    """SentencePiece joins the pair with the best score first; so a token's score is that of its first merge."""
    model = content["model"]
    rank: dict[str, int] = {}
    for number, merge in enumerate(model["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        rank.setdefault(left + right, number)
    tokens, _ = tokens_of(content, size)
    return [-float(rank.get(text, len(rank))) for text in tokens]


def _prefixes_space(content: Mapping[str, Any]) -> bool:
    """Whether a text gets a space in front."""
    words = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    return '"Prepend"' in words or '"prepend_scheme": "first"' in words or '"prepend_scheme": "always"' in words


def _write_special(writer: Any, folder: Path, config: Any, path: Path) -> None:
    """Numbers of special tokens, which of them a text gets, and the template of chats."""
    from tokenizers import Tokenizer

    numbers = {kind: _first(getattr(config, f"{kind}_token_id", None)) for kind in ("bos", "eos", "pad", "unk")}
    for kind, number in numbers.items():
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    ids = Tokenizer.from_file(str(path)).encode("a").ids
    writer.add_add_bos_token(bool(ids) and ids[0] == numbers["bos"])
    writer.add_add_eos_token(bool(ids) and ids[-1] == numbers["eos"])
    if template := _chat_template(folder):
        writer.add_chat_template(template)


def _first(value: Any) -> int | None:
    return value[0] if isinstance(value, list) else value


def _chat_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    found = json.loads(settings.read_text(encoding="utf-8")).get("chat_template") if settings.is_file() else None
    return found if isinstance(found, str) else None
