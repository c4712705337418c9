"""A plan says beforehand what a run does and takes; a run that cannot do with what there is, is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import CONFIGS, Folders, rtn
from safetensors.torch import save_file

from llmquant.checkpoint import stream
from llmquant.checkpoint.crew import Crew
from llmquant.checkpoint.needs import memory_free, memory_needed, resident
from llmquant.checkpoint.plan import plan_checkpoint
from llmquant.checkpoint.stream import quantize_checkpoint
from llmquant.errors import ConfigError, NoSpaceError, NotEnoughMemoryError


@pytest.mark.parametrize("family", ["llama", "llama-tied", "mixtral", "gpt2"])
def test_a_plan_is_what_the_run_reports(family: str, folders: Folders, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = plan_checkpoint(folders(family), out, CONFIGS[family], max_shard_bytes=20_000)
    assert not list(tmp_path.iterdir())
    report = quantize_checkpoint(folders(family), out, CONFIGS[family], max_shard_bytes=20_000)
    assert (plan.bytes_before, plan.bytes_after) == (report.bytes_before, report.bytes_after)
    assert plan.kept == report.skipped and plan.warnings == report.warnings
    assert sum(scheme.weights for scheme in plan.schemes) == len(report.quantized)
    assert sum(s.bytes_after for s in plan.schemes) == sum(w.bytes_after for w in report.quantized.values())
    assert plan.shards == len(list(out.glob("*.safetensors"))) > 1
    assert plan.needs.disk == report.bytes_after
    assert json.loads(json.dumps(plan.to_dict()))["needs"]["peak_memory"] == plan.needs.peak_memory


def test_a_plan_names_what_must_be_calibrated(folders: Folders, tmp_path: Path) -> None:
    plan = plan_checkpoint(folders("llama"), tmp_path / "out", "s8-int8")
    assert plan.calibrated and set(plan.calibrated.values()) == {("low",)}
    assert not plan_checkpoint(folders("llama"), tmp_path / "out", "int8").calibrated


# ---------------------------------------------------------------------------------- memory

RUN = """
import re, sys
from pathlib import Path
from llmquant.checkpoint.origin import Origin
from llmquant.checkpoint.plan import plan_checkpoint
from llmquant.checkpoint.stream import quantize_checkpoint
source, out = sys.argv[1:]
if out == "plan":
    print(plan_checkpoint(Origin(source, raw=True), out, "int8").needs.peak_memory)
else:
    quantize_checkpoint(Origin(source, raw=True), out, "int8")
    print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024)
"""


@pytest.mark.parametrize("rows", [256, pytest.param(32_768, marks=pytest.mark.slow)])
def test_peak_memory_is_foreseen(rows: int, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    weights = {f"layers.{i}.weight": torch.ones(rows, 2048, dtype=torch.bfloat16) for i in range(3)}
    save_file(weights, source / "model.safetensors")
    del weights
    (source / "config.json").write_text('{"model_type": "strange"}')
    expected, measured = (
        int(subprocess.run([sys.executable, "-c", RUN, source, out], check=True, capture_output=True).stdout)
        for out in ("plan", tmp_path / "out")
    )
    # The bound must hold, and be no idle one: 64 MB of it are for what an algorithm needs beside its weight.
    assert 0.75 * expected < measured < 1.05 * expected


def test_memory_of_several_jobs() -> None:
    assert memory_needed([1, 5, 3], Crew()) == 5
    assert memory_needed([1, 5, 3], Crew(jobs=2)) == 8
    assert memory_needed([], Crew()) == 0
    now, most = resident()
    assert 50e6 < now <= most * 1.01


def _system(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_free_memory_is_that_of_the_narrowest_limit(tmp_path: Path) -> None:
    assert memory_free(tmp_path) is None
    root = _system(tmp_path, proc__meminfo="MemTotal: 9000 kB\nMemAvailable:  8000 kB\n")
    assert memory_free(root) == 8_192_000
    (root / "proc/self").mkdir()
    (root / "proc/self/cgroup").write_text("0::/a/b\n")
    for group, limit in (("", "max"), ("a", "6000000"), ("a/b", "max")):
        folder = root / "sys/fs/cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text("2000000\n")
    assert memory_free(root) == 4_000_000
    (root / "sys/fs/cgroup/a/memory.stat").write_text("anon 5\ninactive_file 500000\n")
    assert memory_free(root) == 4_500_000
    (root / "sys/fs/cgroup/a/memory.current").write_text("9000000\n")
    assert memory_free(root) == 0


def test_free_memory_within_old_control_groups(tmp_path: Path) -> None:
    root = _system(tmp_path, proc__meminfo="MemAvailable:  8000 kB\n", proc__self__cgroup="5:cpu:/x\n4:memory:/x\n")
    folder = root / "sys/fs/cgroup/memory/x"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("3000000")
    (folder / "memory.usage_in_bytes").write_text("1000000")
    assert memory_free(root) == 2_000_000
    (folder / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
    assert memory_free(root) == 8_192_000


def test_too_little_memory_is_refused_before_anything_is_written(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "memory_free", lambda: 1000)
    assert plan_checkpoint(folders("llama"), tmp_path / "out", "int8").needs.memory_free == 1000
    with pytest.raises(NotEnoughMemoryError, match="memory") as error:
        quantize_checkpoint(folders("llama"), tmp_path / "out", "int8")
    assert "--ignore-memory" in str(error.value.hint) and not list(tmp_path.iterdir())
    quantize_checkpoint(folders("llama"), tmp_path / "out", "int8", ignore_memory=True)


def test_too_little_disk_is_refused_with_the_plans_number(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = plan_checkpoint(folders("llama"), tmp_path / "out", rtn("int8")).needs
    monkeypatch.setattr(stream, "disk_free", lambda folder: needs.disk - 1)
    with pytest.raises(NoSpaceError, match="the disk has"):
        quantize_checkpoint(folders("llama"), tmp_path / "out", rtn("int8"), ignore_memory=True)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(stream, "disk_free", lambda folder: needs.disk)
    quantize_checkpoint(folders("llama"), tmp_path / "out", rtn("int8"))


def test_a_folder_has_no_revision(folders: Folders, tmp_path: Path) -> None:
    from llmquant.checkpoint.origin import Origin

    with pytest.raises(ConfigError, match="revision"):
        plan_checkpoint(Origin(folders("llama"), revision="main"), tmp_path / "out", "int8")
