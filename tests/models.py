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

from llmquant.config.fqn import FqnToConfig
from llmquant.config.recipe import to_config
from llmquant.config.schemes import QuantConfig
from llmquant.tensor import QuantizedTensor

VOCAB, HIDDEN = 128, 64
_SIZES = dict(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4)
_LLAMA = dict(_SIZES, num_key_value_heads=2, intermediate_size=112, max_position_embeddings=64)
_MOE = dict(_SIZES, num_key_value_heads=2, intermediate_size=48, num_local_experts=4, max_position_embeddings=64)

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", dict(_LLAMA, tie_word_embeddings=False)),
    "llama-tied": ("Llama", dict(_LLAMA, tie_word_embeddings=True)),
    "qwen2": ("Qwen2", dict(_LLAMA, tie_word_embeddings=True)),
    "gpt2": ("GPT2", dict(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64)),
    "mixtral": ("Mixtral", dict(_MOE, tie_word_embeddings=False)),
    "gpt-oss": ("GptOss", dict(_MOE, head_dim=16, sliding_window=16, num_experts_per_tok=2)),
}
"""Name -> transformers' prefix and config: plain and tied heads, biases, Conv1D, merged experts, transposed experts."""


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
"""What each family is quantized to where one mixture is enough."""


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    """A random model; biases and norms are random too, so that a swap of any two tensors shows."""
    import transformers

    prefix, sizes = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(
        **sizes | {"initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | overrides
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        name = "LMHeadModel" if prefix == "GPT2" else "ForCausalLM"
        model = getattr(transformers, f"{prefix}{name}")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


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
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


def copy(folder: Path, target: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(folder, target)
    return target


def tokens(rows: int = 2, length: int = 12) -> Tensor:
    """Some input."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """What the model says to it."""
    return model(tokens(), use_cache=False).logits


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
    bin = auto()
    sharded_bin = auto()

    def make(self, folder: Path, target: Path) -> Path:
        """A copy of a single-file checkpoint in this shape."""
        if self is Shape.single:
            return copy(folder, target)
        if self is Shape.sharded:
            load(folder).save_pretrained(target, max_shard_size="30KB")
            return target
        return to_bin(folder, target, 3 if self is Shape.sharded_bin else 1)


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
