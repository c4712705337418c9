"""A canary: which private names of torch have moved."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import llmquant.pt2e
from llmquant.pt2e import _ops

SCHEMAS = {
    "quantized_decomposed::quantize_per_tensor": 6,
    "quantized_decomposed::dequantize_per_channel": 8,
    "quantized_decomposed::choose_qparams.tensor": 5,
    "quantized_decomposed::quantize_per_token": 6,
    "onednn::qlinear_prepack": 2,
    "onednn::qlinear_pointwise": 13,
    "onednn::qlinear_pointwise.tensor": 13,
    "onednn::qconv_prepack": 9,
    "onednn::qconv_pointwise": 17,
    "onednn::qconv_pointwise.tensor": 17,
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_operators_take_the_arguments_that_we_give(name: str) -> None:
    packet, _, overload = name.replace("::", ".").partition(".")[2].partition(".")
    operator = getattr(getattr(torch.ops, name.partition("::")[0]), packet)
    schema = getattr(operator, overload or "default")._schema
    assert len(schema.arguments) == SCHEMAS[name], f"torch has changed {schema}"


def test_settings_and_tools_of_inductor_are_where_they_were() -> None:
    import torch._inductor.config as config
    from torch._inductor import aoti_compile_and_package, aoti_load_package
    from torch._inductor.utils import run_and_get_code

    assert callable(aoti_compile_and_package) and callable(aoti_load_package) and callable(run_and_get_code)
    with _ops.freezing(cpp_wrapper=True):
        assert config.freezing and config.cpp_wrapper and not torch.is_grad_enabled()
    assert not config.freezing and not config.cpp_wrapper
    assert isinstance(_ops.has_vnni(), bool)


PRIVATE = ("torch._", "torch.ao", "torchao")


@pytest.mark.parametrize("path", sorted(Path(llmquant.pt2e.__file__).parent.rglob("*.py")), ids=lambda p: p.stem)
def test_no_other_file_touches_private_names(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
        private = [name for name in names if name.startswith(PRIVATE) or ".onednn" in name]
        assert not private or path.stem == "_ops", private
        assert not any(name.startswith("torchao") for name in names)
