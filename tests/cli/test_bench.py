"""`llmquant bench` as a user runs it, on tiny shapes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_commands import run

from llmquant.cli import bench_plot
from llmquant.cli.bench import SCHEMES, parse_counts, parse_shape
from llmquant.errors import ConfigError

TINY = ["--shape", "32x64", "--megabytes", "0.05", "--rounds", "2"]
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


def measured(*args: str) -> dict[str, Any]:
    status, out, err = run("bench", *TINY, *args, "--json", "-")
    assert status == 0, err
    record: dict[str, Any] = json.loads(out)
    return record


def test_the_default_times_all_schemes_against_all_dense_dtypes() -> None:
    record = measured("-m", "1,4")
    names = ["bfloat16", "float32", "float16", *SCHEMES]
    assert [(r["tokens"], r["weight"]) for r in record["results"]] == [(m, name) for m in (1, 4) for name in names]
    for r in record["results"]:
        assert r["shape"] == [32, 64] and list(r["times_faster"]) == names[:3]
        assert r["share_of_read"] == pytest.approx(r["bandwidth"] / r["read_bandwidth"])
    assert record["settings"]["read"] in ("prefetching read", "torch sum")
    assert record["machine"]["processor"] and record["versions"]["torch"] == torch.__version__


def test_static_activations_need_no_calibration_to_be_timed() -> None:
    record = measured("-m", "1", "--scheme", "s8-asym-int8", "--scheme", "sf8-float8", "--dense", "float32")
    assert [r["weight"] for r in record["results"]] == ["float32", "s8-asym-int8", "sf8-float8"]


def test_the_table_shows_the_figures_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "bench.json"
    args = ["--shape", "16x32", "--scheme", "int8", "--scheme", "int4-g32", "--dense", "float32", "-m", "2"]
    status, out, err = run("bench", *TINY, *args, "--json", file)
    assert status == 0, err
    record = json.loads(file.read_text())
    assert [r["shape"] for r in record["results"]] == [[32, 64]] * 3 + [[16, 32]] * 3
    lines = [line.split() for line in out.splitlines()]
    for r in record["results"]:
        figures = [f"{1e3 * r['seconds']:.3f}", f"{r['times_faster']['float32']:.2f}", f"{r['bandwidth'] / 1e9:.1f}"]
        assert [r["weight"], r["kernel"], *figures, f"{r['share_of_read']:.0%}"] in [line[-6:] for line in lines]
    assert "32x64" in out and "16x32" in out and "from memory" in out and record["settings"]["read"] in out


def test_in_cache_rotates_two_weights() -> None:
    record = measured("--in-cache", "-m", "1")
    assert {r["copies"] for r in record["results"]} == {2} and record["settings"]["megabytes"] is None


def test_a_forced_backend_serves_all_and_what_it_refuses_is_listed() -> None:
    record = measured("--backend", "reference", "-m", "1")
    assert {r["kernel"] for r in record["results"] if not r["dense"]} == {"reference"} and not record["skipped"]
    from llmquant.kernels import registry

    if registry.choose("int8", (1, 64), 64, "cpu").kernel == "avx512":
        status, out, _ = run(
            "bench", *TINY, "--backend", "avx512", "-m", "1", "--scheme", "int8", "--scheme", "int8-tensor"
        )
        assert status == 0 and "not timed: int8-tensor" in out
        assert run("bench", *TINY, "--backend", "avx512", "--scheme", "int8-tensor")[0] == 2


def test_threads_are_set_and_said() -> None:
    before = torch.get_num_threads()
    try:
        assert measured("--threads", "2", "-m", "1", "--scheme", "int8")["machine"]["torch_threads"] == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--shape", "4096"], ["'4096'", "4096x11008"]),
        (["--shape", "0x8"], ["'0x8'"]),
        (["--shape", "8x-8"], ["'8x-8'"]),
        (["--shape", "8x8x8"], ["'8x8x8'"]),
        (["--scheme", "int9"], ["int9", "int8"]),
        (["--scheme", "none"], ["nothing to time", "--dense"]),
        (["-m", "1,,4"], ["'1,,4'", "1,4,16"]),
        (["-m", "0"], ["'0'"]),
        (["--dtype", "int8"], ["'int8'", "bfloat16"]),
        (["--dtype", "auto"], ["auto"]),
        (["--dense", "float64"], ["float64"]),
        (["--backend", "abacus"], ["abacus", "reference"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_errors_say_what_and_what_to_try(args: list[str], words: list[str]) -> None:
    status, out, err = run("bench", *TINY[2:], *args)
    assert status == 2 and not out and "error:" in err and "Traceback" not in err
    for word in words:
        assert word in err


def test_without_matplotlib_the_extra_is_named_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_plot.importlib.util, "find_spec", lambda name: None)
    status, out, err = run("bench", "--plot", tmp_path / "x.png")
    assert status == 2 and not out and "llmquant[plot]" in err and not list(tmp_path.iterdir())


@needs_matplotlib
@pytest.mark.parametrize(("tokens", "extra"), [("1", []), ("1,2", ["--in-cache", "--shape", "16x32"])])
def test_the_plot_is_drawn(tmp_path: Path, tokens: str, extra: list[str]) -> None:
    file = tmp_path / "deep" / "speed.png"
    status, _, err = run("bench", *TINY, "-m", tokens, *extra, "--plot", file)
    assert status == 0, err
    assert file.read_bytes().startswith(b"\x89PNG") and str(file) in err


@needs_matplotlib
def test_a_plot_of_unknown_kind_is_an_error(tmp_path: Path) -> None:
    status, _, err = run("bench", *TINY, "-m", "1", "--plot", tmp_path / "speed.xyz")
    assert status == 2 and "speed.xyz" in err and "Traceback" not in err


def test_looks_are_distinct_and_the_title_names_machine_threads_and_dtype() -> None:
    record = measured("-m", "1")
    looks = bench_plot.appearances(record["results"])
    assert len({str(look) for look in looks.values()}) == len(looks) == 9
    words = bench_plot.title(record)
    assert record["machine"]["processor"] in words and "thread" in words and "bfloat16" in words


def test_shapes_and_counts() -> None:
    assert parse_shape("4096X11008") == (4096, 11008)
    assert parse_counts("16, 1,4,1") == [1, 4, 16]
    with pytest.raises(ConfigError):
        parse_counts("")
