"""From text to the token windows that a model is scored on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import TextError


def tokenize(tokenizer: Any, text: str) -> tuple[list[int], int | None]:
    """Encode the whole text at once, without special tokens.

    Returns:
        The ids, and the id of BOS if this tokenizer puts one in front of a text by itself, else None.
    """
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)  # not verbose: no warning about the length
    return list(ids), _automatic_bos(tokenizer)


def _automatic_bos(tokenizer: Any) -> int | None:
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and list(tokenizer.encode("a"))[:1] == [bos] else None


def make_windows(
    token_ids: Sequence[int] | Tensor, context: int, windows: int | None = None, bos: int | None = None
) -> Tensor:
    """Cut a text into disjoint windows of `context` tokens; a last partial window is dropped.

    Args:
        token_ids: the text's ids, [N].
        context: tokens per window, at least 2, for the first of each is never scored.
        windows: how many to take from the start; None, or more than there are, takes all.
        bos: id to put first in each window, which then holds `context - 1` tokens of text.

    Returns:
        [W, context] int64, W >= 1.

    Raises:
        TextError: fewer tokens than one window, or a `context` or `windows` that leaves nothing to score.
    """
    ids = torch.as_tensor(token_ids, dtype=torch.int64)
    stride = context if bos is None else context - 1
    _check_request(len(ids), context, windows, stride)
    count = min(len(ids) // stride, len(ids) if windows is None else windows)
    body = ids[: count * stride].view(count, stride)
    return body.clone() if bos is None else torch.cat([body.new_full((count, 1), bos), body], dim=1)


def _check_request(tokens: int, context: int, windows: int | None, stride: int) -> None:
    if context < 2:
        raise TextError(f"a context of {context} tokens has nothing to score", hint="--context 2 or more")
    if windows is not None and windows < 1:
        raise TextError(f"{windows} windows have nothing to score", hint="--windows 1 or more")
    if tokens < stride:
        what = f"the text has {tokens} tokens, fewer than one window of {context}"
        raise TextError(what, hint="a longer text or a smaller --context")


def tokens_scored(windows: Tensor) -> int:
    """Tokens of windows [W, T] that have a context to be predicted from: all but the first of each."""
    return windows.shape[0] * (windows.shape[1] - 1)
