"""Weights on CUDA devices through Triton: one kernel for all formats, straight from the neutral layout.

Verified in Triton's interpreter (`TRITON_INTERPRET=1`, which takes tensors on the CPU) and by compiling it for several
architectures; never timed on a card.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from llmquant.formats import get_format
from llmquant.kernels import reference
from llmquant.kernels.packed import Packed
from llmquant.primitives.dynamic import (
    Activation,
    StaticScale,
    dequantize_activation,
    fake_quantize,
    quantize_activation,
)
from llmquant.primitives.spec import QParams

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_CAPABILITY = (8, 0)  # bfloat16 in tensor cores


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


class Triton:
    """The backend. Rows of a table and products with the transposed weight are left to the reference."""

    @functools.cached_property
    def missing(self) -> str | None:
        """Why it cannot run in this process, or None."""
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        return None if interpreted() else missing_card(_CAPABILITY)

    def refusal(self, format_name: str, block: tuple[int, int], columns: int, device: str) -> str | None:
        """Why it cannot serve such a weight, or None."""
        if device != "cuda" and not (device == "cpu" and interpreted()):
            return f"the weight lies on {device}"
        if self.missing:
            return self.missing
        if get_format(format_name).storage not in ("affine", "scaled"):
            return f"there is no kernel for {format_name}"
        return None

    def linear(self, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        """x [..., K] -> x @ weight.T + bias, [..., N] in x's dtype.

        Weights are decoded in float32 and rounded to x's dtype, as plain weights of that dtype are; products and sums
        are float32. Float64 inputs go to the reference.
        """
        if x.dtype not in _FLOATS:
            return reference.linear(x, weight, bias)
        tokens = x.reshape(x.shape[:-1].numel(), weight.columns).contiguous()
        out = x.new_empty(*x.shape[:-1], weight.rows)
        if out.numel():
            with torch.cuda.device_of(x):  # kernels start on the current device
                _launch(tokens, weight, bias, out)
        return out

    def linear_int8(
        self, x: Tensor, weight: Packed, activation: Activation, bias: Tensor | None, static: StaticScale | None = None
    ) -> Tensor:
        """The same with x as its int8 codes stand for it, in float32."""
        seen = dequantize_activation(quantize_activation(x, activation, static), activation)
        return self.linear(seen, weight, bias).to(x.dtype)

    def linear_float8(
        self, x: Tensor, weight: Packed, activation: Activation, bias: Tensor | None, static: StaticScale | None = None
    ) -> Tensor:
        """The same with x as its float8 codes stand for it, in x's dtype."""
        return self.linear(fake_quantize(x, activation, static), weight, bias)

    def matmul(self, x: Tensor, weight: Packed) -> Tensor:
        """x [..., N] -> x @ weight, [..., K] in x's dtype."""
        return reference.matmul(x, weight)

    def embedding(self, indices: Tensor, weight: Packed, dtype: torch.dtype) -> Tensor:
        """indices [...] int -> rows of the table, [..., K] in `dtype`."""
        return reference.embedding(indices, weight, dtype)


TRITON = Triton()


def missing_card(capability: tuple[int, int]) -> str | None:
    """Why no kernel that needs a card of such a capability can run in this process, or None."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    found = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if found < capability:
        return f"a card has compute capability {found[0]}.{found[1]}, less than {capability[0]}.{capability[1]}"
    return None


def tiles(tokens: int) -> dict[str, int]:
    """The shape of a program's tile, for so many tokens: few tokens share the rows among more programs."""
    if tokens <= 16:
        return {"tile_tokens": 16, "tile_rows": 32, "tile_columns": 128}
    return {"tile_tokens": 32 if tokens <= 32 else 64, "tile_rows": 64, "tile_columns": 64}


def _launch(tokens: Tensor, weight: Packed, bias: Tensor | None, out: Tensor) -> None:
    shape = tiles(len(tokens))
    grid = (-(-weight.rows // shape["tile_rows"]), -(-len(tokens) // shape["tile_tokens"]))
    qdata, scale = weight.qdata.contiguous(), weight.scales().contiguous()
    bias = None if bias is None else bias.contiguous()
    fmt = get_format(weight.format)
    name, extra = _to_steps(weight)
    products = _products()
    products.linear[grid](
        tokens,
        qdata,
        scale,
        extra,
        bias,
        out,
        len(tokens),
        weight.rows,
        weight.columns,
        qdata.shape[1],
        scale.shape[1],
        weight.block[0],
        weight.block[1],
        extra.shape[-1],
        fmt.midpoint,
        fmt.bits,
        getattr(products, name),
        interpreted(),
        **shape,
    )


def _to_steps(weight: Packed) -> tuple[str, Tensor]:
    """The name of the function from codes to steps, and what it reads besides the codes."""
    if weight.zero_point is not None:
        return "around_zero_point", weight.zero_point.contiguous()
    if get_format(weight.format).storage == "scaled":
        return "from_table", _table(weight.format, weight.qdata.device)
    return "around_midpoint", weight.qdata  # which it does not read


@functools.cache
def _table(format_name: str, device: torch.device) -> Tensor:
    """The values of all codes of a format at scale 1, float32 [2^bits]."""
    fmt = get_format(format_name)
    codes = torch.arange(fmt.top_code + 1, dtype=torch.uint8).reshape(1, 1, -1)
    return fmt.numerics.decode(codes, QParams(torch.ones(1, 1)), fmt).flatten().to(device)


def _products() -> ModuleType:
    from llmquant.kernels.triton import products  # Triton takes a second to import

    return products
