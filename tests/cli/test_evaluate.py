"""`llmquant eval` through the real command line: limits, what is not finite, noise, speed, and several processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from models import rewrite
from test_commands import plain, quantized, run  # noqa: F401  (fixtures)

from llmquant.cli.gate import broken_limits, parse_share

SMALL = ("--context", "32", "--windows", "4")


def record_of(path: Path, *args: str | Path) -> tuple[int, dict[str, Any], str, str]:
    """Exit status, record, stdout and stderr of `llmquant eval`."""
    status, out, err = run("eval", *args, *SMALL, "--json", path)
    return status, json.loads(path.read_text()), out, err


def test_limits_that_hold_pass_and_limits_that_do_not_fail_with_the_reason(
    plain: Path,  # noqa: F811
    quantized: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    compare = (quantized, "--baseline", plain)
    status, record, *_ = record_of(tmp_path / "r.json", *compare)
    kl, change = record["kl"]["mean"], record["perplexity"]["change"]
    assert status == 0 and kl > 0
    inside = ("--max-kl", repr(kl), "--max-ppl-increase", f"{change * 100 + 1e-9!r}%")
    assert record_of(tmp_path / "r.json", *compare, *inside)[0] == 0
    outside = ("--max-kl", repr(kl * 0.999), "--max-ppl-increase", repr(change - 1e-9))
    status, record, out, err = record_of(tmp_path / "r.json", *compare, *outside)
    assert status == 1 and record["kl"]["mean"] == kl and "perplexity" in out
    assert "--max-kl" in err and f"{kl:.5f}" in err and "--max-ppl-increase" in err


def test_figures_for_people_are_the_records(plain: Path, quantized: Path, tmp_path: Path) -> None:  # noqa: F811
    status, record, out, _ = record_of(tmp_path / "r.json", quantized, "--baseline", plain, "--verbose")
    ppl, kl = record["perplexity"], record["kl"]
    assert status == 0 and record["schema"] == 2 and record["nonfinite"] == {"logits": 0, "tokens": 0}
    assert f"{ppl['change']:+.2%} ± {ppl['change_stderr']:.2%}" in out and f"{record['delta_p_rms']:.2%}" in out
    assert f"{kl['mean']:.5f} ± {kl['stderr']:.5f}" in out and f"{record['top1']:.2%}" in out
    assert sum(cell["tokens"] for cell in kl["by_confidence"]) == record["protocol"]["tokens_scored"] == 4 * 31
    assert f"{kl['by_confidence'][0]['mean']:.5f} nats, {kl['by_confidence'][0]['tokens']} tokens" in out
    assert record["noise_floor"] is record["speed"] is None and record["logits_rows"] == 32


def test_the_noise_floor_and_the_speed_are_measured_on_demand(
    plain: Path,  # noqa: F811
    quantized: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    status, record, out, _ = record_of(tmp_path / "r.json", quantized, "--baseline", plain, "--noise-floor", "--speed")
    floor, speed = record["noise_floor"], record["speed"]
    assert status == 0 and "noise floor" in out and "prefill, decode" in out
    assert floor.keys() == {"perplexity", "kl", "top1", "delta_p_rms"} and 0 < floor["kl"]["mean"] < 0.01
    assert floor["perplexity"]["baseline"] == record["perplexity"]["baseline"]
    assert all(speed[name] > 0 for name in ("prefill", "prefill_reference", "decode", "decode_reference"))
    assert (speed["threads"], speed["prompt"]) == (torch.get_num_threads(), 256)


def test_logits_that_are_not_finite_fail_without_any_limit(plain: Path, tmp_path: Path) -> None:  # noqa: F811
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(plain, broken)
    rewrite(broken / "model.safetensors", lambda tensors: tensors["model.norm.weight"].__setitem__(3, torch.nan))
    status, record, out, err = record_of(tmp_path / "r.json", broken, "--baseline", plain, "--max-kl", "100")
    assert status == 1 and record["nonfinite"] == {"logits": 4 * 31 * 300, "tokens": 4 * 31}
    assert record["perplexity"]["value"] is record["kl"]["mean"] is record["perplexity"]["change"] is None
    assert "not finite" in out and "infinite" in out and "124 of 124 tokens" in err and "--max-kl 100" in err
    status, record, _, err = record_of(tmp_path / "r.json", broken)
    assert status == 1 and record["perplexity"]["value"] is None and "not finite" in err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--max-kl", "1"], "--max-kl"),
        (["--max-ppl-increase", "3%"], "--max-ppl-increase"),
        (["--noise-floor"], "--noise-floor"),
        (["--baseline", "{plain}", "--max-ppl-increase", "three"], "--max-ppl-increase"),
        (["--baseline", "{plain}", "--max-kl", "-1"], "--max-kl"),
    ],
)
def test_options_that_make_no_sense_are_named(plain: Path, options: list[str], told: str) -> None:  # noqa: F811
    status, _, err = run("eval", plain, *SMALL, *(option.format(plain=plain) for option in options))
    assert status == 2 and told in err


@pytest.mark.parametrize(("text", "value"), [("3%", 0.03), ("0.03", 0.03), ("-1%", -0.01), ("0", 0.0), ("2.5%", 0.025)])
def test_shares(text: str, value: float) -> None:
    assert parse_share(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "%", "3 percent", "nan", "inf%", "1,5"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_share(text)


def test_a_limit_is_met_by_its_own_value_and_never_by_null() -> None:
    record = {
        "nonfinite": {"logits": 0, "tokens": 0},
        "protocol": {"tokens_scored": 10},
        "kl": {"mean": 0.5},
        "perplexity": {"change": 0.25},
    }
    assert broken_limits(record, 0.5, 0.25) == [] == broken_limits(record, None, None)
    assert len(broken_limits(record, 0.49, 0.24)) == 2
    empty = record | {"kl": {"mean": None}, "perplexity": {"change": None}}
    assert all("not finite" in reason for reason in broken_limits(empty, 0.5, 0.25)) and broken_limits(empty, 0.5, 1.0)


# --- several processes --------------------------------------------------------------------------------


def start(rank: int, port: int, *command: str | Path) -> subprocess.Popen[str]:
    """One of two processes, as `accelerate launch` and `torchrun` start them."""
    meeting = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env = os.environ | {name: str(value) for name, value in meeting.items()} | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, *(str(word) for word in command)]
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each."""
    try:
        told = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, told, strict=True)]


