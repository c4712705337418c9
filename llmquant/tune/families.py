"""Decoder architectures as data: which norm feeds which weights, and which weights write the residual stream.

A name is a module or parameter relative to a block (to the model, where it is said so); one that a model does not have
is none of its own. Strings hold several names, divided by blanks. `structure.find_structure` reads these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum


class Fold(StrEnum):
    """How rows of the weight that writes a hidden channel belong to the columns of the weight that reads it."""

    equal = "equal"
    heads = "heads"  # one key-value head is read by several heads of the output projection
    second_half = "second half"  # gate above, up below
    last_heads = "last heads"  # as heads, below the queries and the keys


@dataclass(frozen=True)
class Family:
    """Where the parts of one architecture lie.

    Attributes:
        blocks: the list of blocks, relative to the model, as the next four.
        embeddings: what begins the residual stream: rows of `hidden` elements.
        final_norm: the norm behind the last block.
        head: what reads it.
        outside: other weights that write the residual stream, for instance of a vision tower.
        feeds: norm -> the weights that read what it gives.
        writers: weights and vectors whose output is added to the residual stream.
        inner: glob patterns of parameters that never meet it (`outside_inner`: relative to the model).
        inner_feeds: as `feeds`, of norms that lie between two weights.
        pairs: (writer, reader, how) of hidden channels that can be scaled: the first is linear in them.
        gain_offset: what is added to the weight of a norm before it multiplies.
        centered: whether norms subtract the mean (LayerNorm).
        post_norms: norms of what is added to the residual stream; with a weight of its own for each channel, no
            rotation goes through them.
    """

    blocks: str
    embeddings: str
    final_norm: str
    feeds: Mapping[str, str]
    writers: str
    inner: str = ""
    inner_feeds: Mapping[str, str] = field(default_factory=dict)
    pairs: tuple[tuple[str, str, Fold], ...] = ()
    head: str = "lm_head"
    outside: str = ""
    outside_inner: str = ""
    gain_offset: float = 0.0
    centered: bool = False
    post_norms: str = ""


_ATTENTION = " ".join(
    f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa")
)
_MLP = " ".join(
    [f"mlp.{name}" for name in ("gate_proj", "up_proj", "gate_up_proj", "gate", "router", "experts.gate_up_proj")]
    + [f"mlp.{shared}.{name}" for shared in ("shared_experts", "shared_expert") for name in ("gate_proj", "up_proj")]
    + ["mlp.shared_expert_gate"]
)
_MLP_WRITERS = "mlp.down_proj mlp.experts.down_proj mlp.shared_experts.down_proj mlp.shared_expert.down_proj"

_LLAMA = Family(
    blocks="model.layers",
    embeddings="model.embed_tokens",
    final_norm="model.norm",
    feeds={"input_layernorm": _ATTENTION, "post_attention_layernorm": _MLP},
    writers=f"self_attn.o_proj {_MLP_WRITERS}",
    inner="self_attn.q_norm.* self_attn.k_norm.* self_attn.sinks",
    inner_feeds={"self_attn.q_a_layernorm": "self_attn.q_b_proj", "self_attn.kv_a_layernorm": "self_attn.kv_b_proj"},
    pairs=(
        ("self_attn.v_proj", "self_attn.o_proj", Fold.heads),
        ("self_attn.qkv_proj", "self_attn.o_proj", Fold.last_heads),
        ("mlp.up_proj", "mlp.down_proj", Fold.equal),
        ("mlp.gate_up_proj", "mlp.down_proj", Fold.second_half),
        ("mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj", Fold.equal),
        ("mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj", Fold.equal),
    ),
)
_GEMMA = replace(
    _LLAMA,
    gain_offset=1.0,
    feeds={"input_layernorm": _ATTENTION, "pre_feedforward_layernorm": _MLP},
    post_norms="post_attention_layernorm post_feedforward_layernorm",
)
_LLAMA4 = replace(
    _LLAMA,
    feeds={
        "input_layernorm": _ATTENTION,
        "post_attention_layernorm": _MLP.replace("mlp.", "feed_forward."),
    },
    writers=f"self_attn.o_proj {_MLP_WRITERS}".replace("mlp.", "feed_forward."),
    pairs=(
        ("self_attn.v_proj", "self_attn.o_proj", Fold.heads),
        ("feed_forward.up_proj", "feed_forward.down_proj", Fold.equal),
        ("feed_forward.shared_expert.up_proj", "feed_forward.shared_expert.down_proj", Fold.equal),
    ),
)
_SEEING = replace(
    _LLAMA,
    blocks="model.language_model.layers",
    embeddings="model.language_model.embed_tokens",
    final_norm="model.language_model.norm",
    outside="model.visual.merger.mlp.2 model.visual.merger.linear_fc2",
    outside_inner="model.visual.*",
)

FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "smollm3", "gpt_oss"),
            *("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "glm4_moe"),
        ),
        _LLAMA,
    ),
    "llama4_text": _LLAMA4,
    "gemma": replace(_LLAMA, gain_offset=1.0),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "glm4": replace(_LLAMA, post_norms="post_self_attn_layernorm post_mlp_layernorm"),
    "qwen2_vl": _SEEING,
    "jetmoe": replace(
        _LLAMA,
        feeds={
            "input_layernorm": "self_attention.experts.input_linear self_attention.experts.router.layer "
            "self_attention.kv_proj",
            "post_attention_layernorm": "mlp.input_linear mlp.router.layer",
        },
        writers="self_attention.experts.output_linear self_attention.experts.bias mlp.output_linear mlp.bias",
        pairs=(),
    ),
    "mamba": Family(
        blocks="backbone.layers",
        embeddings="backbone.embeddings",
        final_norm="backbone.norm_f",
        feeds={"norm": "mixer.in_proj"},
        writers="mixer.out_proj",
        inner="mixer.A_log mixer.D mixer.conv1d.* mixer.x_proj.* mixer.dt_proj.*",
    ),
    "gpt2": Family(
        blocks="transformer.h",
        embeddings="transformer.wte transformer.wpe",
        final_norm="transformer.ln_f",
        feeds={"ln_1": "attn.c_attn", "ln_2": "mlp.c_fc"},
        writers="attn.c_proj mlp.c_proj",
        centered=True,
    ),
    "gpt_neox": Family(
        blocks="gpt_neox.layers",
        embeddings="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        feeds={"input_layernorm": "attention.query_key_value", "post_attention_layernorm": "mlp.dense_h_to_4h"},
        writers="attention.dense mlp.dense_4h_to_h",
        centered=True,
    ),
    "opt": Family(
        blocks="model.decoder.layers",
        embeddings="model.decoder.embed_tokens model.decoder.embed_positions",
        final_norm="model.decoder.final_layer_norm",
        feeds={"self_attn_layer_norm": _ATTENTION, "final_layer_norm": "fc1"},
        writers="self_attn.out_proj fc2",
        pairs=(("self_attn.v_proj", "self_attn.out_proj", Fold.heads),),
        centered=True,
    ),
    "falcon": Family(
        blocks="transformer.h",
        embeddings="transformer.word_embeddings",
        final_norm="transformer.ln_f",
        feeds={"ln_attn": "self_attention.query_key_value", "ln_mlp": "mlp.dense_h_to_4h"},
        writers="self_attention.dense mlp.dense_4h_to_h",
        centered=True,
    ),
    "dbrx": Family(
        blocks="transformer.blocks",
        embeddings="transformer.wte",
        final_norm="transformer.norm_f",
        feeds={
            "norm_attn_norm.norm_1": "norm_attn_norm.attn.Wqkv",
            "norm_attn_norm.norm_2": "ffn.router.layer ffn.experts.mlp.w1 ffn.experts.mlp.v1",
        },
        writers="norm_attn_norm.attn.out_proj ffn.experts.mlp.w2",
        centered=True,
    ),
}
"""`model_type` of a config -> its family."""

REFUSED: Mapping[str, str] = {
    "inkling_text": "its convolutions work on single channels of the residual stream",
    "longcat_flash": "some of its experts give their input back, so that a norm's weight reaches the residual stream",
    "openai-gpt": "its norms stand behind the addition, in the residual stream itself",
    "qwen3_vl_moe": "its vision tower writes into the residual stream at several depths",
    "t5": "its decoder scales the logits by whether the head is tied, and reads a second residual stream",
}
"""`model_type` -> why neither rotation nor scales can be folded in."""
