"""Makes the golden tensors of other libraries: `python tests/goldens/make_foreign.py` from the root.

Each file of `foreign/` holds one weight `m` as the real package wrote it, the `expected` values that the package's own
code decodes it to, and in its header the `quantization_config` and the package's version. The packages are never needed
to run the tests; to make the files: `pip install --no-deps compressed-tensors bitsandbytes gptqmodel pypcre logbar
tokenicer device-smi defuser autoawq`. What is not installed is left as it is.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "foreign"
ROWS, COLUMNS, GROUP = 32, 96, 32
Golden = tuple[str, dict[str, Tensor], Tensor, dict[str, Any]]  # name, tensors of the module, values, settings


def linear(rows: int = ROWS, columns: int = COLUMNS, dtype: torch.dtype = torch.float16) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(columns, rows, bias=False, dtype=dtype)
    layer.weight.data.normal_(0, 0.1)
    layer.weight.data[3] = layer.weight.data[3].abs() + 0.01  # a row above zero: its zero points are 0
    return layer


def min_max(weight: Tensor, bits: int, order: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points [N, G] of columns in the groups `order` [K]."""
    columns = [weight.float()[:, order == g] for g in range(int(order.max()) + 1)]
    low = torch.stack([c.amin(1).clamp(max=0) for c in columns], 1)
    high = torch.stack([c.amax(1).clamp(min=0) for c in columns], 1)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low) / (2**bits - 1)).half()
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale).round().clamp(0, 2**bits - 1)
    return scale, zero.half()


def gptq() -> Iterator[Golden]:
    from gptqmodel import QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    neighbours, layer = torch.arange(COLUMNS) // GROUP, linear()
    mixed = neighbours[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))]
    cases = [(f"gptq_v2-int{bits}", bits, "gptq_v2", False, neighbours) for bits in (2, 3, 4, 8)]
    cases += [(f"gptq_v1-int{bits}", bits, "gptq", False, neighbours) for bits in (3, 4)]
    cases += [("gptq_v1-int4-sym", 4, "gptq", True, neighbours), ("gptq_v1-int4-act-order", 4, "gptq", False, mixed)]
    for name, bits, version, symmetric, order in cases:
        quantized = TorchLinear(bits, GROUP, symmetric, order is mixed, COLUMNS, ROWS, register_buffers=True)
        scale, zero = min_max(layer.weight.data, bits, order, symmetric)
        quantized.pack(layer, scale.clone(), zero.clone(), order.int())
        quantized.post_init()
        expected = quantized.eval().dequantize_weight().t()
        settings = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": version}
        settings |= {"sym": symmetric, "desc_act": order is mixed, "meta": {"quantizer": ["gptqmodel:7.7.0"]}}
        if version == "gptq":
            convert_gptq_v2_to_v1_format_module(quantized, QuantizeConfig(bits=bits, group_size=GROUP, sym=symmetric))
        parts = {p: getattr(quantized, p).clone() for p in ("qweight", "qzeros", "scales", "g_idx")}
        yield name, parts, expected, settings


def awq() -> Iterator[Golden]:
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    layer = linear()
    scale, zero = min_max(layer.weight.data, 4, torch.arange(COLUMNS) // GROUP, symmetric=False)
    packed = WQLinear_GEMM.from_linear(layer, 4, GROUP, scales=scale.t().contiguous(), zeros=zero.t().contiguous())
    parts = {p: getattr(packed, p) for p in ("qweight", "qzeros", "scales")}
    expected = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, GROUP).t()
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    yield "awq-gemm", parts, expected, settings


