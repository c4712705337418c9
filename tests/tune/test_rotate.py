"""Rotation: another basis of the residual stream, the same function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from extra_families import EXTRA, build
from torch import Tensor

from llmquant.errors import BadWeightError, ConfigError, UnknownArchitectureError
from llmquant.quantize import quantize_
from llmquant.tune.rotate import rotate_

TURNED = [
    *("llama", "llama-tied", "qwen2", "gpt2", "mixtral", "gpt-oss", "qwen3", "phi3", "gpt-neox", "falcon", "qwen3-moe"),
    *("deepseek-v3", "glm4-moe", "llama4", "dbrx", "jetmoe", "mamba", "qwen2-vl", "mistral", *EXTRA),
]
ENDED = ["gemma2", "gemma3", "glm4"]


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative, in the root mean square."""
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", TURNED)
def test_the_function_stays_and_the_weights_do_not(family: str) -> None:
    """In float64 but for norms, which transformers computes in float32."""
    model = build(family, torch.float64)
    before = models.logits(model)
    first = model.get_input_embeddings().weight.detach().clone()
    report = rotate_(model, "random" if "llama" in family else "hadamard", seed=2)
    assert difference(models.logits(model), before) < 1e-6
    assert difference(model.get_input_embeddings().weight.detach(), first) > 0.5
    assert report.weights >= 6 and report.norms >= 3


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "gpt2", "gpt-oss", "mixtral", "llama-72"])
def test_float32_and_again_from_disk(family: str, tmp_path: Path) -> None:
    model = build(family)
    before = models.logits(model)
    rotate_(model)
    assert difference(models.logits(model), before) < 1e-4
    model.save_pretrained(tmp_path / "rotated")
    loaded = models.load(tmp_path / "rotated")
    assert difference(models.logits(loaded), before) < 1e-4
    assert models.disk(tmp_path / "rotated").keys() >= {"lm_head.weight"}


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_a_tied_head_is_untied_and_the_report_says_what_it_costs(family: str) -> None:
    model = build(family, torch.bfloat16)
    before = sum(p.nbytes for p in model.parameters())
    report = rotate_(model)
    assert report.untied == "lm_head.weight" and not model.config.tie_word_embeddings
    assert report.bytes_added == models.VOCAB * models.HIDDEN * 2 == sum(p.nbytes for p in model.parameters()) - before
    assert "tied" in str(report)
    assert rotate_(model, seed=1).untied is None  # there is nothing left to untie


def test_norms_weigh_nothing_afterwards() -> None:
    model = build("llama")
    rotate_(model)
    assert model.model.layers[0].input_layernorm.weight.eq(1).all() and model.model.norm.weight.eq(1).all()
    gemma = build("gemma")
    rotate_(gemma)
    assert gemma.model.norm.weight.eq(0).all()  # it multiplies by 1 + weight


def test_outliers_are_spread() -> None:
    """A channel of the stream that is large everywhere is large nowhere afterwards."""
    model = build("llama")
    table = model.model.embed_tokens.weight.detach()[1:]  # the first row is padding
    table[:, 5] *= 50
    before = table.abs().amax(1) / table.square().mean(1).sqrt()
    rotate_(model)
    after = table.abs().amax(1) / table.square().mean(1).sqrt()
    assert after.mean() < 0.5 * before.mean()


def test_a_rotated_model_is_quantized_like_any_other(tmp_path: Path) -> None:
    model = build("llama-tied")
    rotate_(model)
    plain = models.logits(model)
    report = quantize_(model, "int8")
    assert not report.warnings and 1e-4 < difference(models.logits(model), plain) < 0.1
    model.save_pretrained(tmp_path / "quantized")
    assert torch.equal(models.logits(models.load(tmp_path / "quantized")), models.logits(model))


@pytest.mark.parametrize("family", ENDED)
def test_norms_behind_writers_end_it(family: str) -> None:
    model = build(family)
    _unchanged(model, UnknownArchitectureError, "post_")


@pytest.mark.parametrize(
    ("family", "damage", "error", "says"),
    [
        ("gpt2", lambda m: m.transformer.ln_f.weight[3].zero_(), BadWeightError, "ln_f"),
        ("llama", lambda m: m.model.norm.weight[3].fill_(torch.nan), BadWeightError, r"model\.norm"),
    ],
)
def test_norms_that_cannot_be_folded(family: str, damage: Any, error: type[Exception], says: str) -> None:
    model = build(family)
    with torch.no_grad():
        damage(model)
    _unchanged(model, error, says)


def test_a_kind_that_does_not_exist() -> None:
    model = build("llama")
    with pytest.raises(ConfigError, match="hadamard or random"):
        rotate_(model, "givens")  # type: ignore[arg-type]


def test_progress_counts_weights() -> None:
    steps: list[tuple[int, int]] = []
    report = rotate_(build("llama"), progress=lambda done, total, _: steps.append((done, total)))
    assert steps == [(i, report.weights) for i in range(report.weights)]


def _unchanged(model: Any, error: type[Exception], says: str) -> None:
    before = models.state(model)
    with pytest.raises(error, match=says):
        rotate_(model)
    models.assert_same(models.state(model), before)
