"""A plain Hugging Face checkpoint, read tensor by tensor under the names its transformers model uses."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from llmquant.checkpoint.checksums import FILE as CHECKSUMS
from llmquant.checkpoint.config_file import read_config
from llmquant.checkpoint.header import read_header
from llmquant.checkpoint.index import INDEX, SINGLE, check_inside, check_shards, read_index
from llmquant.errors import AlreadyQuantizedError, CheckpointError, ConfigError, ModelNotFoundError, PickleError

_OWN = ("config.json", CHECKSUMS)  # what a copy gets anew
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")


@dataclass(frozen=True)
class Source:
    """A checkpoint that is not loaded.

    Attributes:
        folder: where it lies.
        config: config.json as plain JSON.
        dtype: the dtype its model has when transformers loads it.
        skeleton: that model on the meta device.
        files: its weight files.
    """

    folder: Path
    config: dict[str, Any]
    dtype: torch.dtype
    skeleton: nn.Module
    files: tuple[Path, ...]

    def extras(self) -> list[Path]:
        """The files beside the weights that a copy needs."""
        return extras(self.folder)

    def load(self) -> Any:
        """The plain model. Its weights are mapped from the files: memory is taken by those that are used or changed."""
        kind: Any = type(self.skeleton)
        return kind.from_pretrained(self.folder, dtype=self.dtype, use_safetensors=True)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """FQN and value of every tensor of the model, one at a time.

        Keys of the file go through transformers' own conversion mapping (renames, merges of experts, splits).

        Raises:
            CheckpointError: for a file that cannot be read, for parameters that no file holds, and for other shapes.
        """
        groups, known = dict(self._groups()), self.skeleton.state_dict()
        missing = set(self._required(groups))
        for name, value in self._converted(groups):
            missing.discard(name)
            if name in known and value.shape != known[name].shape:
                raise CheckpointError(
                    f"the shape {tuple(value.shape)} in the file is not the model's {tuple(known[name].shape)}",
                    where=f"{self.folder}: {name}",
                    hint="config.json and the weights may belong to different models",
                )
            yield name, value
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {len(missing)} parameters of the model",
                where=f"{self.folder}: {', '.join(sorted(missing)[:5])}",
                hint="a shard may be missing: copy or download it again",
            )

    def _required(self, groups: Container[str]) -> Iterator[str]:
        """One name of each parameter; of tied ones whichever the file holds."""
        tied = getattr(self.skeleton, "all_tied_weights_keys", {})
        for name, _ in self.skeleton.named_parameters():
            aliases = [target for target, source in tied.items() if source == name]
            yield next((n for n in (name, *aliases) if n in groups), name)

    def _converted(self, groups: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        for name, transform in groups.items():
            try:
                found = transform.convert(name, model=self.skeleton, config=self.skeleton.config)
            except (OSError, RuntimeError, ValueError) as error:
                raise CheckpointError(f"cannot read the tensors of {name}: {error}", where=str(self.folder)) from error
            for target, value in found.items():
                yield target, value[0] if isinstance(value, list) else value

    def _groups(self) -> Iterator[tuple[str, Any]]:
        """(first FQN, transform with its lazy inputs) for each parameter or merge of parameters of the model."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        known = self.skeleton.state_dict()
        mapping = get_model_conversion_mapping(self.skeleton)  # type: ignore[arg-type]
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        prefix = str(self.skeleton.base_model_prefix)
        groups: dict[str, Any] = {}
        for key, read in sorted(self._readers().items(), key=lambda item: dot_natural_key(item[0])):
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:
                name, pattern = key, None
            if name in known:
                fresh = deepcopy(by_pattern[pattern]) if pattern else WeightRenaming(key, name)
                groups.setdefault(name, fresh).add_tensor(name, key, pattern or key, read)
        yield from groups.items()

    def _readers(self) -> dict[str, Callable[[], Tensor]]:
        """Key -> a function that reads it."""
        readers: dict[str, Callable[[], Tensor]] = {}
        for path in self.files:
            readers |= _safetensors_readers(path)
        return readers


def open_source(model: str | Path, dtype: torch.dtype | None = None) -> Source:
    """Opens a plain checkpoint by folder or hub id, and builds its model on the meta device.

    Raises:
        ModelNotFoundError: for what is no Hugging Face checkpoint.
        AlreadyQuantizedError: for a checkpoint that is quantized already.
    """
    folder = locate(model)
    config = read_config(folder)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method:
        raise AlreadyQuantizedError(
            f"the model is quantized already (by {method})", where=str(folder), hint="start from the 16-bit model"
        )
    files = weight_files(folder)
    check_shards(folder, files)
    dtype = dtype or _own_dtype(folder, config, files)
    return Source(folder, config, dtype, build_skeleton(folder, config, dtype), files)


