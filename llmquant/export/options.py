"""What a user can ask of an export."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmquant.checkpoint.stream import DEFAULT_SHARD_BYTES
from llmquant.errors import ConfigError

REFUSE, ROUND, REQUANTIZE, DEQUANTIZE = "refuse", "round-scales", "requantize", "dequantize"
MISFITS = (REFUSE, ROUND, REQUANTIZE, DEQUANTIZE)


@dataclass(frozen=True)
class Options:
    """How to export.

    Attributes:
        misfits: what becomes of weights that the other format cannot hold exactly: `refuse` (the default) names them
            and writes nothing; `round-scales` keeps the codes and rounds scales where only these do not fit;
            `requantize` (GGUF only) chooses new codes of the nearest type; `dequantize` writes them in 16 or 32 bits.
            The last two leave weights alone that fit.
        dtype: of what is not quantized there; None keeps the checkpoint's.
        max_shard_bytes: largest file of a folder.
        pre_tokenizer: GGUF only: llama.cpp's name of the rule that cuts text into words, where it cannot be told from
            the tokenizer.
    """

    misfits: str = REFUSE
    dtype: torch.dtype | None = None
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    pre_tokenizer: str | None = None

    def __post_init__(self) -> None:
        if self.misfits not in MISFITS:
            raise ConfigError(f"unknown way with misfits: {self.misfits!r}", hint=f"one of {', '.join(MISFITS)}")
