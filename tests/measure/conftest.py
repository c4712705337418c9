"""A tiny random Llama and windows for it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from models import VOCAB, build
from torch import Tensor, nn
from transformers import PreTrainedModel

CONTEXT = 24

MakeModel = Callable[..., PreTrainedModel]


class Fixed(nn.Module):
    """Predicts the same logits [V] everywhere and remembers how it was called."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.row = nn.Parameter(logits)
        self.calls: list[dict[str, object]] = []

    def forward(self, ids: Tensor, **options: object) -> SimpleNamespace:
        self.calls.append(options | {"training": self.training, "inference": torch.is_inference_mode_enabled()})
        return SimpleNamespace(logits=self.row.expand(*ids.shape, -1))


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """Models by seed, with weights so wide that predictions are far from uniform."""

    def make(seed: int, dtype: torch.dtype = torch.float32, **overrides: object) -> PreTrainedModel:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.2}
        # No padding token: its row is zeros, which a norm turns into anything under the smallest noise.
        return build("llama", dtype, seed, **{**sizes, "pad_token_id": None, **overrides})

    return make


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(VOCAB, (5, CONTEXT), generator=torch.Generator().manual_seed(0))
