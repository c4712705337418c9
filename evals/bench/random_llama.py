"""A Llama of any size with random weights, for speed only: `python evals/bench/random_llama.py OUT`.

Writes OUT (a model folder in bfloat16) and OUT.gguf (the same weights in float16, for llama.cpp). The default is a
model of a billion weights. Needs gguf, which `make setup` installs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llmquant.export.gguf_model import find_architecture, write_sizes

PARTS = {
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


def main() -> None:
    """Writes both."""
    options = parse()
    config = LlamaConfig(
        num_hidden_layers=options.layers,
        hidden_size=options.hidden,
        intermediate_size=options.ffn,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        vocab_size=options.vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    model.save_pretrained(options.out)
    target = options.out.with_name(options.out.name + ".gguf")
    write_gguf(model, target)
    print(f"{options.out} and {target}: {model.num_parameters() / 1e9:.2f} billion weights")


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000, help="at least 259")
    return parser.parse_args()


def write_gguf(model: LlamaForCausalLM, target: Path) -> None:
    """The model as a GGUF file: matrices in float16, norms in float32."""
    config = model.config
    writer = gguf.GGUFWriter(target, "llama")
    write_sizes(writer, find_architecture(config), "random")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    add_tokenizer(writer, config.vocab_size)

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    add(writer, "token_embd", model.model.embed_tokens.weight)
    add(writer, "output_norm", model.model.norm.weight)
    for i, layer in enumerate(model.model.layers):
        for module, name in PARTS.items():
            weight = layer.get_submodule(module).weight
            add(writer, f"blk.{i}.{name}", interleaved(weight, heads[name]) if name in heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer: gguf.GGUFWriter, name: str, weight: Tensor) -> None:
    """A tensor under its GGUF name."""
    dtype = torch.float16 if weight.dim() == 2 else torch.float32
    writer.add_tensor(f"{name}.weight", weight.detach().to(dtype).numpy())


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a head in GGUF's order: transformers rotates halves of a head, llama.cpp neighbouring pairs."""
    halves = weight.unflatten(0, (heads, 2, -1))  # [heads, 2, head_dim / 2, K]
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    """The smallest vocabulary that llama.cpp accepts: three specials, all bytes, and fillers."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, *[gguf.TokenType.BYTE] * 256]
    fillers = size - len(tokens)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens + [f"filler{i}" for i in range(fillers)])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * fillers)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


if __name__ == "__main__":
    main()
