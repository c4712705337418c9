"""Peers that quantize a transformers model by what it does to a text: llm-compressor and auto-round."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
from peer_order import WEIGHTS, Array, Order, Quantized, Watch, file_bytes, least_bytes
from peer_torch import as_array, linears, load_model
from safetensors.numpy import load_file

# --- llm-compressor -------------------------------------------------------------------------------------


def llmcompressor(order: Order, watch: Watch) -> Quantized:
    """GPTQ in its static order, or AWQ; one window a sample.

    Its AWQ moves what it keeps into pinned memory, which torch does not have without an accelerator; that step, which
    changes no value, is left out where there is none.
    """
    import torch
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache

    ids, pins = np.load(order.tokens), torch.accelerator.is_available()
    if not pins:
        IntermediatesCache.pin_memory = lambda *arguments, **options: None
    model = load_model(order)
    sizes = {
        "max_seq_length": ids.shape[1],
        "num_calibration_samples": len(ids),
        "shuffle_calibration_samples": False,
    }
    with watch.running():
        oneshot(model=model, dataset=samples(ids), recipe=recipe(order.settings), **sizes)
    found = {f"{name}.weight": m for name, m in linears(model).items() if hasattr(m, "weight_scale")}
    weights, size = decoded(found), least(order.settings, found, {fqn: m.weight_scale for fqn, m in found.items()})
    return Quantized(
        weights=weights,
        changed=moved(order, model, weights),
        stored=compressed_bytes(order, model, found),  # last: afterwards the modules have no plain weight
        least=size,
        package="llmcompressor",
        arithmetic="float32, from float32 scales",
        note="" if pins or order.settings["method"] == "gptq" else "without pinned memory",
    )


def samples(ids: Array) -> Any:
    """Windows [W, T] as a data set."""
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()})


def recipe(settings: dict[str, Any]) -> Any:
    """The modifiers of a method."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    bits, group, symmetric = (settings[name] for name in ("bits", "group", "symmetric"))
    args = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy="group",
        group_size=group,
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=args)}
    if settings["method"] == "gptq":
        return GPTQModifier(config_groups=groups, ignore=["lm_head"])
    return [
        AWQModifier(),
        QuantizationModifier(config_groups=groups, ignore=["lm_head"]),
    ]


def decoded(found: dict[str, Any]) -> dict[str, Array]:
    """FQN -> [N, K] of modules with scales, as their compressed codes would give it."""
    import torch
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    def value(m: Any) -> Any:
        return fake_quantize(m.weight, m.weight_scale, m.weight_zero_point, m.quantization_scheme.weights)

    with torch.no_grad():
        return {fqn: as_array(value(module)) for fqn, module in found.items()}


def moved(order: Order, model: Any, weights: dict[str, Array]) -> dict[str, Array]:
    """Other tensors of the checkpoint that are not what they were: AWQ scales norms."""
    plain, state = load_file(order.model / WEIGHTS), model.state_dict()
    now = {name: as_array(state[name]) for name in plain if name not in weights}
    return {name: array for name, array in now.items() if not np.array_equal(array, plain[name])}


def compressed_bytes(order: Order, model: Any, found: dict[str, Any]) -> int:
    """What the weights take in the peer's own file; the model is compressed in place."""
    folder = order.out / "compressed"
    model.save_pretrained(folder, save_compressed=True)
    size = file_bytes(folder, found)
    shutil.rmtree(folder)
    return size


# --- auto-round -----------------------------------------------------------------------------------------


def auto_round(order: Order, watch: Watch) -> Quantized:
    """Rounding and clipping learned block by block, with its defaults but for the number of steps and tokens."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    settings, windows = order.settings, torch.from_numpy(np.load(order.tokens))
    model = load_model(order)
    chosen = set(linears(model))
    scheme = {
        "bits": settings["bits"],
        "group_size": settings["group"],
        "sym": settings["symmetric"],
    }
    quantizer = AutoRound(
        model,
        AutoTokenizer.from_pretrained(order.model),
        scheme={**scheme, "data_type": "int"},
        dataset=list(windows.split(8)),
        nsamples=len(windows),
        seqlen=windows.shape[1],
        iters=settings["iterations"],
        device_map="cpu",
    )
    with watch.running():
        model, _ = quantizer.quantize()
    found = {f"{name}.weight": m for name, m in model.named_modules() if name in chosen and hasattr(m, "scale")}
    scales = {fqn: module.scale for fqn, module in found.items()}
    kind, dtype, size = (
        next(iter(scales.values())).dtype,
        model.dtype,
        least(settings, found, scales),
    )
    weights = {fqn: as_array(on_grid(module.weight, scales[fqn])) for fqn, module in found.items()}
    stored = exported_bytes(order, quantizer, found)
    arithmetic = f"float32, from {kind} scales; learned in {dtype}"
    return Quantized(weights, {}, stored, size, "auto-round", arithmetic)


def on_grid(weight: Any, scale: Any) -> Any:
    """[N, K] in float32, from a weight that was rounded to 16 bits after quantizing and the scales of its groups."""
    groups = weight.float().reshape(scale.numel(), -1)
    steps = scale.float().reshape(-1, 1)
    return ((groups / steps).round().nan_to_num() * steps).reshape(weight.shape)


def exported_bytes(order: Order, quantizer: Any, found: dict[str, Any]) -> int:
    """What the weights take in the peer's own file; the model is packed in place."""
    folder = order.out / "exported"
    quantizer.save_quantized(str(folder), format="auto_round", inplace=True)
    size = sum(file_bytes(file.parent, found) for file in folder.rglob("model*.safetensors"))
    shutil.rmtree(folder)
    return size


def least(settings: dict[str, Any], found: dict[str, Any], scales: dict[str, Any]) -> int:
    """The bytes of modules at best: see `least_bytes`; zero points are integers."""
    counts = {fqn: scales[fqn].numel() for fqn in found}
    zeros = {fqn: 0 if settings["symmetric"] else count for fqn, count in counts.items()}
    return sum(least_bytes(m.weight.numel(), settings["bits"], counts[f], 0, zeros[f]) for f, m in found.items())
