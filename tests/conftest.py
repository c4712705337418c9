"""What all tests share: the same random numbers on every run, and tiny models of two families."""

from __future__ import annotations

import os
from pathlib import Path

# One thread: on tiny tensors more only wait for each other, on a busy machine for long. Processes that tests start too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from models import folders

torch.set_num_threads(1)
__all__ = ["folders"]  # saved tiny models of many families, made once

settings.register_profile("llmquant", deadline=None, derandomize=True, database=None)
settings.load_profile("llmquant")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random Llama with tied embeddings. Load it, so that its rotary buffers are those of any loaded model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    return _save(LlamaForCausalLM, config, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def mixtral_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random mixture of experts, untied."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    return _save(MixtralForCausalLM, config, tmp_path_factory.mktemp("mixtral"))


def _save(model_class: type, config: object, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder)
    return folder
