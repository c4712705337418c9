"""Quantizes a model by another library, in its own environment, for `peers.py`: `python peer_quantizer.py ORDER.json`.

Needs numpy, safetensors and the peer. The order names a plain float32 checkpoint, a peer and its settings, the tokens
to calibrate on and the mean squares of each weight's inputs. Written are a plain checkpoint with the weights as the
peer understands them, decoded to float32, and `result.json` beside it: sizes, seconds, peak memory, what was quantized,
or `{"failed": reason}`. All linear layers but the head are quantized.

Two sizes are told. `stored`: the bytes of the tensors or the file in which the peer keeps codes, scales and zero
points. `least`: what they would take at best, codes packed without gaps, scales and float zero points in 16 bits,
integer zero points in as many bits as codes. It is the smaller one where a peer keeps a byte for each code, or float32
scales because the model is float32.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

Array = np.ndarray[Any, Any]
WEIGHTS = "model.safetensors"


class Order(NamedTuple):
    """What to do.

    Attributes:
        family: a key of `FAMILIES`.
        settings: those of the family's function.
        model: folder of the plain checkpoint, float32, one file.
        out: folder to write.
        tokens: file of numpy, [W, T] int64, to calibrate on.
        imatrix: safetensors file, FQN -> mean squares of the inputs, float32 [K].
        threads: for the peer.
    """

    family: str
    settings: dict[str, Any]
    model: Path
    out: Path
    tokens: Path
    imatrix: Path
    threads: int


class Quantized(NamedTuple):
    """What a peer made.

    Attributes:
        weights: FQN -> [N, K] float32, each quantized weight as the peer decodes it.
        changed: FQN -> other tensors that it changed along with them, for instance norms.
        stored, least: bytes of all quantized weights, as the module's text says.
        package: the peer's name on the package index.
        arithmetic: how the weights were decoded.
        note: what else is worth saying.
    """

    weights: dict[str, Array]
    changed: dict[str, Array]
    stored: int
    least: int
    package: str
    arithmetic: str
    note: str = ""


class Watch:
    """Wall time of the quantizing alone, without loading, decoding and writing, and the peak memory at its end."""

    seconds = 0.0
    peak: int | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """The stretch that counts."""
        started = time.perf_counter()
        yield
        self.seconds, self.peak = time.perf_counter() - started, peak_memory()


def peak_memory() -> int | None:
    """`VmHWM` of this process in bytes, mapped files included; None where it is not known."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def least_bytes(codes: int, bits: int, scales: int, float_zeros: int = 0, integer_zeros: int = 0) -> int:
    """Bytes of one weight without gaps."""
    return math.ceil(codes * bits / 8) + 2 * (scales + float_zeros) + math.ceil(integer_zeros * bits / 8)


# --- peers that work on a transformers model ------------------------------------------------------------


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
            least_bytes(w.qdata.numel(), bits, w.scale.numel(), integer_zeros=zeros * w.zero_point.numel())
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
        meta |= {"scale": meta["scale"].float(), "zero": meta["zero"].float(), "compute_dtype": torch.float32}
        quantized.compute_dtype = torch.float32
    return Quantized(
        weights={fqn: as_array(quantized.dequantize()) for fqn, quantized in made.items()},
        changed={},
        stored=stored,
        least=sum(least_bytes(codes, bits, scales, float_zeros=zeros) for codes, scales, zeros in sizes),
        package="hqq",
        arithmetic="float32, from float16 scales and zero points",
    )


