"""The tokens that a model is calibrated on: windows of a text, drawn by a seed, or texts of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import CalibrationError
from llmquant.measure.text import BUILTIN, load_text
from llmquant.measure.windows import make_windows, tokenize

DEFAULT_TOKENS, DEFAULT_CONTEXT = 8192, 512


def calibration_windows(
    tokenizer: Any,
    text: str = BUILTIN,
    *,
    tokens: int = DEFAULT_TOKENS,
    context: int = DEFAULT_CONTEXT,
    seed: int = 0,
) -> Tensor:
    """Disjoint windows of a text, drawn by a seed; a short text gives fewer tokens than were asked for.

    Args:
        tokenizer: that of the model.
        text: `builtin`, `wikitext2` (here its train split: the test split is what models are measured on), or the path
            of a UTF-8 file.
        tokens: how many in all, rounded up to whole windows.
        context: tokens a window; those of a shorter text make one window.
        seed: which of the text's windows are taken.

    Returns:
        [W, context] int64, in the text's order.

    Raises:
        TextError: for a text that is missing, empty or shorter than two tokens.
        CalibrationError: for a count of tokens below 1.
    """
    if tokens < 1:
        raise CalibrationError(f"{tokens} tokens are none to calibrate on", hint="some thousand, for instance 8192")
    ids, bos = tokenize(tokenizer, load_text(text, split="train").content)
    windows = make_windows(ids, max(min(context, len(ids) + (bos is not None)), 2), None, bos)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[: -(-tokens // windows.shape[1])].sort().values]


def tokenized(tokenizer: Any, texts: Sequence[str], context: int = DEFAULT_CONTEXT) -> list[Tensor]:
    """Each text as [1, T] int64, T at most `context`, with the special tokens that the tokenizer adds by itself.

    Raises:
        CalibrationError: for a text without tokens.
    """
    found = [torch.tensor([tokenizer.encode(text)[:context]], dtype=torch.int64) for text in texts]
    for text, ids in zip(texts, found, strict=True):
        if not ids.numel():
            raise CalibrationError("a text without tokens gives nothing to calibrate on", where=repr(text))
    return found