CT_CASES: dict[str, dict[str, Any]] = {
    **{f"pack-int{b}": dict(num_bits=b, strategy="group", group_size=GROUP) for b in (2, 3, 4, 5, 8)},
    **{f"pack-int{b}-asym": dict(num_bits=b, strategy="group", group_size=GROUP, symmetric=False) for b in (3, 4, 8)},
    "pack-int4-channel": dict(num_bits=4, strategy="channel"),
    "pack-int4-channel-asym": dict(num_bits=4, strategy="channel", symmetric=False),
    "int-quantized": dict(num_bits=8, strategy="channel"),
    "int-quantized-asym": dict(num_bits=8, strategy="channel", symmetric=False),
    "int-quantized-tensor": dict(num_bits=8, strategy="tensor"),
    "float-quantized": dict(num_bits=8, type="float", strategy="channel"),
    "float-quantized-tensor": dict(num_bits=8, type="float", strategy="tensor"),
    "float-quantized-block": dict(num_bits=8, type="float", strategy="block", block_structure=[16, 40]),
    "nvfp4-pack-quantized": dict(num_bits=4, type="float", strategy="tensor_group", group_size=16),
    "mxfp4-pack-quantized": dict(num_bits=4, type="float", strategy="group", group_size=32),
    "mxfp8-quantized": dict(num_bits=8, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8),
}


def compressed(dtype: torch.dtype = torch.bfloat16) -> Iterator[Golden]:
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    for name, args in CT_CASES.items():
        layer, parsed = linear(dtype=dtype), QuantizationArgs(**args)
        form = "pack-quantized" if name.startswith("pack") else name.removesuffix("-asym")
        form = form.removesuffix("-tensor").removesuffix("-block")
        scheme = QuantizationScheme(targets=["Linear"], weights=parsed, format=form)
        low, high = _ranges(layer.weight.data, parsed)
        parts = {"weight": layer.weight.data}
        extra = {}
        if parsed.strategy == "tensor_group":
            extra["global_scale"] = generate_gparam(layer.weight.min(), layer.weight.max())
            parts["weight_global_scale"] = extra["global_scale"].reshape(1).detach()
        scale, zero = calculate_qparams(low, high, parsed, **extra)
        parts |= {"weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
        compressor = BaseCompressor.get_value_from_registry(form)
        stored = compressor.compress(parts, scheme)
        expected = compressor.decompress(dict(stored), scheme)["weight"]
        group = {"targets": ["Linear"], "weights": json.loads(parsed.model_dump_json()), "format": form}
        settings = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
        yield f"ct-{name}", {k: v.detach() for k, v in stored.items()}, expected.detach(), settings


def _ranges(weight: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """Smallest and largest element of all that share a scale."""
    if args.strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    tall, wide = args.block_structure or (1, args.group_size)
    blocks = nn.functional.pad(weight.float(), (0, -COLUMNS % wide)).to(weight.dtype)
    blocks = blocks.unflatten(1, (-1, wide)).unflatten(0, (-1, tall))
    return blocks.amin((1, 3)), blocks.amax((1, 3))


def bitsandbytes() -> Iterator[Golden]:
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, quantize_4bit

    # Rows of 96 and blocks of 64: some run on over the end of a row. The native code of bitsandbytes 0.50 for CPUs
    # starts a block with every row there (its values are far from the weight's); its code in torch does not.
    for name, kind, columns, nested in (
        ("nf4", "nf4", 128, False),
        ("nf4-double", "nf4", 128, True),
        ("nf4-over-rows", "nf4", COLUMNS, True),
        ("fp4", "fp4", 128, False),
    ):
        weight = linear(columns=columns, dtype=torch.bfloat16).weight.data
        packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
        parts = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
        settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
        expected = dequantize_4bit(packed, state)
        if columns % 64:
            absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
            expected = _dequantize_4bit_compute(packed.reshape(-1), absmax, state.code, 64, weight.shape, weight.dtype)
        yield f"bnb-{name}", parts, expected, settings


MAKERS = {"gptqmodel": gptq, "autoawq": awq, "compressed-tensors": compressed, "bitsandbytes": bitsandbytes}


def write(golden: Golden, package: str, folder: Path) -> None:
    name, parts, expected, settings = golden
    tensors = {f"m.{part}": tensor.contiguous().clone() for part, tensor in parts.items()}
    version = f"{package} {importlib.metadata.version(package)}"
    metadata = {"settings": json.dumps(settings), "written_by": version}
    save_file(tensors | {"expected": expected.contiguous().clone()}, folder / f"{name}.safetensors", metadata=metadata)


def main() -> None:
    for package, maker in MAKERS.items():
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} is not installed: its files stay as they are")
            continue
        for golden in maker():
            write(golden, package, FOLDER)
            print(golden[0])


if __name__ == "__main__":
    main()