def llmcompressor(order: Order, watch: Watch) -> Quantized:
    """llm-compressor: GPTQ in its static order, or AWQ; one window a sample.

    Its AWQ moves what it keeps into pinned memory, which torch does not have without an accelerator; that step, which
    changes no value, is left out where there is none.
    """
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache

    bits, group, symmetric = (order.settings[name] for name in ("bits", "group", "symmetric"))
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=group)
    recipe = compressor_recipe(
        order.settings["method"], {"group_0": QuantizationScheme(targets=["Linear"], weights=args)}
    )
    ids = np.load(order.tokens)
    samples = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()})
    pins = torch.accelerator.is_available()
    if not pins:
        IntermediatesCache.pin_memory = lambda *arguments, **options: None
    model = load_model(order)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with watch.running():
        oneshot(
            model=model,
            dataset=samples,
            recipe=recipe,
            max_seq_length=ids.shape[1],
            num_calibration_samples=len(ids),
            shuffle_calibration_samples=False,
        )
    found = {f"{name}.weight": m for name, m in linears(model).items() if hasattr(m, "weight_scale")}
    with torch.no_grad():
        weights = {
            fqn: as_array(fake_quantize(m.weight, m.weight_scale, m.weight_zero_point, m.quantization_scheme.weights))
            for fqn, m in found.items()
        }
    after = model.state_dict()
    moved = [name for name in before if name not in weights and not torch.equal(before[name], after[name])]
    sizes = [
        (m.weight.numel(), m.weight_scale.numel(), 0 if symmetric else m.weight_scale.numel()) for m in found.values()
    ]
    return Quantized(
        weights=weights,
        changed={name: as_array(after[name]) for name in moved},
        stored=sum(m.weight_scale.nbytes for m in found.values())
        + sum(least_bytes(codes, bits, 0, integer_zeros=zeros) for codes, _, zeros in sizes),
        least=sum(least_bytes(codes, bits, scales, integer_zeros=zeros) for codes, scales, zeros in sizes),
        package="llmcompressor",
        arithmetic="float32, from float32 scales",
        note="" if pins or order.settings["method"] == "gptq" else "no pinned memory",
    )


def compressor_recipe(method: str, groups: dict[str, Any]) -> Any:
    """The modifiers of llm-compressor for a method."""
    if method == "gptq":
        from llmcompressor.modifiers.gptq import GPTQModifier

        return GPTQModifier(config_groups=groups, ignore=["lm_head"])
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]


def auto_round(order: Order, watch: Watch) -> Quantized:
    """auto-round: rounding and clipping learned block by block; its scales are kept in float16."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    bits, group, symmetric = (order.settings[name] for name in ("bits", "group", "symmetric"))
    windows = torch.from_numpy(np.load(order.tokens))
    model = load_model(order)
    chosen = set(linears(model))
    quantizer = AutoRound(
        model,
        AutoTokenizer.from_pretrained(order.model),
        scheme={"bits": bits, "group_size": group, "sym": symmetric, "data_type": "int"},
        dataset=list(windows.split(8)),
        nsamples=len(windows),
        seqlen=windows.shape[1],
        iters=order.settings["iterations"],
        device_map="cpu",
    )
    with watch.running():
        model, _ = quantizer.quantize()
    found = {f"{name}.weight": m for name, m in model.named_modules() if name in chosen and hasattr(m, "scale")}
    scales = {fqn: m.scale.numel() for fqn, m in found.items()}
    zeros = {fqn: 0 if symmetric else count for fqn, count in scales.items()}
    least = sum(least_bytes(m.weight.numel(), bits, scales[fqn], integer_zeros=zeros[fqn]) for fqn, m in found.items())
    return Quantized(
        weights={fqn: as_array(on_grid(module.weight, module.scale)) for fqn, module in found.items()},
        changed={},
        stored=least,
        least=least,
        package="auto-round",
        arithmetic=f"float32, from {next(iter(found.values())).scale.dtype} scales; learned in {model.dtype}",
    )


def on_grid(weight: Any, scale: Any) -> Any:
    """[N, K] in float32, from a weight that was rounded to 16 bits after quantizing and the scales of its groups."""
    groups = weight.float().reshape(scale.numel(), -1)
    steps = scale.float().reshape(-1, 1)
    return ((groups / steps).round().nan_to_num() * steps).reshape(weight.shape)


# --- llama.cpp ------------------------------------------------------------------------------------------

LLAMA_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""A layer's modules -> their names in GGUF files."""
GGML_F32 = 0


def llama(order: Order, watch: Watch) -> Quantized:
    """llama.cpp's quantizer with its own choice of types: those of 256 columns fall back where a row does not fit."""
    import gguf

    names = llama_names(json.loads((order.model / "config.json").read_text()))
    plain, small = order.out / "plain.gguf", order.out / "quantized.gguf"
    write_gguf(order.model, names, plain)
    with watch.running():
        run_llama_quantizer(order, names, plain, small)
    linear = {name: fqn for fqn, name in names.items() if fqn.endswith("_proj.weight")}
    found = {linear[t.name]: t for t in gguf.GGUFReader(small).tensors if t.name in linear}
    types = Counter(tensor.tensor_type.name for tensor in found.values())
    quantized = {fqn: t for fqn, t in found.items() if t.tensor_type.name not in ("F32", "F16", "BF16")}
    size = sum(int(tensor.n_bytes) for tensor in quantized.values())
    weights = {fqn: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for fqn, t in quantized.items()}
    plain.unlink()
    small.unlink()
    note = ", ".join(f"{count} {kind}" for kind, count in types.most_common())
    return Quantized(weights, {}, size, size, "llama-cpp-python", "float32, by the package gguf", note)


