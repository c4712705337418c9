"""Peers that quantize a transformers model without data: torchao and HQQ."""

from __future__ import annotations

from typing import Any

import numpy as np
from peer_order import Array, Order, Quantized, Watch, least_bytes


def load_model(order: Order) -> Any:
    """The plain model in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(order.threads)
    return AutoModelForCausalLM.from_pretrained(order.model, dtype=torch.float32).eval()


def linears(model: Any) -> dict[str, Any]:
    """Name -> module of all linear layers but the head."""
    import torch

    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}


def as_array(tensor: Any) -> Array:
    """A tensor of torch in float32."""
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


def torchao(order: Order, watch: Watch) -> Quantized:
    """Rounding to nearest, or the scales of HQQ: `IntxWeightOnlyConfig`, whose codes take a byte each."""
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
    from torchao.quantization.quant_primitives import MappingType

    bits, group, symmetric = (order.settings[name] for name in ("bits", "group", "symmetric"))
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(group) if group else PerAxis(0),
        mapping_type=MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
        intx_choose_qparams_algorithm=order.settings.get("algorithm", "affine"),
    )
    model = load_model(order)
    chosen = linears(model)
    with watch.running():
        quantize_(model, config, filter_fn=lambda module, fqn: fqn in chosen)
    kept = {f"{name}.weight": module.weight for name, module in chosen.items()}
    zeros = 0 if symmetric else 1
    return Quantized(
        weights={fqn: as_array(w.dequantize()) for fqn, w in kept.items()},
        changed={},
        stored=sum(w.qdata.nbytes + w.scale.nbytes + zeros * w.zero_point.nbytes for w in kept.values()),
        least=sum(
            least_bytes(
                w.qdata.numel(),
                bits,
                w.scale.numel(),
                integer_zeros=zeros * w.zero_point.numel(),
            )
            for w in kept.values()
        ),
        package="torchao",
        arithmetic="float32, from float32 scales",
    )


def hqq(order: Order, watch: Watch) -> Quantized:
    """HQQ's own package with its optimization; scales and zero points are kept in float16."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    bits, group, axis = (order.settings[name] for name in ("bits", "group", "axis"))
    config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
    chosen, made = linears(load_model(order)), {}
    with watch.running():
        for name, module in chosen.items():
            made[f"{name}.weight"] = HQQLinear(module, config, compute_dtype=torch.float16, device="cpu")
    stored = sum(q.W_q.nbytes + q.meta["scale"].nbytes + q.meta["zero"].nbytes for q in made.values())
    sizes = [(q.meta["shape"].numel(), q.meta["scale"].numel(), q.meta["zero"].numel()) for q in made.values()]
    for quantized in made.values():
        meta = quantized.meta
        meta |= {
            "scale": meta["scale"].float(),
            "zero": meta["zero"].float(),
            "compute_dtype": torch.float32,
        }
        quantized.compute_dtype = torch.float32
    return Quantized(
        weights={fqn: as_array(quantized.dequantize()) for fqn, quantized in made.items()},
        changed={},
        stored=stored,
        least=sum(least_bytes(codes, bits, scales, float_zeros=zeros) for codes, scales, zeros in sizes),
        package="hqq",
        arithmetic="float32, from float16 scales and zero points",
    )
