"""The laws of the layout: imports point one way, no module is a drawer, importing the library is cheap and silent."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import llmquant

PACKAGE = Path(llmquant.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Low to high; a layer imports from earlier lines and from itself. Names on one line do not know each other.
ORDER = [
    "errors",
    "documents",
    "formats",
    "primitives",
    "packing",
    "kernels",
    "config | algorithms | tensor",
    "quantize",
    "checkpoint",
    "measure",
    "calibrate",
    "tune | qat | pt2e",
    "export | foreign | integrations",
    "convert",
    "hub",
    "study",
    "report",
    "cli",
    "__main__",
]
RANK = {name: rank for rank, line in enumerate(ORDER) for name in line.split(" | ")}


class Imports(ast.NodeVisitor):
    """The modules that a file imports at run time, inside functions too, with the line of each."""

    def __init__(self, module: str, is_package: bool) -> None:
        self.found: list[tuple[str, int]] = []
        self.parts = module.split(".") if is_package else module.split(".")[:-1]

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.orelse:
                self.visit(statement)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(alias.name, node.lineno) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            base = ".".join([*self.parts[: len(self.parts) - node.level + 1], *([base] if base else [])])
        # `from package import name` may mean a module.
        self.found += [(f"{base}.{alias.name}", node.lineno) for alias in node.names]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in MODULES}


def imports(path: Path, source: str | None = None) -> Iterator[tuple[str, int]]:
    """Modules of the library that a file imports. `llmquant` itself (its version, its place) counts for nothing."""
    visitor = Imports(module_name(path), path.name == "__init__.py")
    visitor.visit(ast.parse(path.read_text(encoding="utf-8") if source is None else source))
    for name, line in visitor.found:
        while name not in NAMES and "." in name:
            name = name.rpartition(".")[0]
        if name.startswith("llmquant."):
            yield name, line


def layer(module: str) -> str:
    return module.split(".")[1]


def violations(path: Path, source: str | None = None) -> list[str]:
    own = layer(module_name(path))
    return [
        f"{path.relative_to(PACKAGE.parent)}:{line} imports {name}"
        for name, line in imports(path, source)
        if layer(name) != own and RANK[layer(name)] >= RANK[own]
    ]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    if path != PACKAGE / "__init__.py":
        assert not violations(path)


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("packing/bits.py", "import llmquant.tensor.base"),
        ("packing/bits.py", "from llmquant import tensor"),
        ("packing/bits.py", "def f():\n    from llmquant.kernels.packed import Packed"),
        ("packing/bits.py", "from ..kernels import ops"),
        ("tensor/base.py", "from llmquant.config.schemes import parse_scheme"),
        ("algorithms/rtn.py", "import llmquant.tensor"),
        ("formats.py", "if not TYPE_CHECKING_OFF:\n    pass\nfrom llmquant.primitives.spec import QuantSpec"),
        ("errors.py", "try:\n    from .formats import FORMATS\nexcept ImportError:\n    pass"),
    ],
)
def test_an_upward_import_would_be_seen(place: str, source: str) -> None:
    assert violations(PACKAGE / place, source)


def test_what_only_a_type_checker_imports_is_allowed() -> None:
    source = "if TYPE_CHECKING:\n    from llmquant.tensor import QuantizedTensor\nimport llmquant\n"
    assert not violations(PACKAGE / "packing" / "bits.py", source)


def test_no_module_imports_itself_through_others() -> None:
    graph = {module_name(path): {name for name, _ in imports(path)} for path in MODULES if path.parent != PACKAGE}
    # A module of a package loads the package first; that a package imports its own modules is no circle.
    graph = {
        name: {other for other in needed if other != name and not other.startswith(name + ".")}
        for name, needed in graph.items()
    }
    graph = {name: {o for o in needed if not name.startswith(o + ".")} for name, needed in graph.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circular import: {' -> '.join(error.args[1])}")


def test_every_layer_is_known() -> None:
    found = {layer(name) for name in NAMES if name != "llmquant"}
    assert found <= set(RANK), "give a new layer its place in ORDER and in the architecture"
    assert {"errors", "formats", "primitives", "packing", "kernels", "tensor", "quantize"} <= found


def test_the_package_itself_imports_eagerly_nothing_but_the_hook() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    visitor = Imports("llmquant", is_package=True)
    visitor.visit(tree)
    eager = [name for name, _ in visitor.found if name.startswith("llmquant")]
    assert eager == ["llmquant.integrations.hook"]


def test_no_drawer() -> None:
    assert not [path for path in MODULES if path.stem in ("utils", "util", "helpers", "misc", "common")]


LEAN = """
import sys, llmquant
heavy = ("transformers", "triton", "yaml", "accelerate", "datasets", "gguf", "typer", "rich")
found = [name for name in heavy if name in sys.modules]
assert not found, found
from llmquant import __all__
assert "quantize_" in dir(llmquant)
from llmquant.tensor import QuantizedTensor
from llmquant.formats import FORMATS
found = [name for name in heavy if name in sys.modules]
assert not found, found
"""


def test_importing_is_lean_and_silent() -> None:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-W", "default::UserWarning", "-c", LEAN], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_public_names_exist() -> None:
    for name in llmquant.__all__:
        assert getattr(llmquant, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = llmquant.no_such_name
