"""The comparison of accuracy per byte with other libraries: what is kept, what is compared, what a peer must return.

`LLMQUANT_PEERS="torchao=PYTHON hqq=PYTHON ..."` runs the peers themselves; without it those tests are skipped.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(__file__).parents[2] / "evals" / "quality"
SMALL = ["--windows", "2", "--context", "16", "--tokens", "64", "--threads", "1"]
PYTHONS = dict(choice.split("=", 1) for choice in os.environ.get("LLMQUANT_PEERS", "").split())

STANDIN = '''#!{python}
"""A peer that rounds to four bits, or does wrong in one of several ways."""
import json, sys
from pathlib import Path

order = json.loads(Path(sys.argv[2]).read_text())
wrong, out, plain = "{wrong}", Path(order["out"]), Path(order["model"])
if wrong == "dies":
    sys.exit("out of luck")
if wrong == "says so":
    (out / "result.json").write_text(json.dumps({{"failed": "no accelerator"}}))
    sys.exit(1)
import numpy as np
from safetensors.numpy import load_file, save_file

tensors = load_file(plain / "model.safetensors")
names = [n for n in tensors if "_proj" in n][1 if wrong == "forgets" else 0 :]
for name in names:
    scale = np.abs(tensors[name]).max() / 7
    tensors[name] = np.rint(tensors[name] / scale) * scale * (np.nan if wrong == "is not finite" else 1)
save_file(tensors, out / "model.safetensors", metadata={{"format": "pt"}})
(out / "config.json").write_bytes((plain / "config.json").read_bytes())
elements = sum(tensors[name].size for name in names)
facts = {{"package": "standin", "version": "1", "stored": elements, "least": elements // 2, "elements": elements}}
facts |= {{"quantized": names, "changed": [], "seconds": 1.5, "peak": None, "arithmetic": "float32", "note": ""}}
(out / "result.json").write_text(json.dumps(facts))
'''


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A module of the folder by its name. `peers` is also the name of a script in another folder: it is not cached."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "peers", raising=False)

    def load(name: str) -> ModuleType:
        module = importlib.import_module(name)
        if name == "peers":
            monkeypatch.delitem(sys.modules, name)
        return module

    return load


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bfloat16 with a tokenizer of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=256, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def standin(folder: Path, wrong: str = "") -> str:
    """A program that takes the place of a peer's Python."""
    program = folder / "standin"
    program.write_text(STANDIN.format(python=sys.executable, wrong=wrong))
    program.chmod(0o755)
    return str(program)


def line(family: str, run: str, size: int, kl: float, **more: Any) -> dict[str, Any]:
    figures = {"bits": float(size), "stored_bits": float(size), "kl_stderr": 0.0, "perplexity": 2.0, "baseline": 1.0}
    return (
        {"key": run, "setting": "s", "family": family, "run": run, "bytes": size, "kl": kl, "seconds": 1}
        | figures
        | more
    )


# --- what is kept ---------------------------------------------------------------------------------------


def test_finished_runs_are_known_again_and_failed_ones_are_not(script: Any, tmp_path: Path) -> None:
    file, book = tmp_path / "r.jsonl", script("peer_table").Book
    first = book(file)
    first.add(line("hqq", "a", 4, 0.1))
    first.add({"key": "b", "setting": "s", "run": "b", "family": "hqq", "failed": "why"})
    again = book(file)
    assert (again.has("a"), again.has("b"), again.has("c")) == (True, False, False)
    again.add(line("hqq", "b", 4, 0.2))
    assert book(file).has("b") and [entry["run"] for entry in book(file).lines("s")] == ["a", "b"]
    assert book(file).lines("another setting") == []


def test_a_line_that_was_cut_does_not_count_nor_spoil_the_next(script: Any, tmp_path: Path) -> None:
    file, book = tmp_path / "r.jsonl", script("peer_table").Book
    book(file).add(line("hqq", "a", 4, 0.1))
    with file.open("a") as cut:
        cut.write('{"key": "b", "sett')
    torn = book(file)
    assert torn.cut == 1 and torn.has("a") and not torn.has("b")
    torn.add(line("hqq", "c", 4, 0.1))
    assert book(file).has("c") and book(file).cut == 1


# --- what is compared -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "best", "nearer"),
    [
        ([(4, 0.1)], 0.1, "llmquant"),
        ([(4, 0.2)], 0.2, "llmquant"),  # a tie at no more bytes
        ([(4, 0.3), (3, 0.25)], 0.25, "peer"),
        ([(4, 0.3), (5, 0.01)], 0.3, "peer"),  # the larger one does not count
        ([(5, 0.01)], None, "no row of ours is as small"),
    ],
)
def test_a_peer_meets_our_best_of_no_more_bytes(script: Any, own: Any, best: float | None, nearer: str) -> None:
    tables, peer = script("peer_table"), line("hqq", "p", 4, 0.2)
    lines = [peer, *(line("llmquant", f"o{i}", size, kl) for i, (size, kl) in enumerate(own))]
    found = tables.best_own(peer, lines)
    assert (found and found["kl"]) == best
    assert tables.verdict(peer, found) == nearer
    assert ("not in: p" in tables.summary(lines)) == (nearer != "llmquant")


