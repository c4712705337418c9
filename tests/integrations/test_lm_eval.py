"""Tasks: lm-eval's numbers for our models, to the last digit; errors that name the task; nothing else changed."""

from __future__ import annotations

import json
import math
import os
import random
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import Folders, load
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from llmquant.errors import MissingDependencyError, TaskError

pytest.importorskip("lm_eval", reason="tasks need lm-eval")

from llmquant.integrations import lm_eval as ours

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "evals" / "tasks"
QUESTIONS = json.loads((EXAMPLES / "common_knowledge.json").read_text())
BUILDER = runpy.run_path(str(EXAMPLES / "local_wikitext.py"))
RAW = (
    " \n = A = \n \n It is , 3 @.@ 5 of <unk> . \n = = B = = \n \n He 's here \n = = = C = = = \n one = two = \n\n"
    " = D = \n last . \n"
)


def byte_tokenizer() -> Any:
    """126 of the 256 bytes, for models with a vocabulary of 128; others are the last of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: min(i, 125) for i, char in enumerate(alphabet[:126])} | {"<s>": 126}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<s>", bos_token="<s>")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def small(folders: Folders) -> Any:
    return load(folders.quantized("llama-tied", "int4-g32"))


@pytest.fixture(scope="module")
def wikitext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    (folder / "raw").write_text(RAW, encoding="utf-8")
    BUILDER["build"](folder / "raw", folder)
    return folder


def log_probability(model: nn.Module, tokenizer: Any, context: str, answer: str) -> float:
    """Of the answer's tokens after the context, the windows cut to the last 64 tokens as lm-eval does."""
    ahead, tokens = tokenizer(context)["input_ids"], tokenizer(context + answer)["input_ids"]
    tail = len(tokens) - len(ahead)
    ids = torch.tensor(tokens[-65:])
    with torch.no_grad():
        logits = model(ids[None, :-1]).logits[0].float()
    return logits.log_softmax(-1).gather(1, ids[1:, None])[-tail:].sum().item()


def test_accuracy_is_what_the_logits_say(small: Any, tokenizer: Any) -> None:
    entry = ours.run_tasks(small, tokenizer, ["common_knowledge"], include_path=EXAMPLES, limit=12)["common_knowledge"]
    right, right_by_length = [], []
    for question in QUESTIONS[:12]:
        context = f"Question: {question['question']}\nAnswer:"
        scores = [log_probability(small, tokenizer, context, f" {choice}") for choice in question["choices"]]
        norm = [score / len(choice) for score, choice in zip(scores, question["choices"], strict=True)]
        right.append(np.argmax(scores) == question["answer"])
        right_by_length.append(np.argmax(norm) == question["answer"])
    for name, hits in (("acc", right), ("acc_norm", right_by_length)):
        figure = entry["metrics"][name]
        assert figure["value"] == pytest.approx(np.mean(hits), abs=1e-12)
        assert figure["stderr"] == pytest.approx(np.std(hits, ddof=1) / math.sqrt(12), abs=1e-12)
        assert figure["higher_is_better"] is True
    assert (entry["version"], entry["n_shot"], entry["samples"]) == (1.0, 0, {"used": 12, "all": 40})
    assert entry["max_length"] == 64 and entry["note"] is None and entry["nonfinite"] == 0
    json.dumps(entry, allow_nan=False)


def test_word_perplexity_is_what_the_logits_say(small: Any, tokenizer: Any, wikitext: Path) -> None:
    entry = ours.run_tasks(small, tokenizer, ["local_wikitext"], include_path=wikitext)["local_wikitext"]
    total = words = size = 0.0
    for page in BUILDER["split_documents"](RAW):
        text = page.replace(" , ", ", ").replace(" @.@ ", ".").replace(" . ", ". ").replace(" 's", "'s")
        text = text.replace("= = =", "===").replace("= =", "==").replace(" \n", "\n").replace("\n ", "\n")
        ids = tokenizer(text)["input_ids"]
        for start in range(0, len(ids), 64):  # a window predicts from the token before it: the first from <s>
            piece = [ids[start - 1] if start else 126, *ids[start : start + 64]]
            total += _window(small, piece, 64, ids, start)
        words, size = words + len(re.split(r"\s+", page)), size + len(page.encode())
    metrics = entry["metrics"]
    assert metrics["word_perplexity"]["value"] == pytest.approx(math.exp(-total / words), rel=1e-5)
    assert metrics["byte_perplexity"]["value"] == pytest.approx(math.exp(-total / size), rel=1e-5)
    assert metrics["bits_per_byte"]["value"] == pytest.approx(-total / size / math.log(2), rel=1e-5)
    assert metrics["word_perplexity"]["higher_is_better"] is False and entry["samples"] == {"used": 2, "all": 2}
    assert entry["note"] == ours.NOTE


