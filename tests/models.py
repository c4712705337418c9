"""Tiny random models of several families, saved as checkpoints, and what the tests read from folders.

Always load a saved folder instead of using the built model: rotary buffers then agree with those of later loads.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum, auto
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmquant.config.base import QuantConfig
from llmquant.config.fqn import FqnToConfig
from llmquant.config.recipe import to_config
from llmquant.tensor import QuantizedTensor

VOCAB, HIDDEN = 128, 64
_SIZES = dict(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4)
_LLAMA = dict(_SIZES, num_key_value_heads=2, intermediate_size=112, max_position_embeddings=64)
_MOE = dict(_SIZES, num_key_value_heads=2, intermediate_size=48, num_local_experts=4, max_position_embeddings=64)
_GPT = dict(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64)
_FEW = dict(_LLAMA, moe_intermediate_size=48, num_experts_per_tok=2)  # experts, and a dense layer before them
_LATENT = dict(q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)
_GROUPED = dict(n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1)
_ENDS = dict(bos_token_id=1, eos_token_id=2)
_THREE_ROPES = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
_SIGHT = dict(depth=1, num_heads=2, patch_size=4)
_SPECIAL = dict(image_token_id=3, vision_start_token_id=4, vision_end_token_id=5, video_token_id=6)

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", dict(_LLAMA, tie_word_embeddings=False)),
    "llama-tied": ("Llama", dict(_LLAMA, tie_word_embeddings=True)),
    "qwen2": ("Qwen2", dict(_LLAMA, tie_word_embeddings=True)),
    "gpt2": ("GPT2", _GPT),
    "mixtral": ("Mixtral", dict(_MOE, tie_word_embeddings=False)),
    "gpt-oss": ("GptOss", dict(_MOE, head_dim=16, sliding_window=16, num_experts_per_tok=2)),
    "mistral": ("Mistral", dict(_LLAMA, sliding_window=16)),
    "qwen3": ("Qwen3", dict(_LLAMA, head_dim=16)),
    "gemma2": ("Gemma2", dict(_LLAMA, head_dim=16, sliding_window=16)),
    "gemma3": ("Gemma3Text", dict(_LLAMA, head_dim=16, sliding_window=16)),
    "phi3": ("Phi3", _LLAMA),
    "openai-gpt": ("OpenAIGPT", _GPT),
    "gpt-neox": ("GPTNeoX", dict(_SIZES, intermediate_size=112, max_position_embeddings=64)),
    "opt": ("OPT", dict(_SIZES, ffn_dim=112, word_embed_proj_dim=32, max_position_embeddings=64)),
    "falcon": ("Falcon", dict(_SIZES, new_decoder_architecture=True, num_kv_heads=2)),
    "qwen3-moe": ("Qwen3Moe", dict(_FEW, head_dim=16, num_experts=4, mlp_only_layers=[0])),
    "deepseek-v3": ("DeepseekV3", dict(_FEW, **_LATENT, **_GROUPED, num_nextn_predict_layers=0)),
    "glm4": ("Glm4", dict(_LLAMA, head_dim=16)),
    "glm4-moe": ("Glm4Moe", dict(_FEW, **_GROUPED, head_dim=16)),
    "llama4": ("Llama4Text", dict(_MOE, head_dim=16, intermediate_size_mlp=112, moe_layers=[1])),
    "dbrx": (
        "Dbrx",
        dict(
            vocab_size=VOCAB,
            d_model=HIDDEN,
            n_layers=2,
            n_heads=4,
            max_seq_len=64,
            attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
            ffn_config=dict(hidden_size=HIDDEN, ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2),
        ),
    ),
    "inkling": ("InklingText", dict(_FEW, n_routed_experts=4, n_shared_experts=2)),
    "longcat": (
        "LongcatFlash",
        dict(_SIZES, ffn_hidden_size=112, expert_ffn_hidden_size=48, moe_topk=2, n_routed_experts=4)
        | dict(_LATENT, zero_expert_num=2, head_dim=8, max_position_embeddings=64, num_layers=1),
    ),
    "jetmoe": ("JetMoe", dict(_FEW, kv_channels=16, num_local_experts=4)),
    "mamba": ("Mamba", dict(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, state_size=8)),
    "t5": (
        "T5",
        dict(vocab_size=VOCAB, d_model=HIDDEN, d_kv=16, d_ff=112, num_layers=2, num_heads=4, decoder_start_token_id=0),
    ),
    "qwen2-vl": (
        "Qwen2VL",
        dict(
            _SPECIAL,
            text_config=dict(_LLAMA, rope_parameters=_THREE_ROPES, **_ENDS),
            vision_config=dict(_SIGHT, embed_dim=32, mlp_ratio=2, hidden_size=HIDDEN),
        ),
    ),
    "qwen3-vl-moe": (
        "Qwen3VLMoe",
        dict(
            _SPECIAL,
            text_config=dict(_FEW, rope_parameters=_THREE_ROPES, **_ENDS, head_dim=16, num_experts=4),
            vision_config=dict(_SIGHT, hidden_size=32, intermediate_size=48, out_hidden_size=HIDDEN)
            | dict(deepstack_visual_indexes=[0], num_position_embeddings=16),
        ),
    ),
}
"""Name -> transformers' prefix and config: plain and tied heads, biases, Conv1D, merged experts, transposed experts;
encoders, states in place of attention, images."""


def rtn(scheme: Any) -> FqnToConfig:
    """A config by round to nearest, which is fast: how scales are chosen does not matter here."""
    found = {k: v.with_algorithm("rtn") if isinstance(v, QuantConfig) else v for k, v in to_config(scheme).items()}
    return FqnToConfig(found)


_SCHEMES: dict[str, dict[str, str]] = {
    "llama": {"re:.*down_proj": "int6-g24-asym", "_head": "int8", "_embedding": "int4-g32", "_default": "int4-g32"},
    "llama-tied": {"_embedding": "int8", "re:.*v_proj": "float8", "_default": "int3-g32-asym"},
    "qwen2": {"re:.*down_proj": "int5-tensor", "?re:.*k_proj": "none", "_default": "int4-g48"},
    "gpt2": {"_embedding": "int8-asym", "re:.*c_fc": "int3-g40-asym", "_default": "int4-g32"},
    "mixtral": {"_experts": "int4-g16-asym", "_head": "float8-e5m2", "_default": "int8"},
    "gpt-oss": {"_experts": "int4-g24", "re:.*down_proj": "int3-row-asym", "_default": "int8-tensor"},
}
CONFIGS = {family: rtn(scheme) for family, scheme in _SCHEMES.items()}
"""What the first families are quantized to where one mixture is enough; other tests than those of all families run on
these, which differ in how a checkpoint is read, written and renamed."""


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    """A random model; biases and norms are random too, so that a swap of any two tensors shows."""
    import transformers

    prefix, sizes = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(
        **sizes | _ENDS | {"initializer_range": 0.1, "pad_token_id": 0} | overrides
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto_class(config).from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def auto_class(config: Any) -> Any:
    """The class of transformers that makes and loads models of this kind."""
    import transformers

    if config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM
    sees = hasattr(config, "vision_config")
    return transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM


def save(family: str, folder: Path, dtype: torch.dtype = torch.float32, *, shard: str = "1GB", **kwargs: Any) -> Path:
    """A saved random model."""
    build(family, dtype, **kwargs).save_pretrained(folder, max_shard_size=shard)
    return folder


class Folders:
    """Saved models by family and dtype, each made once; nobody may change them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, family: str, dtype: torch.dtype = torch.float32) -> Path:
        folder = self.root / f"{family}-{str(dtype).removeprefix('torch.')}"
        return folder if folder.exists() else save(family, folder, dtype)

    def quantized(self, family: str, scheme: str | None = None) -> Path:
        """A checkpoint as `model.save_pretrained` writes it, by the family's config or one scheme for all."""
        from llmquant import quantize_

        folder = self.root / f"{family}-{scheme}-quantized"
        if not folder.exists():
            model = load(self(family))
            quantize_(model, CONFIGS[family] if scheme is None else rtn({"_default": scheme, "_embedding": scheme}))
            model.save_pretrained(folder)
        return folder


