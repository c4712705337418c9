"""A tiny random Llama and windows for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, CONTEXT = 128, 24

MakeModel = Callable[..., LlamaForCausalLM]


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """Models by seed; `spread` widens the weights so that predictions are far from uniform."""

    def make(
        seed: int, dtype: torch.dtype = torch.float32, spread: float = 0.2, **overrides: object
    ) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
        heads = dict(num_attention_heads=4, num_key_value_heads=2)
        config = LlamaConfig(**{**sizes, **heads, "initializer_range": spread, **overrides})
        return LlamaForCausalLM(config).to(dtype)

    return make


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(VOCAB, (5, CONTEXT), generator=torch.Generator().manual_seed(0))
