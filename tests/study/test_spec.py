"""What a study may say: the file and the command line agree, and every mistake is told with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmquant.cli.sweep import build_study
from llmquant.errors import StudyError
from llmquant.study.spec import Study, load_study, parse_study

YAML = """
name: small
models: [one, two]
recipes: [int8, int4-g64]
bits: [4.25, 3]
schemes: [int3-g64, int4-g64]
algorithms: [search, gptq]
texts: [builtin]
context: 512
windows: 4
calibration: {text: train.txt, tokens: 1000, seed: 3}
"""


def test_a_file_and_options_give_the_same_study(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(YAML)
    options: dict[str, Any] = dict(
        recipes="int8,int4-g64", bits="4.25,3", schemes="int3-g64, int4-g64", texts="builtin"
    )
    options |= dict(algorithms="search,gptq", context=512, windows=4, name="small")
    by_options = build_study(["one", "two"], options, {"text": "train.txt", "tokens": 1000, "seed": 3})
    assert by_options == load_study(path)
    assert by_options.bits == (4.25, 3.0) and by_options.calibration.seed == 3


def test_options_change_what_a_file_says(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(YAML)
    study = build_study([str(path)], {"texts": "a.txt,b.txt"}, {"text": None, "tokens": 5, "seed": None})
    assert study.texts == ("a.txt", "b.txt") and study.context == 512
    assert study.calibration.model_dump() == {"text": "train.txt", "tokens": 5, "seed": 3}


def test_a_study_without_a_name_is_called_like_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("models: m\nrecipes: int8\n")
    study = load_study(path)
    assert study.name == "mine" and study.models == ("m",)
    assert study.measures("quality") and study.measures("speed") and not study.measures("tasks")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"recipies": "int8"}, ["recipies: unknown key", "did you mean recipes"]),
        ({"calibration": {"tokns": 3}}, ["calibration.tokns: unknown key", "did you mean tokens"]),
        ({"recipes": ["int8", {"recipe": "int4", "algoritms": "gptq"}]}, ["recipes[1].algoritms", "algorithms?"]),
        ({"metrics": ["quality", "beauty"]}, ["metrics[1]", "'quality'", "not 'beauty'"]),
        ({"dtype": "int8"}, ["dtype", "'bfloat16'", "not 'int8'"]),
        ({"context": 1}, ["context", "greater than or equal to 2", "not 1"]),
        ({"bits": [4, -1]}, ["bits[1]", "greater than 0", "not -1"]),
        ({"models": []}, ["models", "at least 1 item"]),
        ({"recipes": []}, ["nothing to try"]),
        ({"schemes": "int4"}, ["there are no bits"]),
        ({"metrics": "tasks"}, ["needs tasks"]),
        ({"windows": "many"}, ["windows", "not 'many'"]),
        ({"resources": {"gpus": -1}, "context": 0}, ["2 problems", "resources.gpus", "context"]),
    ],
    ids=str,
)
def test_mistakes_are_named_with_their_place(change: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(StudyError) as caught:
        parse_study({"models": "m", "recipes": "int8", **change}, "a.yaml")
    assert all(part in caught.value.what for part in said), caught.value.what
    assert caught.value.where == "a.yaml"


@pytest.mark.parametrize(("content", "said"), [(b"models: [", "cannot read"), (b"- 1", "mapping"), (b"\xff", "cannot")])
def test_files_that_are_no_study(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(StudyError, match=said):
        load_study(path)
    with pytest.raises(StudyError, match="cannot read"):
        load_study(tmp_path / "missing.yaml")


def test_the_studies_that_ship_can_be_read_and_try_enough() -> None:
    from llmquant.study.candidates import find_candidates

    folder = Path(__file__).parents[2] / "evals" / "studies"
    found = {path.stem: load_study(path) for path in folder.glob("*.yaml")}
    candidates, left_out = find_candidates(found["smollm2"])
    assert len(candidates) >= 12 and not left_out
    assert isinstance(found["smollm2"], Study) and any(candidate.bits for candidate in candidates)
