"""Processes and Ray tasks: results come back, errors come back, and a worker that dies is a failed cell."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmquant.errors import ConfigError, LlmQuantError
from llmquant.study.engines.local import WORKER, LocalEngine
from llmquant.study.job import Job, Outcome

from .conftest import MakeStudy, sweep

# Workers that need no torch: what a job's title says is done.
TALK = """
import json, os, signal, sys
for line in sys.stdin:
    asked = json.loads(line)
    open(asked["log"], "a").write("worked\\n")
    title = asked["job"]["title"]
    print(json.dumps({"progress": [1, 2]}), flush=True)
    if title == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if title == "status":
        sys.exit(3)
    if title == "torn":
        print('{"resu', end="", flush=True)
        os._exit(0)
    if title == "error":
        print(json.dumps({"error": {"what": "bad"}}), flush=True)
    else:
        print(json.dumps({"result": {"pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}}), flush=True)
"""


def job(title: str, **given: Any) -> Job:
    return Job("quality", title, title, {}, **given)


def outcomes(folder: Path, jobs: list[Job], slots: int = 1) -> dict[str, Outcome]:
    """Title -> what became of the job."""
    seen: list[tuple[str, int, int]] = []
    engine = LocalEngine(
        slots,
        lambda key: folder / key,
        lambda *step: seen.append((step[0].title, *step[1:])),
        (sys.executable, "-c", TALK),
    )
    try:
        found = {}
        for one in jobs:
            engine.submit(one)
            if len(jobs) == 1 or slots == 1:
                outcome = engine.next()
                found[outcome.job.title] = outcome
        for _ in range(len(jobs) - len(found)):
            outcome = engine.next()
            found[outcome.job.title] = outcome
    finally:
        engine.stop()
        engine.stop()
    assert {title for title, *_ in seen} == {one.title for one in jobs}
    return found


def test_results_and_errors_come_back_and_a_worker_serves_on(tmp_path: Path) -> None:
    found = outcomes(tmp_path, [job("a"), job("error"), job("b", threads=1), job("c", threads=3), job("d", alone=True)])
    results = {title: outcome.result for title, outcome in found.items() if outcome.result}
    assert found["error"].error == {"what": "bad"} and set(results) == {"a", "b", "c", "d"}
    assert results["a"] == results["b"] and results["a"]["pid"] != results["c"]["pid"]
    assert results["c"]["threads"] == "3" and results["d"]["pid"] not in (results["b"]["pid"], results["c"]["pid"])
    assert (tmp_path / "a").read_text() == "worked\n"


@pytest.mark.parametrize(
    ("title", "said"), [("killed", "killed by SIGKILL"), ("status", "status 3"), ("torn", "status 0")]
)
def test_a_worker_that_dies_is_a_failed_job(tmp_path: Path, title: str, said: str) -> None:
    found = outcomes(tmp_path, [job("a"), job(title), job("b")])
    error = found[title].error
    assert error is not None and said in error["what"] and error["kind"] == "WorkerDiedError"
    assert error["where"] == str(tmp_path / title)
    assert ("memory" in str(error["hint"])) == (title == "killed")
    assert found["a"].result and found["b"].result and found["a"].result["pid"] != found["b"].result["pid"]


def test_several_work_at_once(tmp_path: Path) -> None:
    found = outcomes(tmp_path, [job("a"), job("killed"), job("b")], slots=3)
    assert found["killed"].error and len({str(found[t].result) for t in "ab"}) == 2


def test_a_worker_ends_with_its_driver() -> None:
    worker = subprocess.Popen(WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert worker.stdin is not None
    worker.stdin.close()
    assert worker.wait(timeout=60) == 0


def test_a_worker_leaves_ctrl_c_to_its_driver(tmp_path: Path) -> None:
    worker = subprocess.Popen(WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdin is not None and worker.stdout is not None
    unknown = {"kind": "nonsense", "key": "k", "title": "t", "arguments": {}}
    for _ in range(2):
        worker.stdin.write(json.dumps({"job": unknown, "log": str(tmp_path / "log")}) + "\n")
        worker.stdin.flush()
        assert json.loads(worker.stdout.readline())["error"]["kind"] == "KeyError"
        os.kill(worker.pid, signal.SIGINT)
    worker.stdin.close()
    assert worker.wait(timeout=60) == 0
    assert "Traceback" in (tmp_path / "log").read_text()


def test_engines_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmquant.cli.sweep import choose_engine
    from llmquant.study.spec import Resources

    assert isinstance(choose_engine("local", None, 2, Resources())(Path, print), LocalEngine)
    with pytest.raises(ConfigError, match="no engine 'slurm'"):
        choose_engine("slurm", None, 1, Resources())
    with pytest.raises(ConfigError, match="--engine ray"):
        choose_engine("local", "host:1", 1, Resources())
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LlmQuantError, match="needs the package ray"):
        choose_engine("ray", None, 1, Resources())


# ---------------------------------------------------------------------------------- with Ray


@pytest.fixture
def ray_here(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ray on this machine, two processors, closed afterwards."""
    ray = pytest.importorskip("ray")
    yield ray
    ray.shutdown()


def make_ray(**resources: Any) -> Any:
    from llmquant.study.engines.ray import RayEngine
    from llmquant.study.spec import Resources

    return RayEngine(resources=Resources(**resources), num_cpus=2, object_store_memory=100_000_000)


@pytest.mark.slow
def test_a_study_on_ray_is_the_study_on_processes(ray_here: Any, make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study(recipes=["int8", "int4-g32"])
    there, _ = sweep(study, tmp_path / "ray", make_ray(retries=0))
    assert not ray_here.is_initialized(), "Ray was started by the engine and goes with it"
    here, _ = sweep(study, tmp_path / "here")
    assert not there.failed
    for one, two in zip(there.results, here.results, strict=True):
        assert all(one[name] == two[name] for name in ("label", "perplexity", "kl", "top1", "layers", "keys"))


DIES = """
import os, signal, sys
def die(event, arguments):
    if event == "os.rename" and str(arguments[1]).startswith("FOLDER"):
        with open("MARK", "a+") as file:
            file.write("tried\\n")
            file.seek(0)
            tries = len(file.readlines())
        if tries <= DEATHS:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(die)
"""


@pytest.mark.slow
@pytest.mark.parametrize("deaths", [1, 9])
def test_a_killed_task_is_tried_again_but_not_for_ever(
    ray_here: Any, make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaths: int
) -> None:
    """Workers are killed, `deaths` of them, at the moment when they would name the reference's finished file."""
    out, mark, site = tmp_path / "out", tmp_path / "mark", tmp_path / "site"
    site.mkdir()
    hook = DIES.replace("FOLDER", str(out / "references")).replace("MARK", str(mark)).replace("DEATHS", str(deaths))
    (site / "sitecustomize.py").write_text(hook)
    monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    done, _ = sweep(make_study(), out, make_ray(retries=2))
    assert mark.read_text().count("tried") == min(deaths + 1, 3)
    if deaths == 1:
        assert not done.failed and len(done.results) == 2
    else:
        assert [line["label"] for line in done.failed] == ["16 bits", "int8"]
        assert {line["error"]["kind"] for line in done.failed} == {"WorkerDiedError"}