@pytest.mark.slow
def test_two_processes_are_one_bit_for_bit(plain: Path, quantized: Path, tmp_path: Path) -> None:  # noqa: F811
    """Five windows: the first process has three. Only it prints; both end with the status of a broken limit."""
    options = ["eval", quantized, "--baseline", plain, "--context", "32", "--windows", "5", "--noise-floor"]
    options += ["--max-kl", "0"]
    one = subprocess.run(
        [sys.executable, "-m", "llmquant", *map(str, options), "--json", str(tmp_path / "one.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    port = free_port()
    both = ended([start(r, port, "-m", "llmquant", *options, "--json", tmp_path / "two.json") for r in range(2)])
    assert [status for status, *_ in both] == [1, 1] == [one.returncode] * 2
    assert "perplexity" in both[0][1] and "failed:" in both[0][2] and "in 2 processes" in both[0][1]
    assert both[1][1] == "" and "failed" not in both[1][2]
    single, shared = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    for part in ("protocol", "perplexity", "kl", "top1", "delta_p_rms", "nonfinite", "noise_floor"):
        assert single[part] == shared[part], part
    assert (single["processes"], shared["processes"]) == (1, 2)


@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_with_it(plain: Path) -> None:  # noqa: F811
    """Neither waits for ever: the survivor ends with an error that says so."""
    dying = "import os, torch.distributed as d; d.init_process_group('gloo'); os._exit(9)"
    port = free_port()
    survivor, dead = ended([start(0, port, "-m", "llmquant", "eval", plain, *SMALL), start(1, port, "-c", dying)])
    assert dead[0] == 9 and survivor[0] == 2 and "in vain" in survivor[2]


@pytest.mark.slow
def test_more_processes_than_windows_and_speed_are_refused_by_all(plain: Path) -> None:  # noqa: F811
    for options, told in ((("--windows", "1"), "--windows"), (("--windows", "2", "--speed"), "--speed")):
        port = free_port()
        both = ended([start(r, port, "-m", "llmquant", "eval", plain, "--context", "32", *options) for r in range(2)])
        assert [status for status, *_ in both] == [2, 2] and all(told in err for *_, err in both)
