"""A save that is killed at any moment leaves the old model, the new model, or something that refuses to load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from models import Bytes, Folders, build, disk, load, manifest, rtn, state, weights
from safetensors import SafetensorError

from llmquant import quantize_
from llmquant.checkpoint.inspect import inspect_checkpoint
from llmquant.checkpoint.stream import quantize_checkpoint
from llmquant.errors import CheckpointError, LlmQuantError

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
OPTIONS = ["--recipe", "int4-g32", "--algorithm", "rtn", "--max-shard-size", "20KB"]


def killed_at_every_moment(root: Path, old: Path | None, **action: Any) -> list[Path]:
    """The folders of all attempts, the last of which ended well."""
    root.mkdir()
    command = [sys.executable, str(HERE / "killer.py"), str(root), str(old or "-"), json.dumps(action)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    logs = "".join(path.read_text()[-2000:] for path in root.glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    count = int(done.stdout)
    assert count > 5, "hardly a moment was seen: the hooks no longer fit"
    moments = [(root / f"{i}.txt").read_text() for i in range(count)]
    assert len(set(moments)) > 5
    for wanted in ("half of", "torn", "after"):
        assert any(moment.startswith(wanted) for moment in moments), wanted
    return [root / str(i) for i in range(count + 1)]


def what_lies(folder: Path, **candidates: dict[str, Bytes]) -> str:
    """Which of the candidates a complete, verified, loadable folder holds."""
    inspect_checkpoint(folder)
    load(folder)
    (found,) = [name for name, tensors in candidates.items() if disk(folder) == tensors]
    return found


# ---------------------------------------------------------------------------------- a new folder


@pytest.mark.slow
@pytest.mark.parametrize("do", ["quantize", "save"])
def test_a_killed_command_leaves_no_folder_or_a_complete_one(do: str, folders: Folders, tmp_path: Path) -> None:
    if do == "quantize":
        source, options = folders("llama-tied"), OPTIONS
    else:
        source, options = folders.quantized("llama-tied"), {"max_shard_size": "10KB"}
    attempts = killed_at_every_moment(tmp_path / "k", None, do=do, source=str(source), options=options)
    wanted = disk(attempts[-1] / "out")
    seen = Counter(what_lies(f / "out", new=wanted) if (f / "out").exists() else "absent" for f in attempts)
    assert set(seen) == {"absent", "new"}
    assert sorted(os.listdir(attempts[-1])) == ["out"]
    if do == "save":
        assert wanted == disk(source)
        return
    quantize_checkpoint(source, tmp_path / "wanted", rtn("int4-g32"), max_shard_bytes=20_000)
    files = everything(tmp_path / "wanted")
    assert everything(attempts[-1] / "out") == files
    for folder in attempts:  # and each is gone on with
        if not (folder / "out").exists():
            quantize_checkpoint(source, folder / "out", rtn("int4-g32"), max_shard_bytes=20_000)
            assert os.listdir(folder) == ["out"]
        assert everything(folder / "out") == files, folder


def everything(folder: Path) -> dict[str, bytes]:
    """The bytes of every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("do", ["quantize", "save"])
def test_with_overwrite_the_old_folder_stays_until_the_new_one_is_there(
    do: str, folders: Folders, tmp_path: Path
) -> None:
    old = folders.quantized("llama-tied", "int8")
    if do == "quantize":
        source, options = folders("llama-tied"), [*OPTIONS, "--overwrite"]
    else:
        source, options = folders.quantized("llama-tied"), {"max_shard_size": "10KB"}
    attempts = killed_at_every_moment(tmp_path / "k", old, do=do, source=str(source), options=options)
    candidates = {"old": disk(old), "new": disk(attempts[-1] / "out")}
    seen: Counter[str] = Counter()
    for folder in attempts:
        if (folder / "out").exists():
            seen[what_lies(folder / "out", **candidates)] += 1
        else:  # between the two renames: both are there, complete, under their temporary names
            (aside,), (draft,) = folder.glob(".out.old-*"), (*folder.glob(".out.draft-*"), *folder.glob("*/draft"))
            assert what_lies(aside, **candidates) == "old" and what_lies(draft, **candidates) == "new"
            seen["aside"] += 1
    assert set(seen) == {"old", "new", "aside"} and seen["aside"] == 1
    assert sorted(os.listdir(attempts[-1])) == ["out"]


PAUSE = """
import sys
def pause(event, arguments):
    if event == "EVENT" and "MARK" in str(arguments[event == "os.rename"]):
        print("ready", flush=True)
        sys.stdin.read()
sys.addaudithook(pause)
"""


