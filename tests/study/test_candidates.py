"""Recipes by algorithms, and budgets."""

from __future__ import annotations

from typing import Any

import pytest

from llmquant.errors import StudyError
from llmquant.study.candidates import Candidate, find_candidates
from llmquant.study.spec import parse_study


def found(**given: Any) -> tuple[list[Candidate], list[str]]:
    return find_candidates(parse_study({"models": "m", **given}, "test"))


def labels(**given: Any) -> list[str]:
    return [candidate.label for candidate in found(**given)[0]]


def test_every_recipe_meets_every_algorithm_that_its_formats_have() -> None:
    candidates, left_out = found(recipes=["int4-g64", "float8"], algorithms=["rtn", "hqq"])
    assert [c.label for c in candidates] == ["int4-g64 rtn", "int4-g64 hqq", "float8 rtn"]
    assert [c.algorithm for c in candidates] == ["rtn", "hqq", "rtn"]
    assert len(left_out) == 1 and left_out[0].startswith("float8 with hqq")


def test_a_recipe_may_have_algorithms_and_a_label_of_its_own() -> None:
    entries = ["int8", {"recipe": "int4-g64", "algorithms": ["gptq"], "label": "four"}]
    assert labels(recipes=entries, algorithms="rtn") == ["int8 rtn", "four"]
    assert labels(recipes=[{"recipe": "int4", "label": "four", "algorithms": ["rtn", "gptq"]}]) == [
        "four rtn",
        "four gptq",
    ]


def test_without_algorithms_the_recipes_say_theirs() -> None:
    (candidate,), _ = found(recipes="int4-g64")
    assert (candidate.label, candidate.recipe, candidate.algorithm) == ("int4-g64", "int4-g64", "search")


def test_scales_of_channels_come_first() -> None:
    (candidate,), _ = found(recipes="int4-g64", algorithms="awq+gptq")
    assert candidate.what.changes.migrate == "awq" and candidate.algorithm == "awq+gptq"
    assert all(config.algorithm == "gptq" for _, config in candidate.what.config.items())  # type: ignore[union-attr]


def test_budgets_choose_from_schemes_in_one_order() -> None:
    one, two = (found(bits=4.25, schemes=schemes)[0][0] for schemes in ("int4-g64,int3-g64", "int3-g64,int4-g64"))
    assert one == two and one.label == "4.25 bits" and one.recipe is None
    assert labels(bits=[4, 3.5], algorithms="search,gptq") == [
        "4 bits search",
        "4 bits gptq",
        "3.5 bits search",
        "3.5 bits gptq",
    ]


@pytest.mark.parametrize(
    "given", [{"recipes": "int4-g64", "algorithms": "awq+gptq"}, {"bits": 4.25}, {"recipes": "mixed-4-6-8"}]
)
def test_candidates_survive_the_way_to_another_process(given: dict[str, Any]) -> None:
    for candidate in found(**given)[0]:
        again = Candidate.from_dict(candidate.to_dict())
        assert again.what.config == candidate.what.config and again.what.changes == candidate.what.changes
        assert again.to_dict() == candidate.to_dict()


@pytest.mark.parametrize(
    ("given", "where", "said"),
    [
        ({"recipes": ["int8", "int9"]}, "recipes[1]", "unknown scheme"),
        ({"bits": 4, "schemes": "int4,int4"}, "bits[0]", "there twice"),
        ({"recipes": ["int8", "int8"]}, "recipes", "two candidates are called 'int8'"),
        ({"recipes": "float8", "algorithms": "hqq"}, "float8", "none of the algorithms fits"),
        ({"recipes": "int8", "algorithms": "gptq+awq"}, "int8", "cannot stand before another"),
    ],
)
def test_what_cannot_be_tried_is_named(given: dict[str, Any], where: str, said: str) -> None:
    with pytest.raises(StudyError) as caught:
        found(**given)
    assert where in str(caught.value.where) and said in caught.value.what