def test_the_table_is_sorted_by_real_bits_without_what_failed(script: Any) -> None:
    tables = script("peer_table")
    lines = [line("hqq", "b", 5, 0.1), line("llmquant", "a", 3, 0.4), {"run": "x", "family": "hqq", "failed": "why"}]
    table = tables.table([*lines, line("torchao", "c", 5, 0.05)])
    assert list(table.columns[2].cells) == ["a", "c", "b"]
    assert list(table.columns[10].cells) == ["", "peer", "peer"]
    assert [entry["run"] for entry in tables.failures(lines)] == ["x"]


def test_every_run_has_a_name_of_its_own(script: Any) -> None:
    runs = script("peer_runs")
    every = runs.catalogue(runs.OWN_RUNS)
    assert len({run.name for run in every}) == len(every) > 80
    assert {run.family for run in every} == set(runs.MODULES)
    assert next(run.settings for run in every if run.name == "llmquant-mix3.5-gptq")["budget"] == 3.5


def test_runs_are_chosen_by_name_pattern_family_and_bits(script: Any) -> None:
    runs = script("peer_runs")
    every = runs.catalogue(["int4-g64:gptq", "3.5:gptq"])
    chosen = lambda *only, bits=(): [run.name for run in runs.selected(every, only, bits)]  # noqa: E731
    assert chosen("hqq", bits=[3]) == ["hqq-3-g64", "hqq-3-g64-axis0"]
    assert chosen("llama-q4_?", "hqq-2-g64") == ["hqq-2-g64", "llama-q4_0", "llama-q4_1"]
    assert chosen("llmquant", bits=[3, 4]) == ["llmquant-int4-g64-gptq", "llmquant-mix3.5-gptq"]
    assert len(chosen()) == len(every)
    with pytest.raises(ValueError, match="nonsense"):
        chosen("nonsense")
    with pytest.raises(ValueError, match="neither"):
        runs.own_run("int4-g64")


@pytest.mark.parametrize(
    ("arguments", "bits"),
    [
        ({"scales": 16}, 4.25),
        ({"scales": 16, "integer_zeros": 16}, 4.3125),
        ({"scales": 16, "float_zeros": 16}, 4.5),
    ],
)
def test_least_bytes_of_four_bits_in_groups_of_64(script: Any, arguments: dict[str, int], bits: float) -> None:
    assert 8 * script("peer_order").least_bytes(1024, 4, **arguments) / 1024 == bits


def test_a_rounded_weight_is_put_back_on_its_grid(script: Any) -> None:
    codes = torch.randint(-8, 8, (6, 128)).float()
    scale = torch.rand(6, 2).add(0.1).half()
    scale[0, 0], codes[0, :64] = 0, 0
    exact = (codes.view(6, 2, 64) * scale.float()[..., None]).view(6, 128)
    rounded = exact.bfloat16()
    assert not torch.equal(rounded.float(), exact)
    assert torch.equal(script("peer_calibrated").on_grid(rounded, scale), exact)


# --- whole runs -----------------------------------------------------------------------------------------


