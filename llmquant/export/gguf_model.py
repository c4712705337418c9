"""What llama.cpp has to know of a model beside its weights: architecture, sizes, names, and the order of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import ExportError

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""model_type -> llama.cpp's name. Of the first, it turns neighbouring pairs where transformers turns two halves."""
_ROPES = ("default", "linear", "yarn", "llama3")


@dataclass(frozen=True)
class Architecture:
    """A model of llama.cpp.

    Attributes:
        name: of its architecture there.
        config: transformers' config.
    """

    name: str
    config: Any

    @property
    def head_dim(self) -> int:
        """Columns of one head."""
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    @property
    def rope(self) -> dict[str, Any]:
        """`rope_type`, `rope_theta` and what the type needs."""
        return dict(getattr(self.config, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10000.0})

    def order(self, fqn: str, rows: int) -> Tensor | None:
        """Which row of a parameter each row there is: int64 [rows], or None where they agree.

        llama.cpp rotates columns 2i and 2i + 1 of a head of this architecture, transformers i and i + head_dim / 2.
        """
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        found = heads.get(fqn.split(".")[-2])
        if self.name != "llama" or found is None:
            return None
        return torch.arange(rows).reshape(found, 2, rows // found // 2).transpose(1, 2).reshape(-1)

    def rope_factors(self) -> Tensor | None:
        """Divisors of the frequencies, float32 [head_dim / 2], of Llama 3's rule; None for other ropes.

        As in transformers' `_compute_llama3_parameters`: long waves are slowed by `factor`, short ones are not, and
        those between are in between.
        """
        rope = self.rope
        if rope.get("rope_type") != "llama3":
            return None
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        wave = 2 * math.pi * rope["rope_theta"] ** steps
        low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
        smooth = ((old / wave - low) / (high - low)).clamp(0, 1)
        return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()


def find_architecture(config: Any) -> Architecture:
    """The architecture of a config of transformers. Raises `ExportError` for those that are not known to agree."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ExportError(
            f"models of the kind {kind!r} are not exported to GGUF", hint=f"known are {', '.join(ARCHITECTURES)}"
        )
    found = Architecture(ARCHITECTURES[kind], config)
    rope = found.rope.get("rope_type", "default")
    if config.hidden_act != "silu":
        raise ExportError(f"llama.cpp has no {kind} with the activation {config.hidden_act!r}", where="config.json")
    if rope not in _ROPES:
        raise ExportError(f"ropes of the type {rope!r} are not exported", where="config.json: rope_parameters")
    return found


def write_sizes(writer: Any, architecture: Architecture, name: str) -> None:
    """The keys of sizes; `writer` is a `gguf.GGUFWriter`."""
    config, rope = architecture.config, architecture.rope
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(architecture.head_dim)
    writer.add_value_length(architecture.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(architecture.head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    _write_rope_scaling(writer, rope)


def _write_rope_scaling(writer: Any, rope: dict[str, Any]) -> None:
    import gguf

    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        scaling = gguf.RopeScalingType.LINEAR if kind == "linear" else gguf.RopeScalingType.YARN
        writer.add_rope_scaling_type(scaling)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn" and "original_max_position_embeddings" in rope:
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def notes(architecture: Architecture) -> list[str]:
    """What llama.cpp does otherwise."""
    config = architecture.config
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        return [f"llama.cpp attends to all tokens, this model only to the last {window}: texts beyond that differ"]
    return []
