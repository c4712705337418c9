"""The comparisons with others: right set-ups are timed, wrong ones are not. Here only with what our environment has."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[2] / "evals" / "bench"


@pytest.fixture
def peer_worker(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("peer_worker")


ORDER = {"rows": 64, "columns": 96, "m": 3, "megabytes": 0.03, "threads": 1}


@pytest.mark.parametrize("name", ["torch-bf16", "torch-int4pack", "llmquant-int4-g32", "llmquant-int8"])
def test_a_right_result_is_accepted(peer_worker: ModuleType, name: str) -> None:
    peer, known = peer_worker.set_up({"peer": name, **ORDER})
    assert known["copies"] >= 2 and known["copies"] * known["bytes"] >= 30_000
    assert 1e-4 < known["error"] < 1e-2  # bfloat16 inputs: neither exact nor wrong
    peer.run()


@pytest.mark.parametrize("rolled", [0, 1])
def test_a_wrong_result_is_refused(peer_worker: ModuleType, monkeypatch: pytest.MonkeyPatch, rolled: int) -> None:
    def family(kind: str, job: object) -> object:
        right = peer_worker.torch_peer("bf16", job)
        decoded = np.roll(right.decoded, 1, 0) if kind == "wrong" else right.decoded
        return right._replace(decoded=decoded, rolled=rolled)

    monkeypatch.setitem(peer_worker.FAMILIES, "made", family)
    if not rolled:
        peer_worker.set_up({"peer": "made-right", **ORDER})
    with pytest.raises(RuntimeError, match="wrong"):
        peer_worker.set_up({"peer": "made-wrong", **ORDER})


def test_int4_codes_decode_to_their_weight(peer_worker: ModuleType) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 64), np.float32)
    codes, scale = peer_worker.int4(weight)
    assert codes.min() >= 0 and codes.max() <= 15
    assert np.abs(peer_worker.decode(codes, scale) - weight).max() <= 0.51 * scale.max()
    packed = peer_worker.nibbles(codes)
    assert np.array_equal(packed[:, 0] & 15, codes[:, 0]) and np.array_equal(packed[:, 0] >> 4, codes[:, 1])


@pytest.mark.slow
def test_peers_take_turns_and_those_that_cannot_are_named(tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    names = ["torch-bf16", "llmquant-int4-g32", "openvino-u4-bf16"]
    command = [sys.executable, str(FOLDER / "peers.py"), "--only", *names, "--shape", "64x96", "-m", "1", "2"]
    command += ["--threads", "1", "--megabytes", "0.03", "--rounds", "2", "--json", str(file)]
    command += ["--peer", f"openvino={sys.executable}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(file.read_text())
    assert [(r["tokens"], r["peer"]) for r in record["results"]] == [(m, name) for m in (1, 2) for name in names[:2]]
    assert all(0 < r["seconds"] <= r["median"] and r["copies"] >= 2 for r in record["results"])
    assert "openvino" in record["failed"]["openvino-u4-bf16"] and "not timed: openvino-u4-bf16" in done.stdout


def test_gguf_pairs_what_transformers_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotating neighbouring pairs of the reordered rows is rotating halves of the original ones."""
    pytest.importorskip("gguf")
    monkeypatch.syspath_prepend(str(FOLDER))
    rows = torch.arange(2 * 6.0).unsqueeze(1)  # two heads of six
    found = importlib.import_module("random_llama").interleaved(rows, 2).flatten().tolist()
    assert found == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