def load(folder: Path, **kwargs: Any) -> Any:
    """The model in a folder."""
    from transformers import AutoConfig

    return auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, **kwargs).eval()


def copy(folder: Path, target: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(folder, target)
    return target


def tokens(rows: int = 2, length: int = 12) -> Tensor:
    """Some input."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


def inputs(model: Any) -> dict[str, Tensor]:
    """The same for any model: a decoder gets some too, and eyes an image."""
    if model.config.is_encoder_decoder:
        return {"input_ids": tokens(), "decoder_input_ids": tokens().flip(1)}
    return _with_images(model.config) if hasattr(model.config, "vision_config") else {"input_ids": tokens()}


def _with_images(config: Any) -> dict[str, Tensor]:
    """Two images of 4 x 4 patches, of which 2 x 2 make one token, each somewhere in its text."""
    ids, sight = tokens().clamp(min=config.video_token_id + 1), config.vision_config
    ids[:, 1:7] = torch.tensor([config.vision_start_token_id, *[config.image_token_id] * 4, config.vision_end_token_id])
    values = sight.in_channels * sight.temporal_patch_size * sight.patch_size**2
    patches = torch.randn(2 * 16, values, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": ids,
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
    }


def needs_calibration(config: Any) -> bool:
    """Whether a config has static activations."""
    found = [getattr(value, "activation", None) for _, value in to_config(config).items()]
    return any(activation is not None and activation.static for activation in found)


def quantize(model: Any, config: Any) -> Any:
    """`quantize_`, after a calibration run on `inputs` where the config needs one."""
    from llmquant import collect_stats, quantize_

    stats = collect_stats(model, config, [inputs(model)]) if needs_calibration(config) else None
    return quantize_(model, config, stats=stats)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """What the model says to it."""
    return model(**inputs(model), use_cache=False).logits


Bytes = tuple[torch.dtype, tuple[int, ...], bytes]


def raw(tensor: Tensor) -> Bytes:
    """Dtype, shape and bytes: equal where two tensors agree bit for bit (NaN included)."""
    tensor = tensor.detach().contiguous()
    return tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def disk(folder: Path) -> dict[str, Bytes]:
    """Every tensor of a folder's safetensors files; no key may occur twice."""
    found: dict[str, Bytes] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (it is no mapping)
                assert key not in found, f"{key} is stored twice"
                found[key] = raw(file.get_tensor(key))
    return found


def weights(model: nn.Module) -> Iterator[tuple[str, QuantizedTensor]]:
    """The quantized weights under all of their names."""
    for fqn, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, QuantizedTensor):
            yield fqn, parameter


