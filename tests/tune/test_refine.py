"""Refinement: scales learn towards the original, codes stay, and nothing gets worse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import VOCAB, Folders, load, state, weights
from torch import Tensor, nn

from llmquant import quantize_
from llmquant.errors import CalibrationError, LlmQuantError, NothingToQuantizeError
from llmquant.measure.evaluate import evaluate
from llmquant.measure.reference import Reference
from llmquant.tune.refine import RefineReport, refine_


def windows(count: int = 12, length: int = 16) -> Tensor:
    return torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def teacher(folders: Folders) -> Any:
    """With weights so large that quantizing them shows."""
    return louder(load(folders("llama")))


def louder(model: Any) -> Any:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.0 if p.dim() < 2 else 3.0)
    return model


def student(folders: Folders, scheme: str = "int3-g32") -> Any:
    model = louder(load(folders("llama")))
    quantize_(model, scheme)
    return model


def refined(model: nn.Module, teacher: Any, **options: Any) -> RefineReport:
    return refine_(model, teacher, windows(), **{"steps": 16, "lr": 3e-3, "held_out": 4, **options})


@pytest.mark.parametrize("scheme", ["int3-g32", "int4-g32-asym", "int2-row", "float8", "nf4-single"])
def test_what_it_reports_is_what_evaluation_finds(folders: Folders, teacher: Any, scheme: str) -> None:
    model = student(folders, scheme)
    codes = {name: w.qdata.clone() for name, w in weights(model)}
    dtypes = {name: w.scale.dtype for name, w in weights(model)}
    report = refined(model, teacher)
    assert 0.3 * report.kl_before < report.kl_after < report.kl_before and report.best_step > 0
    assert all(torch.equal(w.qdata, codes[name]) and w.scale.dtype == dtypes[name] for name, w in weights(model))
    assert not any(w.scale.requires_grad for _, w in weights(model))
    held = windows()[-4:]
    padded = torch.cat([held, held[:, :1]], dim=1)  # the last position is scored only if something follows
    with Reference.compute(teacher, padded) as reference:
        found = evaluate(model, padded, reference).kl
    assert found is not None and found.mean == pytest.approx(report.kl_after, rel=1e-3)


def test_a_reference_teaches_as_the_model_does(folders: Folders, teacher: Any) -> None:
    first, second = student(folders), student(folders)
    teacher = copy.deepcopy(teacher).bfloat16()  # logits of 16 bits, which a reference keeps as they are
    with Reference.compute(teacher, windows()) as reference:
        refined(first, reference)
    refined(second, teacher)
    assert state(first) == state(second)


def test_nothing_is_kept_that_is_worse_than_the_start(folders: Folders, teacher: Any) -> None:
    model = student(folders, "int8")
    before = state(model)
    report = refined(model, teacher, lr=0.5, steps=3)
    assert report.best_step == 0 and report.kl_after == report.kl_before
    assert min(kl for _, kl in report.history[1:]) > report.kl_before
    assert state(model) == before


def test_an_interruption_leaves_the_model_as_it_was(folders: Folders, teacher: Any) -> None:
    def interrupt(done: int, total: int) -> None:
        assert total == 16
        if done == 5:
            raise KeyboardInterrupt

    model = student(folders).train()
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        refined(model, teacher, progress=interrupt)
    assert state(model) == before and model.training
    assert not any(w.scale.requires_grad for _, w in weights(model))


def test_scales_of_one_byte_stay_and_are_reported(folders: Folders, teacher: Any) -> None:
    model = louder(load(folders("llama")))
    quantize_(model, {"re:.*mlp.*": "mxfp4", "_default": "int3-g32"})
    report = refined(model, teacher, steps=2)
    assert report.kept and all("mlp" in name and "float8_e8m0fnu" in why for name, why in report.kept.items())
    assert report.trained and not any("mlp" in name for name in report.trained)


def test_what_cannot_be_refined_is_refused(folders: Folders, teacher: Any) -> None:
    other = load(folders("gpt2"))
    other.lm_head = nn.Linear(64, 7)
    with pytest.raises(NothingToQuantizeError, match="not quantized"):
        refined(load(folders("llama")), teacher)
    model = student(folders)
    before = state(model)
    with pytest.raises(CalibrationError, match="one to judge by"):
        refine_(model, teacher, windows(1))
    with pytest.raises(LlmQuantError, match="differ in shape"):
        refined(model, other)
    with Reference.compute(teacher, windows(3)) as reference, pytest.raises(CalibrationError, match="other windows"):
        refined(model, reference)
    assert state(model) == before
