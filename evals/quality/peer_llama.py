"""llama.cpp, by the quantizer of llama-cpp-python and the decoder of gguf: the Llama family."""

from __future__ import annotations

import ctypes
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from peer_order import WEIGHTS, Order, Quantized, Watch
from safetensors.numpy import load_file

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
    return Quantized(
        weights,
        {},
        size,
        size,
        "llama-cpp-python",
        "float32, by the package gguf",
        note,
    )


def llama_names(config: dict[str, Any]) -> dict[str, str]:
    """FQN -> name in GGUF of every tensor of a Llama."""
    if config["model_type"] != "llama":
        raise RuntimeError(f"only Llama models are written as GGUF here, not {config['model_type']}")
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
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
