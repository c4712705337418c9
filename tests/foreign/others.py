"""Tiny models quantized by the real packages, and what those decode them to."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def compressed_tensors_model(plain: Path, target: Path) -> Path:
    """4 bits in groups of 32, asymmetric, as LLM Compressor saves it: by the package's own compressor."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams
    from models import load

    weights = {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}
    group = {"targets": ["Linear"], "weights": weights}
    model = load(plain)
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"], format="pack-quantized")
    apply_quantization_config(model, config)
    for module in model.modules():
        if scheme := getattr(module, "quantization_scheme", None):
            blocks = module.weight.data.unflatten(1, (-1, 32))
            scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights)
            module.weight_scale.data.copy_(scale)
            module.weight_zero_point.data.copy_(zero)
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(target)
    compressor.update_config(target)
    return target


def decoded(folder: Path) -> dict[str, Tensor]:
    """Every parameter of a compressed-tensors model as transformers and the package load it."""
    from models import load
    from transformers import CompressedTensorsConfig

    model = load(folder, quantization_config=CompressedTensorsConfig(run_compressed=False))
    known = {name: p.detach() for name, p in model.named_parameters()}
    return {name: p for name, p in known.items() if not name.endswith(("_scale", "_zero_point", "_shape"))}


def bitsandbytes_model(plain: Path, target: Path, nested: bool) -> Path:
    """NF4 in blocks of 64."""
    from models import load
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)
    load(plain, quantization_config=config, device_map="cpu").save_pretrained(target)
    return target


def decoded_4bit(folder: Path) -> dict[str, Tensor]:
    """Its 4-bit weights, in float32."""
    from bitsandbytes.functional import dequantize_4bit
    from models import load

    model = load(folder, device_map="cpu", dtype=torch.float32)
    found = dict(model.named_parameters())
    states = {name: p for name, p in found.items() if getattr(p, "quant_state", None) is not None}
    return {name: dequantize_4bit(p.data, p.quant_state).float() for name, p in states.items()}
