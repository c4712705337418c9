"""The commands as a user runs them: through the real command line, on real folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import needs_calibration
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import llmquant
from llmquant.cli.main import app, main
from llmquant.cli.quantize import build_recipe, parse_size
from llmquant.config.recipe import list_recipes, load_recipe
from llmquant.errors import ConfigError


def run(*args: str | Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command, in this process."""
    return _run_main([str(a) for a in args])


def _run_main(args: list[str]) -> tuple[int, str, str]:
    import contextlib
    import io

    from llmquant.cli import console

    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["llmquant", *args]
    console.console.file, console.errors.file = out, err
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.argv = before
        console.console.file = console.errors.file = None  # whatever sys.stdout and sys.stderr are from now on
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in int8, embeddings too."""
    folder = tmp_path_factory.mktemp("quantized") / "int8"
    assert run("quantize", plain, "-o", folder, "--recipe", "int8")[0] == 0
    return folder


def test_quantized_activations_are_reported_and_inspected(plain: Path, tmp_path: Path) -> None:
    status, out, _ = run("quantize", plain, "-o", tmp_path / "q", "--recipe", "a8-token-int4-g64", "--algorithm", "rtn")
    assert status == 0 and "a8-token-int4-g64" in out
    assert "a8-token-int4" in run("inspect", tmp_path / "q")[1]
    rows = json.loads(run("inspect", tmp_path / "q", "--json", "-")[1])["weights"]
    assert {(row["format"], row["activation"]) for row in rows if row["block"]} == {("int4", "a8-token")}


@pytest.mark.parametrize("recipe", [r.name for r in list_recipes()])
def test_every_recipe_quantizes_from_the_command_line(plain: Path, tmp_path: Path, recipe: str) -> None:
    status, out, _ = run("quantize", plain, "-o", tmp_path / "q", "--recipe", recipe, "--json", tmp_path / "r.json")
    assert status == 0
    report = json.loads((tmp_path / "r.json").read_text())
    in_memory = AutoModelForCausalLM.from_pretrained(plain)
    tokenizer = AutoTokenizer.from_pretrained(plain)
    stats = llmquant.collect_stats(in_memory, recipe, tokenizer=tokenizer) if needs_calibration(recipe) else None
    expected = llmquant.quantize_(in_memory, recipe, stats=stats)
    assert set(report["quantized"]) == set(expected.quantized)
    assert report["bytes_after"] == expected.bytes_after
    assert str(tmp_path / "q") in out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    for name, weight in in_memory.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name


def test_set_goes_before_the_recipe_and_replaces_equal_keys() -> None:
    keys = ["_embedding=none", "re:.*q_proj=int2-g32", "lm_head=int8-tensor"]
    config = build_recipe("mixed-4-6-8", keys, None).config
    assert [key for key, _ in config.items()][:3] == ["_embedding", "re:.*q_proj", "lm_head"]
    changed, original = dict(config.items()), dict(load_recipe("mixed-4-6-8").config.items())
    assert changed["_embedding"] is None and original["_embedding"] is not None
    assert {key: changed[key] for key in original if key != "_embedding"} == {
        key: value for key, value in original.items() if key != "_embedding"
    }


def test_set_splits_at_the_last_equals_sign() -> None:
    config = build_recipe(None, ["re:a(?=b)c=int8"], None).config
    assert [key for key, _ in config.items()] == ["re:a(?=b)c"]


def test_algorithm_changes_what_the_codes_are(plain: Path, tmp_path: Path) -> None:
    folders = {}
    for algorithm in ("rtn", "search"):
        folders[algorithm] = tmp_path / algorithm
        assert (
            run("quantize", plain, "-o", folders[algorithm], "--recipe", "int3-g32", "--algorithm", algorithm)[0] == 0
        )
    models = {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in folders.items()}
    weight = AutoModelForCausalLM.from_pretrained(plain).model.layers[0].mlp.up_proj.weight
    errors = {
        n: llmquant.compute_error(weight, m.model.layers[0].mlp.up_proj.weight.dequantize()) for n, m in models.items()
    }
    assert errors["search"] > errors["rtn"]


def test_eval_writes_the_record_that_it_prints(plain: Path, quantized: Path, tmp_path: Path) -> None:
    record_file = tmp_path / "deep" / "record.json"
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 40)
    args = ["--text", text, "--context", "64", "--windows", "3", "--dtype", "float32", "--json", record_file]
    status, out, _ = run("eval", quantized, "--baseline", plain, *args)
    assert status == 0
    record = json.loads(record_file.read_text())
    assert record["protocol"]["windows"] == 3 and record["protocol"]["tokens_scored"] == 3 * 63
    assert f"{record['perplexity']['value']:.3f}" in out
    assert 0 < record["kl"]["mean"] < 0.05 and 0.5 < record["top1"] <= 1
    assert record["bytes"]["bits_per_quantized_weight"] < 8.6


def test_eval_of_a_model_against_itself_finds_no_difference(plain: Path, tmp_path: Path) -> None:
    record_file = tmp_path / "r.json"
    args = ["--context", "32", "--windows", "2", "--json", record_file]
    assert run("eval", plain, "--baseline", plain, *args)[0] == 0
    record = json.loads(record_file.read_text())
    assert record["kl"]["max"] < 1e-6 and record["top1"] == 1 and record["perplexity"]["change"] == 0


def test_inspect_counts_what_is_on_disk(quantized: Path, tmp_path: Path) -> None:
    status, out, _ = run("inspect", quantized, "--json", "-")
    found = json.loads(out)
    assert status == 0
    file = (quantized / "model.safetensors").stat().st_size
    assert 0 < file - found["totals"]["bytes"] < 10_000  # the header
    rows = {row["fqn"]: row for row in found["weights"]}
    assert rows["model.embed_tokens.weight"]["format"] == "int8" and "lm_head.weight" not in rows
    assert all(row["kernel"] and row["reason"] for row in found["weights"])
    assert rows["model.embed_tokens.weight"]["kernel"] in run("inspect", quantized)[1]


def test_recipes_lists_all_and_prints_one() -> None:
    status, out, _ = run("recipes")
    assert status == 0 and all(recipe.name in out for recipe in list_recipes())
    assert run("recipes", "int8")[1].startswith("llmquant_recipe: 1")


def test_info_is_json_too() -> None:
    status, out, _ = run("info", "--json", "-")
    found = json.loads(out)
    assert status == 0 and found["version"]["llmquant"] == llmquant.__version__
    assert found["version"]["torch"] == torch.__version__
    assert {"native library", "portable", "aten (CUDA)", "triton (CUDA)"} <= set(found["kernels"])
    assert torch.cuda.is_available() or found["kernels"]["aten (CUDA)"] == "there is no CUDA device"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["quantize", "{none}", "-o", "{new}"], ["no such model folder", "hub id"]),
        (["quantize", "{empty}", "-o", "{new}"], ["config.json"]),
        (["quantize", "{foreign}", "-o", "{new}"], ["model_type"]),
        (["quantize", "{quantized}", "-o", "{new}"], ["quantized already", "16-bit"]),
        (["quantize", "{plain}", "-o", "{quantized}"], ["exists already", "--overwrite"]),
        (["quantize", "{plain}", "-o", "{new}", "--recipe", "int4-g3x"], ["int4-g3x", "-g<size>"]),
        (["quantize", "{plain}", "-o", "{new}", "--recipe", "nope.yaml"], ["no recipe", "int4-g32"]),
        (["quantize", "{plain}", "-o", "{new}", "--set", "int8"], ["KEY=SCHEME"]),
        (["quantize", "{plain}", "-o", "{new}", "--set", "re:.*qproj=int8"], ["re:.*qproj", "q_proj"]),
        (["quantize", "{plain}", "-o", "{new}", "--set", "_default=none"], ["no weight would be quantized"]),
        (["quantize", "{plain}", "-o", "{new}", "--algorithm", "magic"], ["magic"]),
        (["quantize", "{plain}", "-o", "{new}", "--dtype", "int8"], ["float32, bfloat16 or float16"]),
        (["quantize", "{plain}", "-o", "{new}", "--max-shard-size", "-1"], ["500MB"]),
        (["quantize", "{nan}", "-o", "{new}"], ["NaN", "model.layers.1.mlp.up_proj.weight"]),
        (["eval", "{none}"], ["no such model folder"]),
        (["eval", "{plain}", "--text", "{none}"], ["{none}"]),
        (["eval", "{plain}", "--context", "10000000"], ["--context"]),
        (["eval", "{truncated}", "--context", "32"], ["truncated", "model.safetensors"]),
        (["inspect", "{truncated}"], ["truncated", "model.safetensors"]),
        (["inspect", "{none}"], ["no such model folder"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_errors_say_what_where_and_what_to_try(
    args: list[str], words: list[str], plain: Path, quantized: Path, tmp_path: Path
) -> None:
    places = _places(plain, quantized, tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    status, out, err = run(*(a.format(**places) for a in args))
    assert status == 2, out + err
    assert "error:" in err and "Traceback" not in err
    for word in words:
        assert word.format(**places) in err
    assert sorted(p.name for p in tmp_path.iterdir()) == before, "something was left behind"


def _places(plain: Path, quantized: Path, tmp_path: Path) -> dict[str, Path]:
    import shutil

    places = {name: tmp_path / name for name in ("none", "new", "empty", "foreign", "nan", "truncated")}
    places["empty"].mkdir()
    places["foreign"].mkdir()
    (places["foreign"] / "config.json").write_text('{"name": "no model"}')
    model = AutoModelForCausalLM.from_pretrained(plain)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(places["nan"])
    shutil.copytree(quantized, places["truncated"])
    shard = places["truncated"] / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    return {**places, "plain": plain, "quantized": quantized}


@pytest.mark.parametrize(("text", "size"), [("500MB", 500_000_000), ("1.5gb", 1_500_000_000), ("77", 77)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "x", "-3", "0", "nan", "1e400"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the size"):
        parse_size(text)


def test_python_m_llmquant_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "llmquant", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"llmquant {llmquant.__version__}"


@pytest.mark.parametrize(
    "command", ["quantize", "eval", "inspect", "recipes", "sensitivity", "compare", "bench", "info"]
)
def test_help_explains_every_option(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and "Usage" in result.output


def test_the_help_page_is_current() -> None:
    import importlib.util

    path = Path(__file__).parents[2] / "docs" / "make_help.py"
    spec = importlib.util.spec_from_file_location("make_help", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.render(), "run `make docs`"


# --- calibration ------------------------------------------------------------------------------------------


def test_calibration_follows_text_count_and_seed(plain: Path, tmp_path: Path) -> None:
    """Another text, count or seed gives other scales; the same ones give the same bits."""
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 26) for i in range(4000)))
    options = {
        "one": ["--calib", text, "--calib-tokens", "600", "--seed", "1"],
        "same": ["--calib", text, "--calib-tokens", "600", "--seed", "1"],
        "seed": ["--calib", text, "--calib-tokens", "600", "--seed", "2"],
        "count": ["--calib", text, "--calib-tokens", "4000", "--seed", "1"],
        "text": ["--calib", "builtin", "--calib-tokens", "600", "--seed", "1"],
        "observer": ["--calib", text, "--calib-tokens", "600", "--seed", "1", "--observer", "percentile-99"],
    }
    scales, told = {}, {}
    for name, chosen in options.items():
        status, _, told[name] = run("quantize", plain, "-o", tmp_path / name, "--recipe", "s8-int8", *chosen)
        assert status == 0
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        scales[name] = torch.cat([p.act_scale.flatten() for p in model.parameters() if hasattr(p, "act_scale")])
    assert torch.equal(scales["one"], scales["same"]) and torch.all(scales["count"] >= scales["one"])
    assert all(not torch.equal(scales["one"], scales[name]) for name in ("seed", "count", "text"))
    assert torch.all(scales["observer"] < scales["one"])
    assert "calibrated on 1024 tokens" in told["one"] and "(seed 1)" in told["one"]
    assert "calibrated on 3584 tokens" in told["count"]  # whole windows of 512


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "int8", "--calib", "builtin"], "nothing here needs --calib"),
        (["--recipe", "int8", "--observer", "histogram"], "nothing here needs --observer"),
        (["--recipe", "int8", "--algorithm", "gptq", "--steps", "9"], "nothing here learns in --steps"),
        (["--recipe", "s8-int8", "--observer", "histgram"], "histogram"),
        (["--recipe", "s8-int8", "--calib", "no/such/file"], "cannot be read"),
        (["--recipe", "s8-int8", "--calib-tokens", "0"], "none to calibrate on"),
    ],
    ids=["not needed", "observer not needed", "steps not needed", "unknown observer", "no text", "no tokens"],
)
def test_what_cannot_be_calibrated_is_explained(plain: Path, tmp_path: Path, options: list[str], message: str) -> None:
    status, _, told = run("quantize", plain, "-o", tmp_path / "q", *options)
    assert status == 2 and message in told and not (tmp_path / "q").exists()


def test_an_output_that_exists_is_refused_before_the_run(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "kept").write_text("mine")
    status, _, told = run("quantize", plain, "-o", tmp_path / "q", "--recipe", "s8-int8")
    assert status == 2 and "exists" in told and "calibrated" not in told
