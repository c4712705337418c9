"""Importing llmquant is light and enough; a program that does not import it stops instead of running on noise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import CONFIGS, Folders, load, logits

from llmquant import quantize_
from llmquant.integrations import hook

FOOTER = """
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
import torch
with torch.no_grad():
    said = model(torch.arange(3, 9)[None], use_cache=False).logits
print(json.dumps([type(model.model.layers[0].mlp.up_proj.weight).__name__, said.double().sum().item()]))
"""
ORDERS = {
    "llmquant first": "import llmquant\nfrom transformers import AutoModelForCausalLM",
    "transformers first": "from transformers import AutoModelForCausalLM\nimport llmquant",
    "load first": "from llmquant import load\nfrom transformers import AutoModelForCausalLM",
}
REGISTERED = {
    "the quantizers first": "import transformers.quantizers.auto\nimport llmquant",
    "the integration first": "import llmquant.integrations.transformers",
    "twice": "import llmquant\nfrom llmquant.integrations import hook\nhook.install()\nhook.install()",
    "the manifest first": "import llmquant.checkpoint.manifest\nfrom llmquant import quantize_",
}
CHECK = """
import sys
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as configs
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as quantizers
from llmquant import LlmQuantConfig
assert configs["llmquant"] is LlmQuantConfig and quantizers["llmquant"].__name__ == "LlmQuantizer"
from llmquant.integrations import hook
assert not [f for f in sys.meta_path if type(f).__module__ == hook.__name__], sys.meta_path
"""


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, without a network."""
    return subprocess.run(
        [sys.executable, "-c", "import json, sys\n" + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.parametrize("order", ORDERS)
def test_a_checkpoint_loads_in_every_order_of_imports(order: str, folders: Folders) -> None:
    done = run(ORDERS[order] + FOOTER, folders.quantized("llama", "int4-g32"))
    assert done.returncode == 0, done.stderr
    kind, total = json.loads(done.stdout)
    assert kind == "Int4Tensor"
    model = load(folders.quantized("llama", "int4-g32"))
    with torch.no_grad():
        said = model(torch.arange(3, 9)[None], use_cache=False).logits
    assert total == pytest.approx(said.double().sum().item(), abs=1e-2)


def test_every_order_of_imports_registers_once() -> None:
    """Each in an interpreter of its own, forked from one that has imported torch already."""
    script = """
import os, traceback, torch
for name, order in json.loads(sys.argv[1]).items():
    if os.fork() == 0:
        try:
            exec(order + sys.argv[2], {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            print(name, flush=True)
        os._exit(0)
    os.wait()
"""
    done = run(script, json.dumps(REGISTERED), CHECK)
    assert done.returncode == 0 and done.stdout == "", done.stderr


LIGHT = """
import torch
before = set(sys.modules)
import llmquant
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps(sorted(new)))
assert len(dir(llmquant)) > 20
for name in dir(llmquant):
    if name not in ("LlmQuantConfig", "load", "OptimizeReport", "optimize", "restore"):
        getattr(llmquant, name)
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps(sorted(new & {"transformers", "triton"})))
"""


def test_the_import_is_light_and_prints_nothing() -> None:
    done = run(LIGHT)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    new, heavy_names = map(json.loads, done.stdout.splitlines())
    assert "llmquant" in new
    assert not {"transformers", "triton", "safetensors", "huggingface_hub", "accelerate", "yaml", "typer"} & set(new)
    assert heavy_names == []  # no public name needs them, but those that are about transformers


def test_a_failing_import_of_transformers_is_its_own(tmp_path: Path) -> None:
    """The finder lets errors of the module pass, and does not stay behind."""
    (tmp_path / "transformers" / "quantizers").mkdir(parents=True)
    for name in ("", "quantizers/"):
        (tmp_path / "transformers" / name / "__init__.py").touch()
    (tmp_path / "transformers" / "quantizers" / "auto.py").write_text("raise RuntimeError('mine')")
    done = run(
        "sys.path.insert(0, sys.argv[1])\nimport llmquant\n"
        "try:\n    import transformers.quantizers.auto\nexcept RuntimeError as error:\n    print(error)\n"
        "print(any(type(f).__name__ == '_Finder' for f in sys.meta_path))",
        tmp_path,
    )
    assert done.stdout.split() == ["mine", "False"], done.stderr


def test_without_transformers_llmquant_still_works(tmp_path: Path) -> None:
    script = """
sys.modules["transformers"] = None
import torch, llmquant
layer = torch.nn.Sequential(torch.nn.Linear(8, 4))
print(len(llmquant.quantize_(layer, "int8").quantized))
"""
    done = run(script)
    assert done.stdout.strip() == "1", done.stderr


def test_installing_twice_leaves_one_finder_at_most() -> None:
    before = list(sys.meta_path)
    hook.install()
    hook.install()
    assert sys.meta_path == before  # transformers is loaded here: registration is immediate


# ---------------------------------------------------------------------------------- programs without llmquant

FOREIGN = """
import transformers
outcomes = {}
for folder in sys.argv[1:]:
    for name in ("AutoModelForCausalLM", "AutoModel"):
        for options in ({}, {"device_map": "cpu"}, {"dtype": "float32"}):
            try:
                getattr(transformers, name).from_pretrained(folder, **options)
                outcomes[f"{folder} {name} {options}"] = "loaded"
            except Exception as error:
                outcomes[f"{folder} {name} {options}"] = f"{type(error).__name__}: {error}"
assert "llmquant" not in sys.modules
print(json.dumps(outcomes))
"""


def test_a_program_without_llmquant_stops(folders: Folders, tmp_path: Path) -> None:
    """In every format, tied and untied, whole families, in one file and in shards, with and without the head."""
    made = [
        folders.quantized(f, s) for f in ("llama", "llama-tied") for s in ("int4-g32", "int8", "float8", "int1-g32")
    ]
    made += [folders.quantized(family) for family in CONFIGS]
    load(folders.quantized("llama")).save_pretrained(tmp_path, max_shard_size="10KB")
    done = run(FOREIGN, *made, tmp_path)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert len(outcomes) == 6 * (len(made) + 1)
    loaded = [name for name, outcome in outcomes.items() if "size" not in outcome or outcome == "loaded"]
    assert not loaded, loaded


def test_nor_does_one_weight_alone_slip_through(folders: Folders, tmp_path: Path) -> None:
    """Eight-bit codes have as many elements as the weight: only the rank tells them apart."""
    made = []
    for scheme in ("int8", "float8"):
        for name in ("model.layers.0.self_attn.q_proj", "model.embed_tokens", "lm_head"):
            model, folder = load(folders("llama")), tmp_path / f"{name}-{scheme}"
            quantize_(model, {name: scheme})
            model.save_pretrained(folder)
            assert torch.isfinite(logits(load(folder))).all()
            made.append(folder)
    done = run(FOREIGN.replace('("AutoModelForCausalLM", "AutoModel")', '("AutoModelForCausalLM",)'), *made)
    assert done.returncode == 0, done.stderr
    assert all("size" in outcome for outcome in json.loads(done.stdout).values()), done.stdout
