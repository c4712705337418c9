"""The only file that touches private names of torch; everything else of graph mode imports them from here.

A test (`tests/pt2e/test_ops.py`) says which of them torch has moved.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from llmquant.errors import UnsupportedOpError

try:
    import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
except ImportError as error:  # pragma: no cover  (a later torch)
    raise UnsupportedOpError(
        "this torch has no torch.ao.quantization.fx._decomposed, which defines the operators of quantized graphs",
        where=f"torch {torch.__version__}",
        hint="pip install torch==2.13.0",
    ) from error

_decomposed = torch.ops.quantized_decomposed

quantize_per_tensor = _decomposed.quantize_per_tensor.default
quantize_per_tensor_tensor = _decomposed.quantize_per_tensor.tensor
dequantize_per_tensor = _decomposed.dequantize_per_tensor.default
dequantize_per_tensor_tensor = _decomposed.dequantize_per_tensor.tensor
choose_qparams = _decomposed.choose_qparams.tensor
quantize_per_channel = _decomposed.quantize_per_channel.default
dequantize_per_channel = _decomposed.dequantize_per_channel.default
choose_qparams_per_token = _decomposed.choose_qparams_per_token.default
choose_qparams_per_token_asymmetric = _decomposed.choose_qparams_per_token_asymmetric.default
quantize_per_token = _decomposed.quantize_per_token.default
dequantize_per_token = _decomposed.dequantize_per_token.default

DEQUANTIZE = (dequantize_per_tensor, dequantize_per_tensor_tensor, dequantize_per_channel, dequantize_per_token)
QUANTIZE = (
    quantize_per_tensor,
    quantize_per_tensor_tensor,
    quantize_per_token,
    choose_qparams,
    choose_qparams_per_token,
    choose_qparams_per_token_asymmetric,
)
"""What reads floats and gives codes, or what codes need."""


def leaves(tree: Any) -> list[Any]:
    """What a module gives or takes, without the tuples, dicts and outputs of transformers around it."""
    return tree_leaves(tree)


def has_onednn() -> bool:
    """Whether oneDNN's int8 products are there: x86 and a torch built with them."""
    return platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()


def has_vnni() -> bool:
    """Whether the processor adds products of bytes without saturating at 16 bits."""
    return torch.cpu._is_vnni_supported()


def linear_prepack(codes: Tensor) -> Tensor:
    """int8 [N, K] -> the opaque layout that `linear_pointwise` reads."""
    return torch.ops.onednn.qlinear_prepack(codes, None)


def conv_prepack(codes: Tensor, scale: Tensor, x_scale: float, x_zero_point: int, *geometry: Any) -> Tensor:
    """int8 [N, C / groups, kh, kw] -> the opaque layout that `conv_pointwise` reads; geometry: stride, padding,
    dilation, groups."""
    return torch.ops.onednn.qconv_prepack(codes, scale, x_scale, x_zero_point, *geometry, None)


def linear_pointwise(dynamic: bool) -> Any:
    """The operator of an int8 linear, for a scale that is a number or a tensor."""
    packet = torch.ops.onednn.qlinear_pointwise
    return packet.tensor if dynamic else packet.default


def conv_pointwise(dynamic: bool) -> Any:
    """The operator of an int8 convolution, for a scale that is a number or a tensor."""
    packet = torch.ops.onednn.qconv_pointwise
    return packet.tensor if dynamic else packet.default


def aoti_package(program: torch.export.ExportedProgram, path: Path) -> None:
    """Compiles a program ahead of time into a package."""
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(program, package_path=str(path))


def aoti_load(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """A package as a function."""
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(path))


def run_and_get_code(function: Callable[..., Any], *args: Any) -> tuple[Any, list[str]]:
    """What a compiled function gives, and the code that Inductor generated for it during the call."""
    from torch._inductor.utils import run_and_get_code as run

    return run(function, *args)


@contextlib.contextmanager
def freezing(cpp_wrapper: bool = False) -> Iterator[None]:
    """Within the block Inductor takes weights for constants, which int8 products need, and no gradients are kept.

    Dynamo reads the setting while it traces, so a call that may trace anew has to be inside.
    """
    import torch._inductor.config as config

    with config.patch(freezing=True, cpp_wrapper=cpp_wrapper), torch.no_grad():
        yield