@pytest.mark.parametrize(
    ("event", "mark"), [("open", "model-00002-of"), ("open", "config.json"), ("os.rename", "/out")]
)
def test_the_command_itself_killed_from_outside(event: str, mark: str, folders: Folders, tmp_path: Path) -> None:
    """`python -m llmquant quantize`, stopped at a moment and killed there; then run again over what it left."""
    work = tmp_path / "work"
    mark = str(work) if mark == "/out" else f"{work}/out.partial/draft/{mark}"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(PAUSE.replace("EVENT", event).replace("MARK", mark))
    command = [sys.executable, "-m", "llmquant", "quantize", str(folders("llama-tied")), "-o", str(work / "out")]
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [*command, *OPTIONS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )
    try:
        assert process.stdout is not None
        assert any(line.strip() == "ready" for line in process.stdout), process.communicate()[1]
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert os.listdir(work) == ["out.partial"]
    for out in (work / "out", work / "straight"):
        quantize_checkpoint(folders("llama-tied"), out, rtn("int4-g32"), max_shard_bytes=20_000)
    assert everything(work / "out") == everything(work / "straight")
    assert sorted(os.listdir(work)) == ["out", "straight"]


# ---------------------------------------------------------------------------------- plain save_pretrained


@pytest.fixture(scope="module")
def pair(folders: Folders) -> tuple[Path, Path]:
    """Two quantized models whose tensors have equal names, dtypes and shapes, and all differ."""
    made = []
    for seed in (0, 1):
        folder = folders.root / f"pair-{seed}"
        model = build("llama-tied", seed=seed)
        quantize_(model, rtn({"_embedding": "int8", "_default": "int4-g32"}))
        model.save_pretrained(folder, max_shard_size="15KB")
        made.append(folder)
    assert len(list(made[0].glob("*.safetensors"))) > 3
    old, new = (disk(folder) for folder in made)
    assert {k: v[:2] for k, v in old.items()} == {k: v[:2] for k, v in new.items()}
    assert not [key for key in old if old[key] == new[key]]
    return made[0], made[1]


def outcome(folder: Path, old: dict[str, Bytes], new: dict[str, Bytes]) -> str:
    """What loading gives: exactly one of the models, or an error that a user can act on."""
    try:
        found = state(load(folder))
    except (LlmQuantError, OSError, SafetensorError, json.JSONDecodeError) as error:
        return type(error).__name__
    return "old" if found == old else "new" if found == new else "a mix"


SIZES = [("15KB", "15KB"), ("15KB", "25KB"), ("25KB", "15KB"), ("15KB", "1GB"), ("1GB", "1GB")]


@pytest.mark.parametrize("sizes", SIZES[:1], ids=str)
def test_plain_save_pretrained_never_leaves_a_mix(
    sizes: tuple[str, str], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    never_a_mix(sizes, pair, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
def test_plain_save_pretrained_never_leaves_a_mix_whatever_the_shards(
    sizes: tuple[str, str], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    never_a_mix(sizes, pair, tmp_path)


def never_a_mix(sizes: tuple[str, str], pair: tuple[Path, Path], tmp_path: Path) -> None:
    before, after = load(pair[0]), load(pair[1])
    before.save_pretrained(tmp_path / "old", max_shard_size=sizes[0])
    options = {"max_shard_size": sizes[1]}
    attempts = killed_at_every_moment(
        tmp_path / "k", tmp_path / "old", do="save_pretrained", source=str(pair[1]), options=options
    )
    seen = [outcome(folder / "out", state(before), state(after)) for folder in attempts]
    assert "a mix" not in seen
    assert seen[0] == "old" and seen[-1] == "new" and "CheckpointError" in seen
    first = seen.index("new")
    assert "old" not in seen[first:] and set(seen[first:]) <= {"new", "JSONDecodeError"}  # a torn index


@pytest.mark.slow
def test_a_killed_save_over_a_plain_model_is_refused(folders: Folders, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The folder says it is quantized, the shards are still the old ones in float."""
    plain = build("llama-tied", seed=5)
    plain.save_pretrained(tmp_path / "old", max_shard_size="40KB")
    attempts = killed_at_every_moment(
        tmp_path / "k",
        tmp_path / "old",
        do="save_pretrained",
        source=str(pair[1]),
        options={"max_shard_size": "15KB"},
    )
    seen = [outcome(f / "out", state(load(tmp_path / "old")), state(load(pair[1]))) for f in attempts]
    assert seen[0] == "old" and seen[-1] == "new"
    assert set(seen) == {"old", "new", "CheckpointError", "HeaderError", "OSError", "JSONDecodeError"}


def test_every_mixture_of_two_saves_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Any subset of the new files over the old ones, but all or none."""
    old, new = pair
    names = sorted(p.name for p in old.glob("*.safetensors"))
    for bits in range(2 ** (len(names) + 1)):
        folder = tmp_path / str(bits)
        folder.mkdir()
        for i, name in enumerate([*names, "config.json"]):
            source = new if bits >> i & 1 else old
            (folder / name).write_bytes((source / name).read_bytes())
        (folder / "model.safetensors.index.json").write_bytes((old / "model.safetensors.index.json").read_bytes())
        if bits in (0, 2 ** (len(names) + 1) - 1):
            assert [fqn for fqn, _ in weights(load(folder))]
            assert manifest(folder) == manifest(new if bits else old)
        else:
            with pytest.raises(CheckpointError, match="another save"):
                inspect_checkpoint(folder)
            with pytest.raises(CheckpointError, match="another save"):
                load(folder)