def llama_names(config: dict[str, Any]) -> dict[str, str]:
    """FQN -> name in GGUF of every tensor of a Llama."""
    if config["model_type"] != "llama":
        raise RuntimeError(f"only Llama models are written as GGUF here, not {config['model_type']}")
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for i in range(config["num_hidden_layers"]):
        names |= {f"model.layers.{i}.{module}": f"blk.{i}.{name}" for module, name in LLAMA_PARTS.items()}
    return {f"{module}.weight": f"{name}.weight" for module, name in names.items()}


def write_gguf(model: Path, names: dict[str, str], target: Path) -> None:
    """The checkpoint as float32 GGUF. The rows of q and k keep transformers' order: codes are chosen within rows."""
    import gguf

    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for fqn, tensor in load_file(model / WEIGHTS).items():
        writer.add_tensor(names[fqn], tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_llama_quantizer(order: Order, names: dict[str, str], source: Path, target: Path) -> None:
    """`llama_model_quantize`; the embedding and the head stay as they are."""
    import llama_cpp

    kinds = {name.lower(): value for name, value in vars(llama_cpp).items() if name.startswith("LLAMA_FTYPE_MOSTLY_")}
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.nthread = order.threads
    settings.ftype = kinds[f"llama_ftype_mostly_{order.settings['type']}"]
    settings.quantize_output_tensor = False
    settings.token_embedding_type = settings.output_tensor_type = GGML_F32
    kept = []  # what the C structures point at
    if order.settings["imatrix"]:
        floats = ctypes.POINTER(ctypes.c_float)
        for fqn, values in load_file(order.imatrix).items():
            values = np.ascontiguousarray(values, np.float32)
            kept.append((names[fqn].encode(), values, values.ctypes.data_as(floats)))
        table = (llama_cpp.llama_model_imatrix_data * (len(kept) + 1))()  # the last one, without a name, ends it
        for entry, (name, values, pointer) in zip(table, kept, strict=False):
            entry.name, entry.data, entry.size = name, pointer, values.size
        settings.imatrix = ctypes.cast(table, type(settings.imatrix))
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp cannot quantize to {order.settings['type']}; its log says why")


# --- the work -------------------------------------------------------------------------------------------

FAMILIES: dict[str, Callable[[Order, Watch], Quantized]] = {
    "torchao": torchao,
    "hqq": hqq,
    "llmcompressor": llmcompressor,
    "auto-round": auto_round,
    "llama": llama,
}


def write_checkpoint(order: Order, made: Quantized) -> None:
    """The plain checkpoint with the decoded weights in place of its own."""
    tensors = load_file(order.model / WEIGHTS)
    for fqn, array in {**made.weights, **made.changed}.items():
        if tensors[fqn].shape != array.shape:
            raise RuntimeError(f"{fqn} is {array.shape} now, and was {tensors[fqn].shape}")
        tensors[fqn] = array
    save_file(tensors, order.out / WEIGHTS, metadata={"format": "pt"})
    for file in order.model.iterdir():
        if file.name != WEIGHTS:
            shutil.copy2(file, order.out / file.name)


def result(made: Quantized, watch: Watch) -> dict[str, Any]:
    """What `peers.py` wants to know."""
    return {
        "package": made.package,
        "version": importlib.metadata.version(made.package),
        "stored": made.stored,
        "least": made.least,
        "elements": sum(array.size for array in made.weights.values()),
        "quantized": sorted(made.weights),
        "changed": sorted(made.changed),
        "seconds": watch.seconds,
        "peak": watch.peak,
        "arithmetic": made.arithmetic,
        "note": made.note,
    }


def main() -> None:
    """Does what the file says; a failure is a result too."""
    given = json.loads(Path(sys.argv[1]).read_text())
    paths = {name: Path(given[name]) for name in ("model", "out", "tokens", "imatrix")}
    order, watch = Order(given["family"], given["settings"], threads=given["threads"], **paths), Watch()
    try:
        made = FAMILIES[order.family](order, watch)
        write_checkpoint(order, made)
        found = result(made, watch)
    except Exception as error:  # whatever it is, the other peers go on
        (order.out / "result.json").write_text(json.dumps({"failed": f"{type(error).__name__}: {error}"}))
        raise
    (order.out / "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
