"""A tiny random model with a tokenizer of bytes, a short text, and an engine without processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmquant.study.job import Job, Outcome
from llmquant.study.run import Sweep, run_study
from llmquant.study.spec import Study, parse_study
from llmquant.study.worker import run


def write_model(folder: Path, seed: int = 0) -> Path:
    """A Llama of two layers in bfloat16."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=260, tie_word_embeddings=True)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("What is measured once need not be measured again, unless a byte of it changed. " * 8)
    return path


MakeStudy = Callable[..., Study]


@pytest.fixture
def make_study(plain: Path, text: Path) -> MakeStudy:
    """A study of the tiny model; what is given replaces what is usual here."""
    usual = {"models": str(plain), "texts": str(text), "context": 32, "windows": 2, "metrics": "quality,layers"}
    return lambda **given: parse_study({**usual, "recipes": "int8", **given}, "test")


class Inline:
    """Runs jobs in this process when they are asked for, and remembers them."""

    slots = 1

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.stopped = 0

    def submit(self, job: Job) -> None:
        self.jobs.append(job)

    def next(self) -> Outcome:
        job = self.jobs[-1]
        return Outcome(job, **run(job))

    def stop(self) -> None:
        self.stopped += 1

    def count(self, kind: str) -> int:
        return sum(job.kind == kind for job in self.jobs)


def sweep(study: Study, out: Path, engine: Any = None, **options: Any) -> tuple[Sweep, Any]:
    """A study run by an `Inline`, and that."""
    engine = engine or Inline()
    return run_study(study, out, engine=lambda log, progress: engine, threads=1, **options), engine