def _window(model: nn.Module, piece: list[int], length: int, ids: list[int], start: int) -> float:
    """The log-probability of a window; the last one sees as many tokens before it as fit."""
    scored = len(piece) - 1
    if start and scored < length:
        piece = ids[start + scored - length - 1 : start + scored]
    window = torch.tensor(piece)
    with torch.no_grad():
        logits = model(window[None, :-1]).logits[0].float()
    return logits.log_softmax(-1).gather(1, window[1:, None])[-scored:].sum().item()


def test_documents_are_cut_at_the_headings_of_articles() -> None:
    pages = list(BUILDER["split_documents"](RAW))
    assert pages == [RAW[2 : RAW.index(" = D")].removesuffix("\n"), RAW[RAW.index(" = D") :]]
    for heading in (" = X = = ", "= = X =", "=X=", "= X", "X =", "= = ="):
        assert len(list(BUILDER["split_documents"](f"before\n{heading}\nafter"))) == 1, heading
    assert len(list(BUILDER["split_documents"]("before\n = X = Y = \nafter"))) == 2


def test_the_real_text_has_the_documents_of_the_data_set() -> None:
    """EleutherAI/wikitext_document_level: 62 documents in the test split."""
    data = os.environ.get("LLMQUANT_TEST_DATA")
    if not data:
        pytest.skip("LLMQUANT_TEST_DATA is not set")
    text = (Path(data) / "wikitext-2-raw" / "wiki.test.raw").read_text(encoding="utf-8")
    pages = list(BUILDER["split_documents"](text))
    assert len(pages) == 62 and all(page.startswith(" = ") for page in pages)


def test_the_caller_finds_everything_as_it_was(small: Any, tokenizer: Any) -> None:
    small.train()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    before = {name: parameter for name, parameter in small.named_parameters()}
    ours.run_tasks(small, tokenizer, ["common_knowledge"], include_path=EXAMPLES, limit=1)
    assert small.training and tokenizer.pad_token is None
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert all(parameter is before[name] for name, parameter in small.named_parameters())
    small.eval()


def test_progress_counts_every_request_once(small: Any, tokenizer: Any, wikitext: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    ours.run_tasks(
        small, tokenizer, ["common_knowledge"], include_path=EXAMPLES, limit=2, progress=lambda *c: calls.append(c)
    )
    assert calls == [(done, 8, "loglikelihood") for done in range(9)]
    calls.clear()
    ours.run_tasks(small, tokenizer, ["local_wikitext"], include_path=wikitext, progress=lambda *c: calls.append(c))
    done, total, _ = calls[-1]
    assert done == total > 2 and [call[0] for call in calls] == list(range(total + 1))


def test_answers_that_are_no_numbers_are_counted(folders: Folders, tokenizer: Any) -> None:
    broken = load(folders.quantized("llama", "int4-g32"))
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    entry = ours.run_tasks(broken, tokenizer, ["common_knowledge"], include_path=EXAMPLES, limit=2)["common_knowledge"]
    assert entry["nonfinite"] == 8


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        ([], {}, "no task is named"),
        (["common_knowledge"], {"include_path": "/no/such/folder"}, "no such folder"),
        (["common_knowledge"], {"include_path": EXAMPLES, "limit": 0}, "limit of 0"),
        (["common_knowledge"], {"include_path": EXAMPLES, "batch_size": 0}, "0 requests"),
    ],
)
def test_bad_requests_are_named(names: list[str], options: dict[str, Any], words: str, tokenizer: Any) -> None:
    with pytest.raises(TaskError, match=words):
        ours.run_tasks(nn.Identity(), tokenizer, names, **options)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """lm-eval's own thousands of tasks take long to index; the folder of examples stands for them."""
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda include_path=None, include_defaults=False: manager(
            include_path=[str(EXAMPLES), *filter(None, [include_path])], include_defaults=False
        ),
    )
    yield


@pytest.mark.usefixtures("few")
def test_an_unknown_task_gets_near_names() -> None:
    with pytest.raises(TaskError, match=r"no such task\n.*comon_knowledge\n.*common_knowledge"):
        ours.load_tasks(["comon_knowledge"])
    with pytest.raises(TaskError, match=r"zzz_\*"):
        ours.load_tasks(["zzz_*"])


