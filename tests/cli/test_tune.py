"""`quantize --bits`, `sensitivity` and `compare` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_commands import plain, quantized, run
from transformers import AutoModelForCausalLM

from llmquant import load_recipe
from llmquant.cli.tune_plot import place_of
from llmquant.measure.memory import weight_counts

__all__ = ["plain", "quantized"]  # fixtures

FEW = ("--calib-tokens", "512", "--schemes", "int2-g32,int4-g32,int6-g32")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMQUANT_CACHE", str(tmp_path / "cache"))


def test_a_budget_is_met_on_disk_and_told(plain: Path, tmp_path: Path) -> None:
    out, recipe, plot = tmp_path / "q", tmp_path / "r.yaml", tmp_path / "p.png"
    options = ("--bits", "4.5", *FEW, "--set", "re:.*o_proj=int8", "--save-recipe", recipe, "--plot", plot)
    status, _, err = run("quantize", plain, "-o", out, *options)
    assert status == 0, err
    totals = json.loads(run("inspect", out, "--json", "-")[1])["totals"]
    chosen = load_recipe(recipe)
    assert 4 < totals["bits_per_quantized_weight"] <= 4.5
    assert f"{totals['bits_per_quantized_weight']:.3f}" in chosen.description
    assert f"{totals['bits_per_quantized_weight']:.3f}" in err and "mixed" in err and "int2-g32" in err
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 20_000
    assert any((tmp_path / "cache").rglob("*.json"))
    again = tmp_path / "again"
    assert run("quantize", plain, "-o", again, "--recipe", recipe)[0] == 0
    one, two = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, again))
    assert weight_counts(one) == weight_counts(two)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", "1.0", *FEW), "out of reach: these schemes take [2.5"),
        (("--bits", "4.5", "--recipe", "int8"), "--set fixes single weights"),
        (("--bits", "4.5", "--schemes", "int9"), "unknown scheme"),
        (("--schemes", "int4"), "--schemes needs --bits"),
        (("--bits", "4.5", "--schemes", "int4", "--algorithm", "nonsense"), "nonsense"),
    ],
)
def test_what_cannot_be_chosen_is_explained(
    plain: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    status, _, err = run("quantize", plain, "-o", tmp_path / "q", *options)
    assert status == 2 and message in err and not (tmp_path / "q").exists()


def test_sensitivity_ranks_layers_and_checks_its_estimate(plain: Path, tmp_path: Path) -> None:
    path, plot = tmp_path / "s.json", tmp_path / "s.svg"
    options = ("--scheme", "int2-g32,int4-g32", "--tokens", "64", "--context", "32", "--json", path, "--plot", plot)
    status, out, err = run("sensitivity", plain, *options, "--top", "3")
    assert status == 0, err
    record = json.loads(path.read_text())
    assert record["method"] == "measured" and len(record["groups"]) == 14
    ranked = sorted(record["groups"], key=lambda g: -g["options"]["int2-g32"]["score"])
    assert [out.find(g["name"]) for g in ranked[:3]] == sorted(out.find(g["name"]) for g in ranked[:3])
    assert ranked[0]["name"] in out and ranked[3]["name"] not in out
    assert set(record["rank_correlation"]["fisher"]) == {"int2-g32", "int4-g32", "all"}
    assert record["rank_correlation"]["fisher"]["all"] > 0.5 and "Rank correlation" in out
    assert plot.read_text().count("<text") + plot.read_text().count("<g id") > 50


def test_compare_shows_the_layers_in_order(plain: Path, quantized: Path, tmp_path: Path) -> None:
    path, plot = tmp_path / "c.json", tmp_path / "c.png"
    status, out, err = run("compare", plain, quantized, "--tokens", "64", "--json", path, "--plot", plot)
    assert status == 0, err
    record = json.loads(path.read_text())
    assert record["tokens"] == 64 and record["unmatched"] == []
    blocks = [layer["name"] for layer in record["layers"] if layer["kind"] == "block"]
    assert blocks == ["model.layers.0", "model.layers.1"] and all(name in out for name in blocks)
    assert all(20 < layer["sqnr"] < 70 for layer in record["layers"])
    assert plot.stat().st_size > 20_000
    same = run("compare", plain, plain, "--tokens", "64", "--json", "-")
    assert all(layer["sqnr"] is None for layer in json.loads(same[1])["layers"])


def test_layers_are_drawn_by_kind_and_block() -> None:
    assert place_of("model.layers.12.mlp.{gate_proj,up_proj}") == ("mlp.{gate_proj,up_proj}", 12)
    assert place_of("lm_head") == ("lm_head", 0)
