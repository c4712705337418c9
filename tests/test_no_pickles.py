"""The library reads safetensors, JSON and YAML. A law over its source: nothing that can run what a file says."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmquant

PACKAGE = Path(llmquant.__file__).parent

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "code"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {
    ("torch", "load"): "pickles",
    ("torch", "save"): "pickles",
    ("torch", "jit"): "archives with code",
    ("torch", "hub"): "code of others",
    ("np", "load"): "pickles, unless told not to",
    ("numpy", "load"): "pickles, unless told not to",
    ("yaml", "load"): "whatever its loader makes",
    ("yaml", "load_all"): "whatever its loader makes",
    ("yaml", "unsafe_load"): "any object",
    ("yaml", "full_load"): "many objects",
}
TRUST = "trust_remote_code"

ALLOWED = {
    ("documents.py", "yaml.load"): "with a SafeLoader that refuses tags",
    ("checkpoint/source.py", TRUST): "as the user says, False by default",
}


def found(source: str) -> Iterator[tuple[str, int]]:
    """What could run code of a file, with the line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((a.name, node.lineno) for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield str(node.module), node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            yield node.func.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in METHODS:
                yield f"{node.value.id}.{node.attr}", node.lineno
        elif isinstance(node, ast.keyword) and node.arg == TRUST and ast.unparse(node.value) != "False":
            yield TRUST, node.value.lineno


def test_nothing_in_the_library_can_run_what_a_file_says() -> None:
    seen = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        for what, line in found(path.read_text(encoding="utf-8")):
            seen.add((name, what))
            assert (name, what) in ALLOWED, f"{name}:{line}: {what}"
    assert seen == set(ALLOWED), "an exception that is needed no more"


BAD = {
    "import pickle": "pickle",
    "from pickle import loads": "pickle",
    "import torch\ntorch.load('x')": "torch.load",
    "import torch\nread = torch.load": "torch.load",
    "import yaml\nyaml.load('x', yaml.Loader)": "yaml.load",
    "import numpy as np\nnp.load('x')": "np.load",
    "eval('1')": "eval",
    "def f():\n    exec('x')": "exec",
    "load(x, trust_remote_code=True)": TRUST,
    "load(x, trust_remote_code=asked)": TRUST,
}


@pytest.mark.parametrize("source", BAD)
def test_the_law_can_fail(source: str) -> None:
    assert [what for what, _ in found(source)] == [BAD[source]]


@pytest.mark.parametrize(
    "source", ["model.eval()", "re.compile('x')", "load(x, trust_remote_code=False)", "json.load(x)"]
)
def test_the_law_lets_others_be(source: str) -> None:
    assert not list(found(source))