def state(model: nn.Module) -> dict[str, Bytes]:
    """Every tensor of a model in memory, quantized ones by component and with their properties."""
    found: dict[str, Bytes] = {}
    for fqn, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, QuantizedTensor):
            found[f"{fqn} {tensor.meta}"] = (tensor.dtype, tuple(tensor.shape), b"")
            found |= {f"{fqn}.{field.name}": raw(inner) for field, inner in tensor.parts()}
        else:
            found[fqn] = raw(tensor)
    return found


def manifest(folder: Path) -> dict[str, Any]:
    """The `quantization_config` of a folder."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def assert_same(a: Mapping[str, Bytes], b: Mapping[str, Bytes]) -> None:
    """Two sets of tensors agree bit for bit; the message names those that do not, not their bytes."""
    assert sorted(a) == sorted(b)
    assert not [f"{key}: {a[key][:2]} and {b[key][:2]}" for key in a if a[key] != b[key]]


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes the tensors of a safetensors file and keeps its metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


class Shape(StrEnum):
    """The ways in which a plain checkpoint may lie in its folder."""

    single = auto()
    sharded = auto()

    def make(self, folder: Path, target: Path) -> Path:
        """A copy of a single-file checkpoint in this shape."""
        if self is Shape.single:
            return copy(folder, target)
        load(folder).save_pretrained(target, max_shard_size="30KB")
        return target


def to_bin(folder: Path, target: Path, count: int = 1) -> Path:
    """A copy of a checkpoint as old versions wrote it: pickles, perhaps several with an index."""
    tensors = load_file(copy(folder, target) / "model.safetensors")
    (target / "model.safetensors").unlink()
    if count == 1:
        torch.save(tensors, target / "pytorch_model.bin")
        return target
    names = {key: f"pytorch_model-{i % count + 1:05d}-of-{count:05d}.bin" for i, key in enumerate(sorted(tensors))}
    for name in set(names.values()):
        torch.save({key: t for key, t in tensors.items() if names[key] == name}, target / name)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return target


# ---------------------------------------------------------------------------------- fixtures, for conftests


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Saved tiny models."""
    return Folders(tmp_path_factory.mktemp("models"))