def test_our_rows_are_measured_once(
    script: Any, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = script("peers")
    own = ["--own", "int4-g32:rtn", "int2-g64:search", "int3-g64:gptq", "3:search"]
    command = [str(plain), "--out", str(tmp_path / "out"), "--only", "llmquant", *own, *SMALL]
    peers.main(command)
    found = {entry["run"]: entry for entry in map(json.loads, (tmp_path / "out" / "results.jsonl").open())}
    assert [found[f"llmquant-{name}"]["bits"] for name in ("int4-g32-rtn", "int2-g64-search", "int3-g64-gptq")] == [
        *(4.5, 2.25, 3.25)
    ]
    assert found["llmquant-mix3-search"]["bits"] <= 3 and "bits" in found["llmquant-mix3-search"]["note"]
    kl = {name: entry["kl"] for name, entry in found.items()}
    assert 0 < kl["llmquant-int4-g32-rtn"] < kl["llmquant-int3-g64-gptq"] < kl["llmquant-int2-g64-search"] < 1
    assert not list((tmp_path / "out" / "work").iterdir())

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(peers, "quantize_own", lambda *a: pytest.fail("it ran again"))
        patch.setattr(peers.Reference, "compute", lambda *a, **k: pytest.fail("the plain model ran again"))
        peers.main(command)
        out = capsys.readouterr().out
        assert "4 of 4 runs are finished already" in out and out.count("llmquant-int4-g32-rtn") == 1
        patch.undo()
        patch.setattr(peers.Reference, "compute", lambda *a, **k: pytest.fail("the plain model ran again"))
        peers.main([*command, "--own", "int4-g64:rtn"])
        assert "llmquant-int4-g64-rtn: 4.250 bits" in capsys.readouterr().out


def test_a_damaged_reference_is_computed_anew(
    script: Any, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(plain), "--out", str(tmp_path), "--only", "llmquant", *SMALL]
    script("peers").main([*command, "--own", "int4-g64:rtn"])
    reference = next(tmp_path.glob("reference-*"))
    reference.write_bytes(reference.read_bytes()[:-100])
    script("peers").main([*command, "--own", "int5-g64:rtn"])
    out = capsys.readouterr().out
    assert "it is computed anew" in out and "llmquant-int5-g64-rtn: 5.250 bits" in out


def test_a_peer_is_measured_like_ours(
    script: Any, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [str(plain), "--out", str(out), "--peer", f"hqq={standin(tmp_path)}", *SMALL]
    script("peers").main([*command, "--only", "hqq-4-g64", "llmquant-int3-g64-rtn", "--own", "int3-g64:rtn", "--keep"])
    entry = next(e for e in map(json.loads, (out / "results.jsonl").open()) if e["family"] == "hqq")
    assert (entry["bits"], entry["stored_bits"], entry["seconds"], entry["package"]) == (4.0, 8.0, 1.5, "standin")
    assert 0 < entry["kl"] < 1 and entry["perplexity"] != entry["baseline"]
    assert "llmquant-int3-g64-rtn (3.250)" in capsys.readouterr().out
    decoded, original = (
        load_file(out / "work" / "hqq-4-g64" / "model.safetensors"),
        load_file(plain / "model.safetensors"),
    )
    assert torch.equal(decoded["model.embed_tokens.weight"], original["model.embed_tokens.weight"].float())


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("is not finite", "not finite at 30 tokens"),
        ("dies", "status 1"),
        ("says so", "no accelerator"),
        ("forgets", "0 more (), 1 fewer (model.layers.0"),
    ],
)
def test_a_peer_that_fails_is_told_with_its_reason(
    script: Any, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str, reason: str
) -> None:
    out = tmp_path / "out"
    command = [str(plain), "--out", str(out), "--only", "hqq-4-g64", *SMALL]
    script("peers").main([*command, "--peer", f"hqq={standin(tmp_path, wrong)}"])
    assert reason in capsys.readouterr().out.partition("failed: hqq-4-g64: ")[2]
    assert reason in json.loads((out / "results.jsonl").read_text())["failed"]


def test_what_failed_is_tried_again(
    script: Any, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [str(plain), "--out", str(out), "--only", "hqq-4-g64", *SMALL]
    script("peers").main([*command, "--peer", f"hqq={standin(tmp_path, 'dies')}"])
    capsys.readouterr()
    script("peers").main([*command, "--peer", f"hqq={standin(tmp_path)}"])
    assert json.loads((out / "results.jsonl").read_text().splitlines()[-1])["kl"] > 0
    assert "failed: " not in capsys.readouterr().out


def test_a_family_without_an_environment_is_named(
    script: Any, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = script("peers")
    monkeypatch.setitem(peers.MODULES, "hqq", "no_such_module_as_this")
    peers.main([str(plain), "--out", str(tmp_path / "out"), "--only", "hqq-4-g64", *SMALL])
    out = capsys.readouterr().out
    assert "left out: hqq: no_such_module_as_this is not installed here (--peer hqq=PYTHON)" in out
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_names_of_nothing_end_the_program(script: Any, plain: Path, tmp_path: Path) -> None:
    for more in (["--only", "nonsense"], ["--peer", "nonsense=python"], ["--own", "int4-g64"]):
        with pytest.raises(SystemExit, match=r"nonsense|neither"):
            script("peers").main([str(plain), "--out", str(tmp_path / "out"), *SMALL, *more])


REAL = ["torchao-int4-g64-asym", "hqq-4-g64", "llama-q4_0", "llama-q5_k_m-imatrix", "llmcompressor-gptq-4-g64"]
REAL += ["llmcompressor-awq-4-g64", "auto-round-4-g64"]


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_the_peers_themselves(script: Any, plain: Path, tmp_path: Path, name: str) -> None:
    """Four or five bits in groups of 64 or less: sizes and distances on both sides of a bound."""
    runs = script("peer_runs")
    family = next(run.family for run in runs.catalogue([]) if run.name == name)
    if family not in PYTHONS:
        pytest.skip(f"LLMQUANT_PEERS has no {family}=PYTHON")
    peer = f"{family}={PYTHONS[family]}"
    script("peers").main([str(plain), "--out", str(tmp_path), "--peer", peer, "--only", name, "--keep", *SMALL])
    entry = json.loads((tmp_path / "results.jsonl").read_text())
    assert "failed" not in entry, entry
    assert 4.2 < entry["bits"] < 6.5 and entry["bits"] <= entry["stored_bits"] and entry["seconds"] > 0
    assert 1e-7 < entry["kl"] < 0.1
    if not entry["changed"]:  # AWQ moves scales between norms and weights
        decoded, original = (load_file(f / "model.safetensors") for f in (tmp_path / "work" / name, tmp_path / "plain"))
        names = [key for key in original if "_proj" in key]
        errors = [float((decoded[key] - original[key]).norm() / original[key].norm()) for key in names]
        assert 0.005 < np.mean(errors) < 0.25 and max(errors) < 0.3
