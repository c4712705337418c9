"""Each thing is computed once; what fails is told and the rest goes on; what is damaged is made again."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import models
import pytest
import torch

import llmquant
from llmquant.config.recipe import to_recipe
from llmquant.convert.calibrated import Reading
from llmquant.convert.job import Conversion
from llmquant.errors import StudyError
from llmquant.integrations.loading import load, load_tokenizer
from llmquant.measure.evaluate import evaluate
from llmquant.measure.reference import Reference
from llmquant.measure.windows import make_windows, tokenize
from llmquant.primitives.metrics import compute_error
from llmquant.report.read import read_rows
from llmquant.study import cells
from llmquant.study.job import Job, Outcome
from llmquant.study.run import run_study
from llmquant.study.store import Store

from .conftest import Inline, MakeStudy, sweep

TWELVE = (
    *("int2-g32", "int3-g32", "int3-g32-asym", "int4-g32", "int4-g32-s8", "int5-g32", "int6-g32", "int8", "float8"),
    *("nf4", "mxfp4", "nvfp4"),
)


def journal(out: Path) -> Counter[str]:
    """How many of each kind were computed in a folder, ever."""
    return Counter(line["kind"] for line in Store(out).journal())


def test_a_recipe_more_costs_one_cell_and_no_reference(make_study: MakeStudy, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, _ = sweep(make_study(recipes=list(TWELVE), algorithms="rtn"), out)
    assert journal(out) == {"reference": 1, "quantize": 12, "quality": 12}
    assert len(first.results) == 13 and not first.failed
    second, engine = sweep(make_study(recipes=list(TWELVE), algorithms="rtn"), out)
    assert engine.jobs == [] and second.results == first.results
    third, _ = sweep(make_study(recipes=[*TWELVE, "int7-g32"], algorithms="rtn"), out)
    assert journal(out) == {"reference": 1, "quantize": 13, "quality": 13}
    assert [line for line in third.results if line["label"] != "int7-g32 rtn"] == first.results
    kl = {line["label"]: line["kl"]["mean"] for line in third.results if line["kind"] == "candidate"}
    assert kl["int8 rtn"] < kl["int6-g32 rtn"] < kl["int4-g32 rtn"] < kl["int3-g32 rtn"] < kl["int2-g32 rtn"]


def test_figures_are_those_of_the_same_calls_in_python(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study(recipes="int4-g32", metrics="quality,noise,layers")
    reference, floor, line = _by_kind(sweep(study, tmp_path / "out")[0].results)
    folder, path = study.models[0], study.texts[0]
    plain, tokenizer = load(folder, dtype=torch.float32), load_tokenizer(folder)
    ids, bos = tokenize(tokenizer, Path(path).read_text())
    windows = make_windows(ids, study.context, study.windows, bos)
    quantized = load(folder, dtype=torch.float32)
    llmquant.quantize_(quantized, "int4-g32")
    with Reference.compute(plain, windows) as kept:
        found = evaluate(quantized, windows, kept)
    assert line["kl"]["mean"] == pytest.approx(found.kl.mean, rel=1e-6) and found.kl.mean > 1e-5  # type: ignore[union-attr]
    assert line["perplexity"]["value"] == pytest.approx(found.perplexity.value, rel=1e-9)
    assert line["perplexity"]["baseline"] == reference["perplexity"]["value"]
    assert line["protocol"]["tokens_scored"] == 2 * 31 and line["protocol"]["dtype"] == "float32"
    assert floor["kind"] == "noise" and 0 < floor["kl"]["mean"] < line["kl"]["mean"]
    weights = dict(load(folder, dtype=torch.bfloat16).named_parameters())
    for layer in line["layers"]:
        copy = quantized.get_parameter(layer["fqn"]).dequantize(torch.float32)
        assert layer["sqnr"] == pytest.approx(
            compute_error(weights[layer["fqn"]].detach().float(), copy).item(), abs=1e-6
        )
        assert layer["bits"] == 4.5 and layer["format"] == "int4"
    assert len(line["layers"]) == 14 and reference["layers"] == []


SEAM = {
    *("schema", "study", "model", "label", "kind", "recipe", "algorithm", "bits_budget", "text", "status", "error"),
    *("protocol", "perplexity", "kl", "top1", "delta_p_rms", "nonfinite", "bytes", "speed", "layers", "tasks"),
    *("seconds", "versions", "machine", "keys"),
}


def test_lines_are_what_the_report_reads(make_study: MakeStudy, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("llmquant_recipe: 1\nweights: {no.such.weight: int8}\n")
    study = make_study(recipes=["int8", str(bad)], bits=5, schemes="int4-g32,int8", metrics="quality,noise")
    done, _ = sweep(study, tmp_path / "out")
    assert all(set(line) == SEAM for line in done.results)
    assert [line["kind"] for line in done.results] == ["noise", "reference", *["candidate"] * 3]
    assert len(read_rows(tmp_path / "out")) == 5
    candidate = next(line for line in done.results if line["label"] == "int8")
    assert set(candidate["perplexity"]) == {"value", "stderr", "baseline", "change", "change_stderr"}
    assert sum(found["tokens"] for found in candidate["kl"]["by_confidence"]) == candidate["protocol"]["tokens_scored"]
    assert candidate["nonfinite"] == {"logits": 0, "tokens": 0} and candidate["seconds"]["quantize"] > 0
    assert candidate["layers"] == [] and set(candidate["bytes"].values()) == {None}


@pytest.mark.parametrize("recipe", ["mixed-4-6-8", "s8-int8"])
def test_a_study_quantizes_as_the_command_does(make_study: MakeStudy, tmp_path: Path, recipe: str) -> None:
    study = make_study(recipes=recipe, calibration={"tokens": 128})
    sweep(study, tmp_path / "out", keep_models=True)
    (folder,) = [path for path in (tmp_path / "out" / "models").iterdir() if path.is_dir()]
    by_command = tmp_path / "q"
    Conversion(to_recipe(recipe), Reading(tokens=128)).write(study.models[0], by_command)
    assert models.disk(folder) == models.disk(by_command)
    in_memory = load(study.models[0], dtype=torch.bfloat16)
    calibration = {"tokenizer": load_tokenizer(study.models[0]), "tokens": 128}
    stats = llmquant.collect_stats(in_memory, recipe, **calibration) if recipe.startswith("s8") else None
    llmquant.quantize_(in_memory, recipe, stats=stats)
    assert torch.equal(models.logits(load(folder)), models.logits(in_memory))


def _by_kind(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [next(line for line in results if line["kind"] == kind) for kind in ("reference", "noise", "candidate")]


def test_two_texts_share_a_quantized_model(make_study: MakeStudy, tmp_path: Path, text: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Another text. " * 20)
    done, engine = sweep(make_study(recipes="int8", texts=[str(text), str(other)]), tmp_path / "out")
    assert [engine.count(kind) for kind in ("reference", "quantize", "quality")] == [2, 1, 2]
    assert {line["text"] for line in done.results} == {str(text), str(other)}
    assert not list((tmp_path / "out" / "models").iterdir())


def test_a_failing_cell_is_told_and_the_rest_goes_on(make_study: MakeStudy, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("llmquant_recipe: 1\nweights: {no.such.weight: int8, _default: int4}\n")
    study = make_study(recipes=["int8", str(bad), "float8-2x4"])
    done, _ = sweep(study, tmp_path / "out")
    assert [line["label"] for line in done.failed] == [str(bad)]
    error = done.failed[0]["error"]
    assert error["kind"] == "UnmatchedKeyError" and "no.such.weight" in error["what"] + str(error["where"])
    assert done.failed[0]["perplexity"]["value"] is None and done.failed[0]["nonfinite"] is None
    assert sum(line["status"] == "done" for line in done.results) == 3


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """While it holds anything, functions of cells that it names fail."""
    names: list[str] = []
    originals = {name: getattr(cells, name) for name in ("quantize", "quality", "reference")}

    def make(name: str) -> Any:
        def call(**arguments: Any) -> Any:
            if name in names:
                raise llmquant.errors.BadWeightError("it broke", where="here", hint="mend it")
            return originals[name](**arguments)

        return call

    for name in originals:
        monkeypatch.setattr(cells, name, make(name))
    return names


@pytest.mark.parametrize("kind", ["quantize", "quality", "reference"])
def test_failures_are_kept_and_tried_again(make_study: MakeStudy, tmp_path: Path, broken: list[str], kind: str) -> None:
    study, out = make_study(), tmp_path / "out"
    broken.append(kind)
    failed, _ = sweep(study, out)
    assert [line["label"] for line in failed.failed] == (["16 bits", "int8"] if kind == "reference" else ["int8"])
    assert failed.failed[-1]["error"] == {
        "what": "it broke",
        "where": "here",
        "hint": "mend it",
        "kind": "BadWeightError",
    }
    same, engine = sweep(study, out, retry_failed=False)
    assert engine.jobs == [] and same.results == failed.results
    broken.clear()
    done, _ = sweep(study, out)
    assert not done.failed and len(done.results) == 2
    assert not list((out / "failures").iterdir())


@pytest.mark.parametrize("what", ["reference", "reference-end", "cell"])
def test_what_is_damaged_is_named_and_made_again(make_study: MakeStudy, tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    first, _ = sweep(make_study(), out)
    if what == "cell":
        (path,) = [out / "cells" / f"{line['key']}.json" for line in Store(out).journal() if line["kind"] == "quality"]
        content = bytearray(path.read_bytes())
    else:
        (path,) = (out / "references").iterdir()
        content = bytearray(path.read_bytes())
    content[len(content) // 2 if what != "reference-end" else -9] ^= 4
    path.write_bytes(content)
    again, engine = sweep(make_study(recipes=["int8", "int4-g32"]), out)
    assert any(path.name in warning for warning in again.warnings)
    assert engine.count("reference") == (what != "cell") and engine.count("quality") == 1 + (what == "cell")
    assert again.results[0]["perplexity"] == first.results[0]["perplexity"]
    assert again.results[1]["kl"] == first.results[1]["kl"]


def test_quantized_models_are_kept_on_demand_and_checked(make_study: MakeStudy, tmp_path: Path, text: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other.txt"
    other.write_text("Another text. " * 20)
    sweep(make_study(), out, keep_models=True)
    (folder,) = [path for path in (out / "models").iterdir() if path.is_dir()]
    _, engine = sweep(make_study(texts=str(other)), out)
    assert engine.count("quantize") == 0 and folder.is_dir()
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    done, engine = sweep(make_study(texts=str(text), context=16), out)
    assert engine.count("quantize") == 1 and "changed since it was written" in done.warnings[0]


class Rewriting(Inline):
    """Changes a text behind the study's back, before a kind of job runs."""

    def __init__(self, kind: str, path: Path) -> None:
        super().__init__()
        self.kind, self.path = kind, path

    def submit(self, job: Job) -> None:
        super().submit(job)
        if job.kind == self.kind:
            self.path.write_text("Something else altogether. " * 20)