@pytest.mark.usefixtures("few")
def test_patterns_and_files_name_tasks_and_each_runs_once() -> None:
    for names in (["common_*"], [str(EXAMPLES / "common_knowledge.yaml")], ["common_knowledge", "common_*"]):
        assert [task.task_name for task in ours.load_tasks(names)] == ["common_knowledge"]


GROUP = (
    "group: pair\ntask: [common_knowledge, other]\naggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n"
)


@pytest.mark.usefixtures("few")
def test_groups_have_their_mean(small: Any, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "pair.yaml").write_text(GROUP + "metadata: {version: 3}\n")
    lines = (EXAMPLES / "common_knowledge.yaml").read_text().replace("task: common_knowledge", "task: other")
    (tmp_path / "other.yaml").write_text(lines)
    for name in ("local_data.py", "common_knowledge.json"):
        (tmp_path / name).write_text((EXAMPLES / name).read_text())
    results = ours.run_tasks(small, tokenizer, ["pair"], include_path=tmp_path, limit=3)
    assert set(results) == {"pair", "common_knowledge", "other"}
    assert results["pair"]["metrics"]["acc"]["value"] == results["other"]["metrics"]["acc"]["value"]
    assert results["pair"]["version"] == "3" and results["pair"]["samples"] is None


def test_data_that_cannot_be_had_name_the_task(tmp_path: Path) -> None:
    lines = (EXAMPLES / "common_knowledge.yaml").read_text().replace("common_knowledge.json", "none.json")
    (tmp_path / "absent.yaml").write_text(lines.replace("task: common_knowledge", "task: absent"))
    (tmp_path / "local_data.py").write_text((EXAMPLES / "local_data.py").read_text())
    with pytest.raises(TaskError, match=r"cannot be loaded: .*none\.json[^\n]*\n  where: absent\n.*HF_HUB_OFFLINE"):
        ours.load_tasks(["absent"], tmp_path)


@pytest.mark.parametrize(("mark", "words"), [("UNSAFE_CODE", "confirm_run_unsafe_code"), ("MULTIMODAL", "multimodal")])
def test_tasks_that_need_more_are_refused(mark: str, words: str) -> None:
    with pytest.raises(TaskError, match=words):
        ours._check_can_run(SimpleNamespace(task_name="x", **{mark: True}))


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"llmquant\[tasks\]"):
        ours.load_tasks(["arc_easy"])


def test_names_and_figures_of_lm_eval_in_our_words() -> None:
    figures = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": "N/A",
        "f1,strict": float("nan"),
        "f1_stderr,strict": 1,
    }
    assert dict(ours._metrics(figures, {"acc": True})) == {
        "acc": {"value": 0.5, "stderr": None, "higher_is_better": True},
        "f1,strict": {"value": None, "stderr": 1.0, "higher_is_better": None},
    }


@pytest.mark.slow
def test_the_same_number_through_lm_evals_own_command_line(folders: Folders, tmp_path: Path) -> None:
    """Both on real text and the same quantized checkpoint: equal to the last digit."""
    data = os.environ.get("LLMQUANT_TEST_DATA")
    if not data:
        pytest.skip("LLMQUANT_TEST_DATA is not set")
    checkpoint, task = tmp_path / "model", tmp_path / "task"
    folders.quantized("llama", "int4-g32")
    subprocess.run(["cp", "-r", str(folders.quantized("llama", "int4-g32")), str(checkpoint)], check=True)
    byte_tokenizer().save_pretrained(checkpoint)
    BUILDER["build"](Path(data) / "wikitext-2-raw" / "wiki.test.raw", task)
    options = ["--tasks", "local_wikitext", "--limit", "2"]
    record = tmp_path / "record.json"
    command("eval", checkpoint, *options, "--task-path", task, "--tasks-only", "--json", record)
    theirs = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={checkpoint}", "--include_path", task]
    command(
        "run",
        "--",
        "python",
        "-m",
        *theirs,
        *options,
        "--device",
        "cpu",
        "--batch_size",
        "1",
        "--output_path",
        tmp_path / "out",
    )
    written = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]["local_wikitext"]
    metrics = json.loads(record.read_text())["tasks"]["local_wikitext"]["metrics"]
    assert {f"{name},none": figure["value"] for name, figure in metrics.items()} == {
        key: value for key, value in written.items() if key.endswith(",none") and "stderr" not in key
    }
    assert metrics["word_perplexity"]["value"] > 1


def command(*arguments: object) -> None:
    """`llmquant` in a fresh process, without a network."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "llmquant", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
