"""Recipes: every shipped one works on two families, and what is misspelt is refused with a suggestion."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from models import Folders, load, quantize

from llmquant.config.base import QuantConfig
from llmquant.config.fqn import FqnToConfig
from llmquant.config.named import Int4WeightOnlyConfig
from llmquant.config.recipe import (
    ROTATIONS,
    Recipe,
    list_recipes,
    load_recipe,
    parse_recipe,
    recipe_folder,
    to_config,
    to_pairs,
    to_recipe,
    with_algorithm,
)
from llmquant.config.schemes import parse_scheme
from llmquant.errors import ConfigError
from llmquant.tensor import QuantizedTensor
from llmquant.tune.orthogonal import Kind

SHIPPED = [recipe.name for recipe in list_recipes()]

GOOD = """
llmquant_recipe: 1
description: a test
algorithm: rtn
weights:
  _embedding: int8
  '?re:.*[.]down_proj': {format: int6, group_size: 32, mapping_type: asymmetric}
  'model.layers.0.self_attn.q_proj': none
  'model.layers.0.self_attn.k_proj':
  _default: int4-g64
"""


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# --- shipped recipes --------------------------------------------------------------------------------------


def test_there_are_recipes() -> None:
    assert {"int4-g32", "int8", "float8"} <= set(SHIPPED)
    assert sorted(SHIPPED) == SHIPPED == sorted(path.stem for path in recipe_folder().glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_complete(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description and "_default" in dict(recipe.config.items())
    assert to_config(name) == recipe.config == to_config(recipe)
    assert to_config(to_pairs(recipe.config)) == recipe.config
    if not name.startswith("mixed"):
        assert dict(recipe.config.items())["_default"] == parse_scheme(name)  # the name of a scheme means the scheme


@pytest.mark.parametrize("family", ["llama-tied", "mixtral"])
@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_applies(name: str, family: str, folders: Folders) -> None:
    model = load(folders(family))
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    report = quantize(model, name)
    assert tied == (model.lm_head.weight is model.model.embed_tokens.weight) == (family == "llama-tied")
    wide = {n for n, p in model.named_parameters() if p.dim() >= 2}
    assert set(report.quantized) | set(report.skipped) >= wide and not report.warnings
    assert any("q_proj" in n for n in report.quantized)
    for fqn, found in report.quantized.items():
        assert isinstance(model.get_parameter(fqn), QuantizedTensor)
        assert parse_scheme(found.scheme).format == model.get_parameter(fqn).meta.format
    assert report.bytes_after < 0.75 * report.bytes_before
    with torch.inference_mode():
        assert model(torch.arange(8)[None]).logits.isfinite().all()


# --- parsing ----------------------------------------------------------------------------------------------


def test_a_recipe_means_what_it_says(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    rtn = {"algorithm": "rtn"}
    expected = {
        "_embedding": {"format": "int8", **rtn},
        "?re:.*[.]down_proj": {"format": "int6", "group_size": 32, "mapping_type": "asymmetric", **rtn},
        "model.layers.0.self_attn.q_proj": None,
        "model.layers.0.self_attn.k_proj": None,
        "_default": {"format": "int4", "group_size": 64, **rtn},
    }
    assert recipe.name == "mine" and recipe.description == "a test"
    assert recipe.config == to_config(expected)
    assert list(dict(recipe.config.items())) == list(expected)  # the order decides


def test_a_recipe_can_name_activations(tmp_path: Path) -> None:
    text = """
llmquant_recipe: 1
algorithm: rtn
weights:
  _head: a8-token-asym-int8
  _default: {format: int4, activation: {dtype: int8, group: 64, asymmetric: false}}
