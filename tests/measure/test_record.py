import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmquant.measure import record as module
from llmquant.measure.divergence import ConfidenceBin, Divergence
from llmquant.measure.evaluate import Evaluation, NonFinite, Protocol
from llmquant.measure.memory import Footprint
from llmquant.measure.perplexity import Change, Perplexity
from llmquant.measure.record import build_record, machine, versions, write_record

PROTOCOL = Protocol("builtin", "ab12", 64, 3, None, 189, "bfloat16", "reference")
FOOTPRINT = Footprint(1000, 2000, 3000, 4.5, 4.25, None)
BINS = (ConfidenceBin(0.0, 0.5, 0, None), ConfidenceBin(0.5, 1.0, 189, 0.1))
COMPARED = Evaluation(
    Perplexity(11.0, 0.2, 189),
    Perplexity(10.0, 0.1, 189),
    Divergence(0.1, 0.05, 0.2, 0.4, 0.9, 0.01, BINS),
    0.97,
    0.02,
    1.5,
    Change(0.1, 0.004),
    NonFinite(0, 0),
    64,
)
ALONE = Evaluation(Perplexity(11.0, 0.2, 189), None, None, None, None, 1.5)

KEYS = {
    "": "schema model baseline protocol perplexity kl top1 delta_p_rms nonfinite logits_rows noise_floor speed bytes "
    "seconds processes versions machine",
    "protocol": "text text_sha256 context windows bos tokens_scored dtype backend",
    "perplexity": "value stderr baseline change change_stderr",
    "kl": "mean median p90 p99 max stderr by_confidence",
    "bytes": "disk weights peak_rss bits_per_weight bits_per_weight_without_embeddings bits_per_quantized_weight",
    "versions": "python torch transformers llmquant",
    "machine": "processor cores torch_threads cpu_capability memory",
}


def record_of(evaluation: Evaluation, baseline: str | None = None) -> dict[str, Any]:
    return build_record(
        model="m",
        baseline=baseline,
        protocol=PROTOCOL,
        evaluation=evaluation,
        footprint=FOOTPRINT,
        versions=versions(),
        machine=machine(),
    )


def test_the_keys_are_exactly_these_in_this_order() -> None:
    record = record_of(COMPARED, "b")
    for part, keys in KEYS.items():
        assert list(record[part] if part else record) == keys.split(), part
    assert list(record_of(ALONE)) == list(record)


@pytest.mark.parametrize("evaluation", [COMPARED, ALONE])
def test_a_record_survives_json(evaluation: Evaluation) -> None:
    record = record_of(evaluation)
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_the_values_are_the_evaluations() -> None:
    record = record_of(COMPARED, "b")
    assert (record["schema"], record["model"], record["baseline"]) == (2, "m", "b")
    assert record["perplexity"] == {
        "value": 11.0,
        "stderr": 0.2,
        "baseline": 10.0,
        "change": 0.1,
        "change_stderr": 0.004,
    }
    assert record["kl"]["p99"] == 0.4 and record["top1"] == 0.97 and record["seconds"] == 1.5
    assert record["kl"]["by_confidence"][0] == {"low": 0.0, "high": 0.5, "tokens": 0, "mean": None}
    assert (record["delta_p_rms"], record["nonfinite"]) == (0.02, {"logits": 0, "tokens": 0})
    assert (record["logits_rows"], record["processes"], record["noise_floor"], record["speed"]) == (64, 1, None, None)
    assert record["protocol"]["tokens_scored"] == 189 and record["bytes"]["bits_per_weight"] == 4.5


def test_without_a_baseline_its_figures_are_null() -> None:
    record = record_of(ALONE)
    assert (record["baseline"], record["kl"], record["top1"]) == (None, None, None)
    assert record["perplexity"] == {
        "value": 11.0,
        "stderr": 0.2,
        "baseline": None,
        "change": None,
        "change_stderr": None,
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_null(bad: float) -> None:
    bins = (ConfidenceBin(0.0, 1.0, 1, bad),)
    broken = Divergence(bad, 0.1, bad, bad, bad, bad, bins)
    record = record_of(
        replace(COMPARED, perplexity=Perplexity(bad, bad, 1), change=Change(bad, bad), kl=broken, delta_p_rms=bad), "b"
    )
    assert set(record["perplexity"].values()) == {None, 10.0} and record["perplexity"]["baseline"] == 10.0
    assert record["kl"]["mean"] is record["delta_p_rms"] is record["kl"]["by_confidence"][0]["mean"] is None
    assert record["kl"]["median"] == 0.1
    json.dumps(record, allow_nan=False)


def test_a_record_is_a_function_of_its_arguments() -> None:
    assert record_of(COMPARED, "b") == record_of(COMPARED, "b")


def test_versions_of_packages_that_are_not_there_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise module.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(module.importlib.metadata, "version", missing)
    found = versions()
    assert found.pop("python") == module.platform.python_version() and set(found.values()) == {"unknown"}


def test_the_machine_is_plausible() -> None:
    described = machine()
    assert described["processor"] and described["cpu_capability"]
    assert described["torch_threads"] >= 1 and 1 <= described["cores"] < 10_000
    assert described["memory"] is None or 1 << 28 < described["memory"] < 1 << 45


def test_writing_makes_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "record.json"
    for evaluation in (COMPARED, ALONE):
        write_record(record_of(evaluation), path)
        assert json.loads(path.read_text(encoding="utf-8")) == record_of(evaluation)
        assert list(path.parent.iterdir()) == [path]


def test_nan_is_never_written_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text("old")
    with pytest.raises(ValueError):
        write_record({"seconds": math.nan}, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_failure_to_replace_leaves_the_old_file_and_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    path.write_text("old")

    def fail(source: Path, target: Path) -> None:
        assert json.loads(Path(source).read_text()) == {"a": 1} and Path(target) == path
        raise OSError("interrupted")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="interrupted"):
        write_record({"a": 1}, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
