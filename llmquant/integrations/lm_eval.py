"""Tasks through lm-eval, EleutherAI's evaluation harness: its data, prompts, metrics and standard errors, our model."""

from __future__ import annotations

import copy
import difflib
import importlib.metadata
import importlib.util
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llmquant.errors import MissingDependencyError, TaskError
from llmquant.quantize import Progress

WORD_METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte")
NOTE = (
    "lm-eval's perplexity is over words or bytes of detokenized documents; "
    "it is another metric than llmquant's, which is per token, and the two do not compare"
)


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    names: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What a transformers model, quantized or not, reaches at tasks of lm-eval.

    Args:
        model: a causal language model; it computes as it is, where it is. It is left in evaluation mode or training
            as it was.
        tokenizer: its tokenizer; a copy is used.
        names: tasks, groups or tags of lm-eval, patterns of names (`mmlu_*`), or paths of YAML files.
        include_path: a folder with tasks of the user's own, which win over those of the same name.
        limit: the first documents of each task only; standard errors tell what that costs.
        batch_size: requests at once. Other sizes round differently.
        progress: called with the requests answered, those known of, and their kind.

    Returns:
        For each task (and each group, with the mean as the group defines it) plain JSON types: `version`, `n_shot`,
        `samples` (used and in all), `max_length` in tokens, the `lm_eval` version, `nonfinite` (answers of the run that
        were NaN or infinite), `note` (or null) and `metrics`: name -> `value`, `stderr` (null where lm-eval gives none)
        and `higher_is_better`.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        TaskError: a task is unknown, its data cannot be had, or it may not be run like this.
    """
    _check(limit, batch_size)
    return run_loaded(
        model, tokenizer, load_tasks(names, include_path), limit=limit, batch_size=batch_size, progress=progress
    )


def run_loaded(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Any],
    *,
    limit: int | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`run_tasks` with what `load_tasks` returned, for those who want to know early that the tasks are there."""
    _check(limit, batch_size)
    counter = _Counter(progress)
    with _as_it_was(model):
        lm = _language_model(model, tokenizer, batch_size, counter)
        results = _evaluate(lm, tasks, limit)
    extra = {"lm_eval": importlib.metadata.version("lm_eval"), "max_length": lm.max_length}
    return {name: _entry(name, results) | extra | {"nonfinite": counter.nonfinite} for name in results["results"]}


def load_tasks(names: Sequence[str], include_path: str | Path | None = None) -> list[Any]:
    """The tasks and groups of lm-eval with these names, their data loaded; the errors are those of `run_tasks`."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependencyError("tasks need the `lm-eval` package", hint="pip install llmquant[tasks]")
    if not names:
        raise TaskError("no task is named", hint="for example `arc_easy`")
    if include_path is not None and not Path(include_path).is_dir():
        raise TaskError("no such folder of tasks", where=str(include_path), hint="a folder with YAML files of lm-eval")
    with _seeds_kept():
        manager, found = _find(names, include_path)
        tasks = [task for name in found for task in _load(manager, name)]
    for task in chain.from_iterable(getattr(task, "get_all_tasks", lambda task=task: [task])() for task in tasks):
        _check_can_run(task)
    return tasks


def _check(limit: int | None, batch_size: int) -> None:
    if limit is not None and limit < 1:
        raise TaskError(f"a limit of {limit} documents leaves none", hint="1 or more, or no limit")
    if batch_size < 1:
        raise TaskError(f"{batch_size} requests at once", hint="1 or more")


def _find(names: Sequence[str], include_path: str | Path | None) -> tuple[Any, list[str]]:
    """A manager of tasks and the names it knows. lm-eval's own thousands, slow to index, only where they are needed."""
    from lm_eval.tasks import TaskManager

    folder = str(include_path) if include_path else None
    if folder:
        manager = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(manager.all_subtasks):
            return manager, list(names)
    manager = TaskManager(include_path=folder)
    return manager, list(dict.fromkeys(chain.from_iterable(_matches(manager, name) for name in names)))


def _matches(manager: Any, name: str) -> list[str]:
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return [name]
    found = [name] if name in manager.task_index else manager.match_tasks([name])
    if not found:
        near = difflib.get_close_matches(name, manager.all_tasks)
        hint = " or ".join(near) if near else "`python -m lm_eval ls tasks` lists those of lm-eval"
        raise TaskError("no such task", where=name, hint=f"{hint}; --task-path for a folder of your own")
    return found


