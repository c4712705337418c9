"""What is installed: the wheel, in an environment that never saw the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment with the wheel in it; dependencies come from this environment's folder.

    Folders on PYTHONPATH have their .pth files ignored, so this environment's editable install stays out of sight.
    """
    work = tmp_path_factory.mktemp("package")
    source = work / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "demo", "build", "dist", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheels = work / "wheels"
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(wheels), str(source)]
    subprocess.run(build, check=True, cwd=work)
    subprocess.run([sys.executable, "-m", "venv", str(work / "venv")], check=True)
    wheel = next(wheels.glob("*.whl"))
    python = work / "venv" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "-q", "install", "--no-deps", "--no-index", str(wheel)], check=True)
    return python.parent


def run(installed: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"], "COLUMNS": "200"}
    done = subprocess.run(
        [str(installed / command[0]), *command[1:]],
        capture_output=True,
        text=True,
        env=environment,
        cwd=installed,
        check=True,
    )
    return done.stdout


@pytest.mark.slow
def test_the_wheel_brings_the_recipes(installed: Path) -> None:
    where = run(installed, "python", "-c", "import llmquant; print(llmquant.__file__)").strip()
    assert Path(where).is_relative_to(installed.parent), "the source tree was imported, not the wheel"
    listed = run(installed, "llmquant", "recipes")
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert path.stem in listed
        assert yaml.safe_load(run(installed, "llmquant", "recipes", path.stem)) == yaml.safe_load(path.read_text())


@pytest.mark.slow
def test_the_wheel_brings_what_registers_it_in_other_programs(installed: Path) -> None:
    seen = "import sys; print('llmquant' in sys.modules, sys.executable)"
    assert run(installed, "llmquant", "run", "--", "python", "-c", seen).split() == ["True", str(installed / "python")]


@pytest.mark.slow
def test_the_wheel_is_marked_as_typed(installed: Path) -> None:
    check = "import importlib.resources as r; print(r.files('llmquant').joinpath('py.typed').is_file())"
    assert run(installed, "python", "-c", check).strip() == "True"
