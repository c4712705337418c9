"""Keys change with everything that figures depend on, and with nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmquant.measure import record
from llmquant.study import keys
from llmquant.study.keys import Digests, content_key, folder_key, model_key
from llmquant.study.plan import Plan, plan_study
from llmquant.study.store import Store

from .conftest import MakeStudy, write_model

PLAIN = st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=4)
JSON = PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(st.text(max_size=3), PLAIN, max_size=3)


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from("abcdef"), JSON, min_size=2, max_size=4))
def test_the_order_of_keys_does_not_matter(parts: dict[str, Any]) -> None:
    turned = dict(reversed(parts.items()))
    assert list(turned) != list(parts) and content_key("x", **parts) == content_key("x", **turned)
    assert content_key("x", **parts) != content_key("y", **parts)


REFERENCE = {"model": "m", "text": "t", "context": 32, "windows": 2, "dtype": "float32", "threads": 1}
QUANTIZED = {
    **{"model": "m", "weights": {"a": {"format": "int4"}}, "changes": {"rotate": None}, "threads": None},
    **{"calibration": {"sha256": "s", "tokens": 1, "seed": 0}, "budget": None},
}
QUALITY = {"quantized": "q", "reference": "r", "dtype": "float32"}
TASKS = {"model": "m", "names": {"names": ["a"]}, "dtype": "float32", "threads": 1}
PERFORMANCE = {"model": "m", "plain": "p", "asked": {"prompt": 3}, "threads": 1}
KEYS = {
    keys.reference_key: REFERENCE,
    keys.quantized_key: QUANTIZED,
    keys.quality_key: QUALITY,
    keys.tasks_key: TASKS,
    keys.performance_key: PERFORMANCE,
    keys.noise_key: {"reference": "r"},
}


@given(st.data())
def test_every_field_of_every_key_matters(data: st.DataObject) -> None:
    make: Any = data.draw(st.sampled_from(list(KEYS)))
    fields: dict[str, Any] = KEYS[make]
    name = data.draw(st.sampled_from(sorted(fields)))
    other = data.draw(JSON.filter(lambda value: value != fields[name] and repr(value) != repr(fields[name])))
    assert make(**fields) == make(**dict(fields))
    assert make(**fields) != make(**{**fields, name: other})


@pytest.mark.parametrize("schema", ["SCHEMA", "versions"])
def test_metrics_and_versions_matter(monkeypatch: pytest.MonkeyPatch, schema: str) -> None:
    before = keys.reference_key(**REFERENCE)  # type: ignore[arg-type]
    other: Any = 99 if schema == "SCHEMA" else lambda: {"torch": "0", "python": "0"}
    monkeypatch.setattr(record, schema, other)
    assert keys.reference_key(**REFERENCE) != before  # type: ignore[arg-type]


def test_the_version_of_python_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    before, found = keys.reference_key(**REFERENCE), record.versions()  # type: ignore[arg-type]
    monkeypatch.setattr(record, "versions", lambda: {**found, "python": "9"})
    assert keys.reference_key(**REFERENCE) == before  # type: ignore[arg-type]


def test_a_model_is_its_bytes_wherever_it_lies(plain: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(plain, tmp_path / "other-name")
    (copy / "README.md").write_text("nothing that counts")
    assert model_key(copy, Digests()) == model_key(plain, Digests())
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        changed = shutil.copytree(plain, tmp_path / name)
        content = bytearray((changed / name).read_bytes())
        content[-1] ^= 1
        (changed / name).write_bytes(content)
        assert model_key(changed, Digests()) != model_key(plain, Digests())


def test_hashes_are_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, digests = tmp_path / "a", Digests()
    path.write_text("one")
    first = digests(path)
    monkeypatch.setattr(keys, "digest_file", lambda path: "computed")
    assert Digests(digests.known)(path) == first
    os.utime(path, ns=(1, 1))
    assert digests(path) == "computed"


def test_a_folder_of_tasks_is_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "t" / "deep").mkdir(parents=True)
    (tmp_path / "t" / "deep" / "a.yaml").write_text("task: a")
    before = folder_key(tmp_path / "t", Digests())
    (tmp_path / "t" / "deep" / "a.yaml").write_text("task: b")
    assert folder_key(tmp_path / "t", Digests()) != before


# ---------------------------------------------------------------------------------- of whole studies


def parts_of(plan: Plan, label: str) -> dict[str, str]:
    (line,) = [line for line in plan.lines if line.label == label]
    return dict(line.keys)


def planned(make_study: MakeStudy, tmp_path: Path, threads: int = 1, **given: Any) -> Plan:
    return plan_study(make_study(**given), Store(tmp_path / "out"), threads)


def test_recipes_of_equal_content_share_a_cell_whatever_they_are_called(make_study: MakeStudy, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("llmquant_recipe: 1\ndescription: other words\nweights: {'re:.*proj': int4-g32, _default: int8}\n")
    plan = planned(make_study, tmp_path, recipes=["int4-g32", str(mine), "int4-g64"])
    assert parts_of(plan, "int4-g32") == parts_of(plan, str(mine)) != parts_of(plan, "int4-g64")
    assert [job.kind for job in plan.jobs.values()].count("quality") == 2


def test_names_and_order_of_a_study_do_not_matter(make_study: MakeStudy, tmp_path: Path) -> None:
    one = planned(make_study, tmp_path, recipes="int8,int4-g32", bits="4.5,5", schemes="int3-g32,int8", name="a")
    two = planned(make_study, tmp_path, recipes="int4-g32,int8", bits="5,4.5", schemes="int8,int3-g32", name="b")
    assert set(one.jobs) == set(two.jobs)


CHANGES: dict[str, dict[str, Any]] = {
    "context": {"context": 16},
    "windows": {"windows": 1},
    "dtype": {"dtype": "bfloat16"},
    "reference": {"reference": {"dtype": "bfloat16"}},
    "algorithm": {"algorithms": "rtn"},
    "text": {"texts": "builtin"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_figures_depend_on_makes_another_cell(make_study: MakeStudy, tmp_path: Path, change: str) -> None:
    label = "int8 rtn" if change == "algorithm" else "int8"
    before = parts_of(planned(make_study, tmp_path), "int8")
    after = parts_of(planned(make_study, tmp_path, **CHANGES[change]), label)
    assert before["quality"] != after["quality"]
    assert (before["quantize"] != after["quantize"]) == (change == "algorithm")


def test_a_text_is_its_bytes(make_study: MakeStudy, tmp_path: Path, text: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_bytes(text.read_bytes())
    one, two = (parts_of(planned(make_study, tmp_path, texts=str(path)), "int8") for path in (text, copy))
    assert one == two
    copy.write_bytes(text.read_bytes() + b"!")
    assert parts_of(planned(make_study, tmp_path, texts=str(copy)), "int8")["quality"] != one["quality"]


def test_calibration_matters_to_those_that_read_it_alone(make_study: MakeStudy, tmp_path: Path) -> None:
    def keyed(**calibration: Any) -> tuple[str, str, str]:
        given = {"recipes": "int4-g32", "algorithms": "search,gptq", "bits": "4.5", "schemes": "int3-g32,int8"}
        plan = planned(make_study, tmp_path, **given, calibration=calibration)
        labels = ("int4-g32 search", "int4-g32 gptq", "4.5 bits search")
        one, two, three = (parts_of(plan, label)["quantize"] for label in labels)
        return one, two, three

    before = keyed()
    for change in ({"seed": 1}, {"tokens": 99}):
        after = keyed(**change)
        assert after[0] == before[0] and after[1] != before[1] and after[2] != before[2]


def test_threads_matter_where_a_model_runs(make_study: MakeStudy, tmp_path: Path) -> None:
    given = {"recipes": "int4-g32", "algorithms": "search,gptq"}
    one, two = (planned(make_study, tmp_path, threads=threads, **given) for threads in (1, 2))
    for label, same in (("int4-g32 search", True), ("int4-g32 gptq", False)):
        assert (parts_of(one, label)["quantize"] == parts_of(two, label)["quantize"]) == same
        assert parts_of(one, label)["quality"] != parts_of(two, label)["quality"]


def test_another_model_is_another_study(make_study: MakeStudy, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=1)
    one, two = planned(make_study, tmp_path), planned(make_study, tmp_path, models=str(other))
    assert not set(one.jobs) & set(two.jobs)