"""
    config = load_recipe(write(tmp_path, text)).config
    assert {key: value.scheme for key, value in config.items()} == {
        "_head": "a8-token-asym-int8",
        "_default": "a8-g64-int4",
    }
    assert {value.algorithm for _, value in config.items()} == {"rtn"}
    assert to_config(to_pairs(config)) == config


@pytest.mark.parametrize("kind", ["path", "text", "mapping", "recipe", "config"])
def test_to_config_takes_what_users_have(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    recipe = load_recipe(path)
    source: dict[str, Any] = {
        "path": path,
        "text": str(path),
        "mapping": dict(recipe.config.items()),
        "recipe": recipe,
        "config": recipe.config,
    }
    assert to_config(source[kind]) == recipe.config


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("int4-g64-asym", {"_default": parse_scheme("int4-g64-asym")}),
        ("none", {"_default": None}),
        (None, {"_default": None}),
        (Int4WeightOnlyConfig(64), {"_default": parse_scheme("int4-g64")}),
        ({"_head": "int8", "_default": None}, {"_head": parse_scheme("int8"), "_default": None}),
        ({"_default": {"format": "int3", "group_size": 32}}, {"_default": parse_scheme("int3-g32")}),
        ("a8-token-int4-g64", {"_default": parse_scheme("a8-token-int4-g64")}),
        (parse_scheme("a8-float8"), {"_default": parse_scheme("a8-float8")}),
        (
            {"_head": "a8-asym-int8", "_default": "int8"},
            {"_head": parse_scheme("a8-asym-int8"), "_default": parse_scheme("int8")},
        ),
        ({"_default": Int4WeightOnlyConfig()}, {"_default": parse_scheme("int4")}),
    ],
    ids=str,
)
def test_to_config_of_schemes_configs_and_mappings(source: Any, expected: dict[str, QuantConfig | None]) -> None:
    found = to_config(source)
    assert isinstance(found, FqnToConfig) and found == FqnToConfig(expected)
    assert to_config(to_pairs(found)) == found


def test_another_algorithm_where_there_is_one() -> None:
    config = to_config({"_embedding": "float8", "_head": None, "_default": "int4"})
    found = dict(with_algorithm(config, "rtn").items())
    assert found["_default"].algorithm == "rtn" and found["_head"] is None and found["_embedding"].algorithm == "rtn"
    with pytest.raises(ConfigError, match="search"):
        with_algorithm(to_config("float8"), "search")


@pytest.mark.parametrize("key", ["rotate: hadamard", "algorithm: awq", "algorithm: smoothquant+rtn"])
def test_what_a_recipe_does_to_the_plain_model_is_not_forgotten(tmp_path: Path, key: str) -> None:
    path = write(tmp_path, f"llmquant_recipe: 1\n{key}\nweights: {{_default: int4-g32}}")
    recipe = load_recipe(path)
    assert recipe.changes and to_recipe(str(path)) == recipe == to_recipe(recipe)
    for source in (path, recipe):
        with pytest.raises(ConfigError, match="changes the plain model first") as caught:
            to_config(source)
        assert str(recipe.changes) in str(caught.value)
    assert to_config(recipe.config) is recipe.config


def test_rotations_are_those_that_exist() -> None:
    assert get_args(Kind) == ROTATIONS


# --- errors -----------------------------------------------------------------------------------------------

BAD_RECIPES = {
    "a list": ("- 1", "mapping"),
    "nothing": ("", "mapping"),
    "no YAML": ("a: [", "cannot read"),
    "no version": ("weights: {_default: int4}", "llmquant_recipe: 1"),
    "another version": ("llmquant_recipe: 2\nweights: {_default: int4}", "version 1"),
    "misspelt key": ("llmquant_recipe: 1\nweight: {_default: int4}", "did you mean weights"),
    "misspelt algorithm key": ("llmquant_recipe: 1\nalgoritm: rtn\nweights: {_default: int4}", "algorithm"),
    "no weights": ("llmquant_recipe: 1", "weights"),
    "empty weights": ("llmquant_recipe: 1\nweights: {}", "weights"),
    "a number as scheme": ("llmquant_recipe: 1\nweights: {_default: 4}", "_default"),
    "misspelt scheme": ("llmquant_recipe: 1\nweights: {_head: int8, _default: itn4}", "key '_default'"),
    "misspelt field": ("llmquant_recipe: 1\nweights: {_default: {format: int4, group: 3}}", "group_size"),
    "misspelt reserved key": ("llmquant_recipe: 1\nweights: {_embeding: int4}", "_embedding"),
    "unknown algorithm": ("llmquant_recipe: 1\nalgorithm: magic\nweights: {_default: int4}", "magic"),
    "algorithms in a wrong order": ("llmquant_recipe: 1\nalgorithm: gptq+awq\nweights: {_default: int4}", "awq+gptq"),
    "unknown rotation": ("llmquant_recipe: 1\nrotate: givens\nweights: {_default: int4}", "hadamard or random"),
    "bad pattern": ("llmquant_recipe: 1\nweights: {'re:(': int4}", "re:("),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_bad_recipes_say_what_is_wrong(name: str, tmp_path: Path) -> None:
    text, expected = BAD_RECIPES[name]
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, text))
    assert expected in str(caught.value)


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "llmquant_recipe: 1\nweights: {_default: itn4}")
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        load_recipe(path)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        load_recipe(path)


@pytest.mark.parametrize("source", ["no-such-recipe.yaml", Path("no-such-recipe"), "itn4-g64"])
def test_what_does_not_exist_is_refused(source: Any) -> None:
    with pytest.raises(ConfigError, match=r"no-such-recipe|int4"):
        to_config(source)


def test_parse_recipe_is_pure() -> None:
    content = {"llmquant_recipe": 1, "weights": {"_default": "int4"}}
    assert parse_recipe(content, "x", "here") == Recipe("x", "", to_config("int4"))
    assert content == {"llmquant_recipe": 1, "weights": {"_default": "int4"}}