def extras(folder: Path) -> list[Path]:
    """The files of a checkpoint that a copy needs beside weights: tokenizer, generation config, licence, code."""
    found = [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")]
    kept = [p for p in found if p.name not in _OWN and not p.name.endswith(_WEIGHT_FILES)]
    for path in kept:
        check_inside(folder, path)  # a copy of what a link leads to would give it away
    return kept


def locate(model: str | Path) -> Path:
    """The local folder of a model; a hub id is downloaded. Raises `ModelNotFoundError`."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(model)):
        raise ModelNotFoundError(
            "no such model folder", where=str(model), hint="a folder with config.json and safetensors, or a hub id"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(model), ignore_patterns=["*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*"])
        )
    except Exception as error:
        raise ModelNotFoundError(
            f"neither a local folder nor a model that the hub gives out ({type(error).__name__})",
            where=str(model),
            hint="check the path; for a hub id, the network, the spelling and your token",
        ) from error


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files that hold a model's weights.

    Raises:
        ModelNotFoundError: for none.
        PickleError: where there are only pickles.
        CheckpointError: for an index that cannot be read, and for files that are lost or lie elsewhere.
    """
    if (folder / SINGLE).is_file():
        check_inside(folder, folder / SINGLE)
        return (folder / SINGLE,)
    if (folder / INDEX).is_file():
        return tuple(folder / name for name in sorted(set(read_index(folder / INDEX).values()), key=Path))
    refuse_pickles(folder)
    raise ModelNotFoundError(f"the folder holds no {SINGLE}", where=str(folder))


def refuse_pickles(folder: Path) -> None:
    """Raises `PickleError` for a folder with pickles and no safetensors."""
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles and not any(folder.glob("*.safetensors")):
        raise PickleError(
            "the weights are pickles, which can run code when they are read; only safetensors are read",
            where=f"{folder}: {', '.join(pickles[:3])}",
            hint="if you trust their origin, write them anew: AutoModelForCausalLM.from_pretrained(FOLDER)"
            ".save_pretrained(OTHER) of transformers; for a model of the hub, see whether it has safetensors",
        )


def build_skeleton(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """The model of a config on the meta device. Raises `ModelNotFoundError` for what transformers does not know."""
    import transformers

    names = config.get("architectures") or []
    try:
        parsed = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        cls = getattr(transformers, names[0], None) if names else None
        with torch.device("meta"):
            if cls is None:
                return transformers.AutoModelForCausalLM.from_config(parsed, dtype=dtype)
            return cls._from_config(parsed, dtype=dtype)
    except Exception as error:  # configs are checked by each model's code, which raises what it likes
        raise ModelNotFoundError(
            f"transformers {transformers.__version__} cannot build a {config.get('model_type')!r} model: {error}",
            where=str(folder),
        ) from error


def parse_dtype(name: str | None) -> torch.dtype | None:
    """`auto` or None -> None; else a floating dtype by name. Raises `ConfigError`."""
    if name in (None, "auto"):
        return None
    found = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(name))
    if found is None:
        raise ConfigError(f"unknown dtype {name!r}", hint="auto, float32, bfloat16 or float16")
    return found


def _own_dtype(folder: Path, config: dict[str, Any], files: tuple[Path, ...]) -> torch.dtype:
    """The dtype that `from_pretrained` would choose: config.json's, else that of the first floating tensor."""
    text = config.get("text_config") or {}
    name = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    if name:
        found = getattr(torch, str(name), None)
        if not isinstance(found, torch.dtype):
            raise ModelNotFoundError(f"config.json names the dtype {name!r}, which torch lacks", where=str(folder))
        return found
    floating = (dtype for path in files for dtype in _dtypes(path) if dtype is not None and dtype.is_floating_point)
    return next(floating, torch.float32)


def _dtypes(path: Path) -> Iterator[torch.dtype | None]:
    yield from (dtype for dtype, _ in read_header(path).tensors.values())


def _safetensors_readers(path: Path) -> dict[str, Callable[[], Tensor]]:
    header = read_header(path)

    def reader(key: str) -> Callable[[], Tensor]:
        # A handle a tensor: pages of the file that were read can be given back.
        def read() -> Tensor:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(key)

        return read

    return {key: reader(key) for key in header.tensors}
