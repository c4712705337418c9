"""Tiny models of families that `models.FAMILIES` lacks or has in a variant that cannot be rotated."""

from __future__ import annotations

from typing import Any

import models
import torch

_LLAMA = dict(models.FAMILIES["llama-tied"][1], tie_word_embeddings=True)
EXTRA: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("Gemma", dict(_LLAMA, head_dim=16)),
    "granite": ("Granite", dict(_LLAMA, residual_multiplier=0.5, embedding_multiplier=3.0, logits_scaling=2.0)),
    "smollm3": ("SmolLM3", dict(_LLAMA)),
    "qwen2-moe": (
        "Qwen2Moe",
        dict(models.FAMILIES["qwen3-moe"][1], shared_expert_intermediate_size=48, mlp_only_layers=[0]),
    ),
    "opt-plain": ("OPT", dict(models.FAMILIES["opt"][1], word_embed_proj_dim=64)),
    "llama-biases": ("Llama", dict(_LLAMA, attention_bias=True, mlp_bias=True)),
    "llama-72": ("Llama", dict(_LLAMA, hidden_size=72, num_attention_heads=6, num_key_value_heads=2)),
}
"""As `models.FAMILIES`; 72 = 8 * 9 channels have a Hadamard matrix that is no power of two."""


def build(family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """`models.build` for these families too; experts are products that every dtype has."""
    if family not in EXTRA:
        model = models.build(family, dtype, **overrides)
    else:
        prefix, sizes = EXTRA[family]
        before = dict(models.FAMILIES)
        models.FAMILIES[family] = (prefix, sizes)
        try:
            model = models.build(family, dtype, **overrides)
        finally:
            models.FAMILIES.clear()
            models.FAMILIES.update(before)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model
