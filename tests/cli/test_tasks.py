"""`llmquant eval --tasks`: what is printed and recorded, and what is said before anything is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import Folders
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from llmquant.cli import evaluate, tasks
from llmquant.cli.main import app
from llmquant.errors import LlmQuantError

EXAMPLES = Path(__file__).parents[2] / "evals" / "tasks"
LOCAL = ["--tasks", "common_knowledge", "--task-path", str(EXAMPLES), "--limit", "3"]

pytest.importorskip("lm_eval", reason="tasks need lm-eval")


@pytest.fixture(scope="module")
def checkpoint(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized model with a tokenizer of bytes, half of which it does not know."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for path in folders.quantized("llama", "int4-g32").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:126]
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<s>"])}, merges=[], unk_token="<s>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<s>").save_pretrained(folder)
    return folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_tasks_come_with_the_perplexity(checkpoint: Path, tmp_path: Path) -> None:
    done = run(checkpoint, *LOCAL, "--context", 32, "--windows", 1, "--json", tmp_path / "r.json")
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["perplexity"]["value"] > 1 and set(record["tasks"]) == {"common_knowledge"}
    assert record["tasks"]["common_knowledge"]["samples"] == {"used": 3, "all": 40}


def test_tasks_alone(checkpoint: Path, tmp_path: Path) -> None:
    done = run(checkpoint, *LOCAL, "--tasks-only", "--json", tmp_path / "r.json")
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "r.json").read_text())
    assert set(record) == {"schema", "model", "versions", "machine", "tasks"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--limit", "3"], "need --tasks"),
        (["--tasks-only"], "need --tasks"),
        (["--task-path", "x"], "need --tasks"),
        ([*LOCAL, "--tasks-only", "--speed"], "nothing but tasks"),
        ([*LOCAL, "--tasks-only", "--baseline", "x", "--max-kl", "1"], "nothing but tasks"),
        (["--tasks", "x", "--task-path", "/no/such"], "no such folder of tasks"),
        (["--tasks", " , "], "no task is named"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(options: list[str], words: str) -> None:
    done = run("/no/such/model", *options)
    assert isinstance(done.exception, LlmQuantError) and words in str(done.exception)


def test_a_line_for_each_metric_and_the_notes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    monkeypatch.setattr(tasks, "console", Console(width=200))
    word = {"value": 20.5, "stderr": None, "higher_is_better": False}
    acc = {"value": 0.7, "stderr": 0.0734, "higher_is_better": True}
    odd = {"value": None, "stderr": None, "higher_is_better": None}
    shared = {"version": 2.0, "n_shot": 0, "lm_eval": "1.2.3", "max_length": 64, "nonfinite": 5}
    tasks.print_tasks(
        {
            "one": {
                **shared,
                "samples": {"used": 1, "all": 2},
                "metrics": {"word_perplexity": word},
                "note": "another",
            },
            "two": {**shared, "samples": None, "metrics": {"acc": acc, "odd": odd}, "note": None},
        }
    )
    told = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert told[1:4] == [
        "one word_perplexity ↓ 20.5000 1 of 2 0 2.0",
        "two acc ↑ 0.7000 ± 0.0734 - 0 2.0",
        "two odd - - 0 2.0",
    ]
    assert told[4:6] == ["lm-eval 1.2.3, windows of at most 64 tokens", "another"]
    assert told[6].startswith("5 answers were NaN or infinite")


def test_only_the_first_process_runs_tasks(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others of `accelerate launch` share in the windows, and leave the tasks to it."""
    from contextlib import contextmanager
    from types import SimpleNamespace

    @contextmanager
    def second() -> Any:
        yield SimpleNamespace(rank=1, count=2)

    monkeypatch.setattr("llmquant.measure.processes.processes", second)
    monkeypatch.setattr(evaluate.Tasks, "run", lambda *_: pytest.fail("not here"))
    assert run(checkpoint, *LOCAL, "--tasks-only").exit_code == 0