def _load(manager: Any, name: str) -> list[Any]:
    """The tasks, or groups of them, that a name stands for."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # data sets fail in too many types to list: HTTP, OSError, ValueError, the hub's own
        hint = (
            "most tasks download their data once: with a network, and without HF_HUB_OFFLINE and HF_DATASETS_OFFLINE; "
            "a task over local files needs neither (evals/tasks has two)"
        )
        raise TaskError(f"the task cannot be loaded: {error}", where=name, hint=hint) from error
    inner = set(chain.from_iterable(loaded["group_map"].values()))
    return [task for kind in ("groups", "tasks") for key, task in loaded[kind].items() if key not in inner]


def _check_can_run(task: Any) -> None:
    """Some tasks run programs that the model wrote, some show it pictures."""
    if getattr(task, "UNSAFE_CODE", False):
        hint = "`llmquant run -- lm_eval ... --confirm_run_unsafe_code`, in a sandbox"
        raise TaskError("the task executes code that the model writes", where=task.task_name, hint=hint)
    if getattr(task, "MULTIMODAL", False):
        hint = "`llmquant run -- lm_eval --model hf-multimodal ...`"
        raise TaskError("the task needs a model that sees pictures", where=task.task_name, hint=hint)


def _language_model(model: nn.Module, tokenizer: Any, batch_size: int, counter: _Counter) -> Any:
    from lm_eval.models.huggingface import HFLM

    class Counted(HFLM):
        """lm-eval's model, which counts for us instead of drawing bars."""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            counter.begin(len(requests), "loglikelihood")
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            counter.begin(sum(_windows(self, request.args[0]) for request in requests), "windows of documents")
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            counter.begin(len(requests), "generation")
            return super().generate_until(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, override_bs: Any = None) -> Any:
            answers = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
            if override_bs is not None:  # windows of documents, which the hook sees only when all are done
                counter.step(len(requests))
            return answers

    with _hushed("lm_eval.models.huggingface"):  # it warns of models that are objects: one is meant here
        lm = Counted(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    lm.set_cache_hook(counter)
    return lm


class _Counter:
    """Answers so far, and those that are no numbers; lm-eval calls `add_partial` for each."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress, self.kind = progress, ""
        self.done = self.total = self.nonfinite = 0

    def begin(self, count: int, kind: str) -> None:
        """More requests are known of."""
        self.total, self.kind = self.total + count, kind
        self.step(0)

    def step(self, count: int) -> None:
        """Some were answered."""
        self.done += count
        if self.progress:
            self.progress(min(self.done, self.total), self.total, self.kind)

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """One answer: a log-likelihood, with whether greedy decoding gives it, or a text."""
        value = answer[0] if isinstance(answer, tuple) else answer
        self.nonfinite += isinstance(value, float) and not math.isfinite(value)
        if kind != "loglikelihood_rolling":
            self.step(1)


def _windows(lm: Any, text: str) -> int:
    """How many windows a document is cut into."""
    from lm_eval.utils import get_rolling_token_windows

    tokens = lm.tok_encode(text)
    windows = get_rolling_token_windows(
        token_list=tokens, prefix_token=lm.prefix_token_id, max_seq_len=lm.max_length, context_len=1
    )
    return sum(1 for _ in windows)


def _evaluate(lm: Any, tasks: Sequence[Any], limit: int | None) -> dict[str, Any]:
    """lm-eval's results. Raises `TaskError` where another process has them."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)  # the tasks are there: no need to index all that lm-eval has
    results = simple_evaluate(lm, tasks=list(tasks), limit=limit, log_samples=False, task_manager=manager)
    if results is None:
        raise TaskError("tasks run in one process, the first", hint="call run_tasks where LOCAL_RANK is 0")
    return results


def _entry(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """One task of lm-eval's results, in our words."""
    samples = results.get("n-samples", {}).get(name)
    metrics = dict(_metrics(results["results"][name], results.get("higher_is_better", {}).get(name) or {}))
    return {
        "version": results.get("versions", {}).get(name),
        "n_shot": results.get("n-shot", {}).get(name),
        "samples": {"used": samples["effective"], "all": samples["original"]} if samples else None,
        "metrics": metrics,
        "note": NOTE if set(metrics) & set(WORD_METRICS) else None,
    }


def _metrics(figures: Mapping[str, Any], better: Mapping[str, bool | None]) -> Iterator[tuple[str, dict[str, Any]]]:
    """lm-eval's keys are `metric,filter`; the filter `none` goes without saying."""
    for key, value in figures.items():
        metric, comma, chosen = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = _number(figures.get(f"{metric}_stderr,{chosen}"))
            figure = {"value": _number(value), "stderr": stderr, "higher_is_better": better.get(metric)}
            yield (metric if chosen == "none" else key), figure


def _number(value: Any) -> float | None:
    """lm-eval says "N/A" where there is no figure."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """lm-eval sets seeds and evaluation mode; both are the caller's again afterwards."""
    training = model.training
    try:
        with _seeds_kept():
            yield
    finally:
        model.train(training)


@contextmanager
def _seeds_kept() -> Iterator[None]:
    """Random numbers go on as if nobody had drawn or seeded any in between."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def _hushed(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