@pytest.mark.parametrize("kind", ["reference", "quantize"])
def test_a_text_that_changes_meanwhile_is_not_read_under_its_old_name(
    make_study: MakeStudy, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("What was planned. " * 30)
    given = {"texts": str(path)} if kind == "reference" else {"calibration": {"text": str(path), "tokens": 64}}
    study = make_study(recipes="int4-g32", algorithms="gptq", **given)
    done, _ = sweep(study, tmp_path / "out", Rewriting(kind, path))
    assert {line["error"]["what"] for line in done.failed} == {"the text changed while the study ran"}
    assert [line["kind"] for line in done.failed][-1] == "candidate"


class Interrupted(Inline):
    """Ctrl-C comes while the last job is at work."""

    def next(self) -> Outcome:
        if self.jobs[-1].kind == "quality":
            raise KeyboardInterrupt
        return super().next()


def test_what_is_finished_survives_an_interruption(make_study: MakeStudy, tmp_path: Path) -> None:
    engine = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        sweep(make_study(), tmp_path / "out", engine)
    assert engine.stopped == 1
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["reference"]
    _, after = sweep(make_study(), tmp_path / "out")
    assert [job.kind for job in after.jobs] == ["quality"]


class Wide(Inline):
    """Takes many jobs and ends the last one first."""

    slots = 9

    def __init__(self) -> None:
        super().__init__()
        self.at_work: list[Job] = []
        self.most = 0

    def submit(self, job: Job) -> None:
        super().submit(job)
        self.at_work.append(job)
        self.most = max(self.most, len(self.at_work))

    def next(self) -> Outcome:
        from llmquant.study.worker import run

        job = self.at_work.pop()
        return Outcome(job, **run(job))


def test_nothing_starts_before_what_it_needs(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study(recipes="int8,int4-g32,int3-g32", algorithms="rtn")
    wide, engine = sweep(study, tmp_path / "wide", Wide())
    narrow, _ = sweep(study, tmp_path / "narrow")
    assert engine.most >= 4 and not wide.failed
    quality = [(line["label"], line["perplexity"], line["kl"]) for line in wide.results]
    assert quality == [(line["label"], line["perplexity"], line["kl"]) for line in narrow.results]


def test_algorithms_that_read_and_budgets_run_too(make_study: MakeStudy, tmp_path: Path, text: Path) -> None:
    given = {"recipes": "int4-g32", "algorithms": "gptq,awq+rtn", "bits": 4.75, "schemes": "int3-g32,int8"}
    study = make_study(**given, calibration={"text": str(text), "tokens": 256})
    done, _ = sweep(study, tmp_path / "out")
    assert not done.failed, done.failed
    labels = [line["label"] for line in done.results if line["kind"] == "candidate"]
    assert labels == ["int4-g32 gptq", "int4-g32 awq+rtn", "4.75 bits gptq", "4.75 bits awq+rtn"]
    assert [line["bits_budget"] for line in done.results[1:]] == [None, None, 4.75, 4.75]
    assert all(line["kl"]["mean"] > 0 and line["layers"] for line in done.results[1:])


def test_models_and_texts_that_do_not_exist_stop_a_study_before_it_starts(
    make_study: MakeStudy, tmp_path: Path, plain: Path
) -> None:
    with pytest.raises(StudyError, match="no such model folder") as caught:
        sweep(make_study(models=[str(plain), "./nowhere/at-all"]), tmp_path / "out")
    assert "models[1]" in str(caught.value.where)
    with pytest.raises(StudyError) as caught:
        sweep(make_study(texts="missing.txt"), tmp_path / "out")
    assert "texts[0]" in str(caught.value.where)


def test_two_models_of_one_name_are_told_apart(make_study: MakeStudy, tmp_path: Path, plain: Path) -> None:
    copy = shutil.copytree(plain, tmp_path / "copy" / plain.name)
    done, engine = sweep(make_study(models=[str(plain), str(copy)]), tmp_path / "out")
    assert {line["model"] for line in done.results} == {str(plain), str(copy)}
    assert len(engine.jobs) == 3, "equal bytes are one model"


@pytest.mark.slow
def test_sizes_come_from_a_new_process(make_study: MakeStudy, tmp_path: Path, plain: Path) -> None:
    study = make_study(metrics="size", speed={"prompt": 8})
    done = run_study(study, tmp_path / "out", threads=1)
    sizes = {line["label"]: line["bytes"] for line in done.results}
    assert sizes["16 bits"]["disk"] == (plain / "model.safetensors").stat().st_size
    assert sizes["16 bits"]["bits_per_weight"] == 16 and 8 < sizes["int8"]["bits_per_weight"] < 9
    assert 50e6 < sizes["int8"]["peak_rss"] < 2e9 and done.results[0]["speed"] is None
