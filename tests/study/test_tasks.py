"""Tasks of lm-eval as a part of a study: of the reference and of candidates, once each, whatever the texts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import llmquant
from llmquant.errors import MissingDependencyError
from llmquant.integrations.loading import load, load_tokenizer
from llmquant.study import plan

from .conftest import MakeStudy, sweep

TASKS = Path(__file__).parents[2] / "evals" / "tasks"


def test_tasks_are_those_of_the_same_call_and_known_by_their_files(make_study: MakeStudy, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from llmquant.integrations.lm_eval import run_tasks

    folder = shutil.copytree(TASKS, tmp_path / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    options = {"path": str(folder), "limit": 4}
    study = make_study(recipes="int4-g32", tasks="common_knowledge", task_options=options, metrics="quality,tasks")
    done, engine = sweep(study, tmp_path / "out")
    assert not done.failed, done.failed
    assert engine.count("tasks") == 2
    model = load(study.models[0], dtype="float32")
    llmquant.quantize_(model, "int4-g32")
    found = run_tasks(model, load_tokenizer(study.models[0]), ["common_knowledge"], include_path=folder, limit=4)
    assert done.results[1]["tasks"] == found and found["common_knowledge"]["metrics"]
    assert done.results[0]["tasks"] is not None and "common_knowledge" in done.results[0]["tasks"]
    yaml = folder / "common_knowledge.yaml"
    yaml.write_text(yaml.read_text() + "\n# changed\n")
    _, engine = sweep(study, tmp_path / "out")
    assert [job.kind for job in engine.jobs] == ["tasks", "quantize", "tasks"]


@pytest.mark.slow
def test_a_task_that_does_not_exist_is_a_failed_cell(make_study: MakeStudy, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    done, _ = sweep(make_study(tasks="no_such_task_at_all"), tmp_path / "out")
    assert {line["error"]["kind"] for line in done.failed} == {"TaskError"}
    assert all(line["perplexity"]["value"] for line in done.failed), "what else was found is kept"


def test_without_lm_eval_it_is_said_before_anything_runs(
    make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="lm-eval"):
        sweep(make_study(tasks="arc_easy"), tmp_path / "out")
