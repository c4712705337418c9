"""The Triton backend: where it runs, what it says where it does not, its kernel interpreted and compiled."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from llmquant.errors import ConfigError
from llmquant.kernels import registry
from llmquant.kernels.triton import TRITON, interpreted, tiles

HERE = Path(__file__).parent


def needs_triton() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: `make test-slow` brings it, or llmquant[triton]")


@pytest.mark.skipif(interpreted() or torch.cuda.is_available(), reason="it can run here")
def test_without_a_card_it_says_why_it_does_not_serve() -> None:
    assert TRITON.refusal("int4", (1, 32), 64, "cpu") == "the weight lies on cpu"
    assert TRITON.refusal("int4", (1, 32), 64, "cuda") in ("triton is not installed", "there is no CUDA device")
    with pytest.raises(ConfigError, match="backend triton cannot serve this weight: the weight lies on cpu"):
        registry._forced_backend(_weight(), "triton")


def _weight() -> registry.Packed:
    return registry.Packed(torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 2), None, "int4", (1, 32), 64)


@pytest.mark.slow
def test_the_kernel_is_right_in_the_interpreter() -> None:
    needs_triton()
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "test_triton_interpreted.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=HERE, capture_output=True, text=True, env=environment)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(interpreted(), reason="the interpreter is on: nothing compiles")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("to_steps", "bits", "extra"),
    [("around_midpoint", 3, "u8"), ("around_zero_point", 4, "u8"), ("from_table", 8, "fp32")],
)
def test_the_kernel_compiles_for_cards(
    to_steps: str, bits: int, extra: str, dtype: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code, without a card. 16-bit inputs use tensor cores; a tile fits the memory that programs share."""
    needs_triton()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from llmquant.kernels.triton import products

    pointers = {"x": dtype, "qdata": "u8", "scale": "fp16", "extra": extra, "bias": dtype, "out": dtype}
    signature = {name: "*" + kind for name, kind in pointers.items()}
    for count in (1, 64):
        constants = {"midpoint": 4.0, "bits": bits, "to_steps": getattr(products, to_steps), "widen": False}
        constants |= tiles(count)
        kinds = {name: "constexpr" if name in constants else "i32" for name in products.linear.arg_names}
        source = ASTSource(products.linear, kinds | signature, constants)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Triton's own defaults
            compiled = compile(source, target=GPUTarget("cuda", capability, 32))
        assert len(compiled.asm["cubin"]) > 1000
        assert ("mma" in compiled.asm["ptx"]) == (dtype != "fp32")
        assert compiled.metadata.shared <= 99 * 1024
