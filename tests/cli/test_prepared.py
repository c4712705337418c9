"""`llmquant quantize` with --rotate, awq and smoothquant: as the same calls in Python, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
import torch
from test_commands import plain, run  # noqa: F401  (plain is a fixture)

import llmquant
from llmquant.config.recipe import split_algorithm
from llmquant.errors import ConfigError
from llmquant.integrations.loading import load_tokenizer

CALIB = ("--calib", "builtin", "--calib-tokens", 512)


@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_rotated_and_quantized_as_in_python(plain: Path, tmp_path: Path, kind: str) -> None:  # noqa: F811
    before = models.disk(plain)
    status, _, told = run(
        *("quantize", plain, "-o", tmp_path / "q", "--recipe", "int8", "--algorithm", "rtn"),
        *("--rotate", kind, "--rotate-seed", 3, "--json", tmp_path / "r.json"),
    )
    assert status == 0, told
    assert "residual stream of 64 channels rotated" in told
    model = models.load(plain)
    llmquant.rotate_(model, kind, 3)  # type: ignore[arg-type]
    llmquant.quantize_(model, models.rtn("int8"))
    assert torch.equal(models.logits(models.load(tmp_path / "q")), models.logits(model))
    assert json.loads((tmp_path / "r.json").read_text())["rotation"]["hidden"] == 64
    assert (tmp_path / "q" / "tokenizer.json").exists() and [p.name for p in tmp_path.glob(".*")] == []
    models.assert_same(models.disk(plain), before)


@pytest.mark.parametrize("scales", ["awq", "smoothquant"])
def test_scaled_and_quantized_as_in_python(plain: Path, tmp_path: Path, scales: str) -> None:  # noqa: F811
    text = tmp_path / "text.txt"
    text.write_text("What a model reads, it remembers. " * 40)
    status, _, told = run(
        *("quantize", plain, "-o", tmp_path / "q", "--recipe", "int3-g32", "--algorithm", f"{scales}+rtn"),
        *("--calib", text, "--calib-tokens", 600, "--json", tmp_path / "r.json", "--seed", 1),
    )
    assert status == 0, told
    model, config = models.load(plain), models.rtn("int3-g32")
    windows = {"tokenizer": load_tokenizer(plain), "tokens": 600, "seed": 1}
    if scales == "awq":
        llmquant.awq_(model, config, str(text), **windows)
    else:
        llmquant.smoothquant_(model, str(text), **windows)
    llmquant.quantize_(model, config)
    assert torch.equal(models.logits(models.load(tmp_path / "q")), models.logits(model))
    assert json.loads((tmp_path / "r.json").read_text())["migration"]["scaled"]
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_all_together_with_gptq(plain: Path, tmp_path: Path) -> None:  # noqa: F811
    options = ("--recipe", "int4-g32", "--algorithm", "awq+gptq", "--rotate", "hadamard", "--calib-tokens", "512")
    status, out, told = run("quantize", plain, "-o", tmp_path / "q", *options)
    assert status == 0, told
    assert "gptq" in out and "rotated" in told and "channels of 8 sources scaled" in told
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q"]
    error = models.logits(models.load(tmp_path / "q")) - models.logits(models.load(plain))
    assert 0 < error.norm() / models.logits(models.load(plain)).norm() < 0.5


def test_a_recipe_says_what_options_say(plain: Path, tmp_path: Path) -> None:  # noqa: F811
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("llmquant_recipe: 1\nalgorithm: awq+rtn\nrotate: random\nweights: {_default: int4-g32}")
    runs = {
        "by-recipe": ("--recipe", recipe),
        "by-options": ("--recipe", "int4-g32", "--algorithm", "awq+rtn", "--rotate", "random"),
        "awq-replaced": ("--recipe", recipe, "--algorithm", "rtn"),
    }
    found = {}
    for name, options in runs.items():
        reading = () if name == "awq-replaced" else CALIB
        status, _, told = run("quantize", plain, "-o", tmp_path / name, *options, *reading)
        assert status == 0, told
        found[name] = models.logits(models.load(tmp_path / name))
    assert torch.equal(found["by-recipe"], found["by-options"])
    assert not torch.equal(found["by-recipe"], found["awq-replaced"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rotate", "givens"], "there is no rotation 'givens'"),
        (["--algorithm", "gptq+awq"], "cannot stand before another"),
        (["--algorithm", "awq+none"], "none"),
        (["--rotate", "random", "--set", "no.such.weight=int8"], "no.such.weight"),
        (["--rotate", "random", "--calib", "builtin"], "nothing here needs --calib"),
    ],
)
def test_what_cannot_be_is_said_and_leaves_nothing(
    plain: Path,  # noqa: F811
    tmp_path: Path,
    options: list[str],
    message: str,
) -> None:
    status, _, told = run("quantize", plain, "-o", tmp_path / "q", "--recipe", "int8", *options)
    assert status == 2 and message in " ".join(told.split())
    assert not list(tmp_path.iterdir())


def test_an_unknown_architecture_cannot_be_rotated(tmp_path: Path) -> None:
    folder = models.save("gemma2", tmp_path / "plain")
    status, _, told = run("quantize", folder, "-o", tmp_path / "q", "--recipe", "int8", "--rotate", "hadamard")
    assert status == 2 and "post_attention_layernorm" in told
    assert [p.name for p in tmp_path.iterdir()] == ["plain"]


def test_an_importance_matrix_of_another_basis_is_warned_of(plain: Path, tmp_path: Path) -> None:  # noqa: F811
    options = ("--recipe", "int4-g32", "--imatrix", tmp_path / "i", "--calib-tokens", "512", "--rotate", "hadamard")
    told = [run("quantize", plain, "-o", tmp_path / name, *options)[2] for name in "ab"]
    assert "must come from a run with the same" not in told[0] and "must come from a run with the same" in told[1]


def test_names_of_algorithms() -> None:
    assert split_algorithm(None) == (None, None) and split_algorithm("gptq") == (None, "gptq")
    assert split_algorithm("awq") == ("awq", None) and split_algorithm("smoothquant+rtn") == ("smoothquant", "rtn")
    with pytest.raises(ConfigError):
        split_algorithm("rtn+search")
