"""A plain Hugging Face checkpoint, read tensor by tensor under the names its transformers model uses."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.checkpoint.checksums import FILE as CHECKSUMS
from llmquant.checkpoint.config_file import read_config
from llmquant.checkpoint.hub import HubShards, fetch_small_files
from llmquant.checkpoint.index import INDEX, SINGLE, check_inside, check_shards, read_index
from llmquant.checkpoint.mapping import Group, find_groups
from llmquant.checkpoint.origin import Origin
from llmquant.checkpoint.raw import raw_groups, raw_skeleton
from llmquant.checkpoint.shards import Stored, stored_in
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
        skeleton: that model on the meta device; of a raw source, a tree of its keys.
        files: its weight files; none of those that are in the hub and may not be here yet.
        hub: these.
        raw: whether keys of the files are the names of the tensors, which keep their own dtypes.
        trusted: whether code beside the weights may run.
    """

    folder: Path
    config: dict[str, Any]
    dtype: torch.dtype
    skeleton: nn.Module
    files: tuple[Path, ...]
    hub: HubShards | None = None
    raw: bool = False
    trusted: bool = False

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know of how it is read."""
        if not self.raw:
            return ()
        kind = self.config.get("model_type")
        return (
            f"read raw: nothing is known of {kind!r} but the keys of its files, so that every matrix is taken for a "
            "weight [out, in], but for norms and embeddings by their keys; read the result with llmquant.load_raw",
        )

    def identity(self) -> list[Any]:
        """What tells the checkpoint from others and from its own earlier versions, without reading its tensors."""
        if self.hub is not None:
            return [self.hub.repo, self.hub.commit, self.raw]
        statuses = [(path.name, path.stat()) for path in (*self.files, *self.extras())]
        return [self.raw, *([name, status.st_size, status.st_mtime_ns] for name, status in statuses)]

    def shards_of(self, group: Group) -> set[str]:
        """The shards of the hub that a group reads."""
        return {given.stored.shard for given in group.inputs} if self.hub is not None else set()  # type: ignore[attr-defined]

    def extras(self) -> list[Path]:
        """The files beside the weights that a copy needs."""
        return extras(self.folder)

    def load(self) -> Any:
        """The plain model. Its weights are mapped from the files: memory is taken by those that are used or changed."""
        if self.raw:
            raise _unknown(
                self.folder, self.config, "a raw checkpoint cannot be run", hint="an algorithm without a text"
            )
        if self.hub is not None:
            self.hub.fetch_all()
        kind: Any = type(self.skeleton)
        return kind.from_pretrained(self.folder, dtype=self.dtype, trust_remote_code=self.trusted, use_safetensors=True)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """FQN and value of every tensor of the model, one at a time.

        Keys of the file go through transformers' own conversion mapping (renames, merges of experts, splits).

        Raises:
            CheckpointError: as `groups`, and for a file that cannot be read.
        """
        for group in self.groups():
            yield from group.read().items()

    def groups(self) -> list[Group]:
        """What every tensor of the model is read from; nothing but headers is read yet.

        Raises:
            CheckpointError: for a file that cannot be read, for parameters that no file holds, and for other shapes.
        """
        if self.raw:
            return raw_groups(self.skeleton, self._stored())
        groups, known = find_groups(self.skeleton, self._stored()), self.skeleton.state_dict()
        missing = set(self._required(groups))
        for group in groups.values():
            for name, (_, shape) in group.specs().items():
                missing.discard(name)
                if name in known and shape != tuple(known[name].shape):
                    raise CheckpointError(
                        f"the shape {shape} in the file is not the model's {tuple(known[name].shape)}",
                        where=f"{self.folder}: {name}",
                        hint="config.json and the weights may belong to different models",
                    )
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {len(missing)} parameters of the model",
                where=f"{self.folder}: {', '.join(sorted(missing)[:5])}",
                hint="a shard may be missing: copy or download it again",
            )
        return list(groups.values())

    def _required(self, groups: Container[str]) -> Iterator[str]:
        """One name of each parameter; of tied ones whichever the file holds."""
        tied = getattr(self.skeleton, "all_tied_weights_keys", {})
        for name, _ in self.skeleton.named_parameters():
            aliases = [target for target, source in tied.items() if source == name]
            yield next((n for n in (name, *aliases) if n in groups), name)

    def _stored(self) -> dict[str, Stored]:
        """Key -> the tensor in its file."""
        return _stored(self.files, self.hub)


def open_source(model: str | Path | Origin, dtype: torch.dtype | None = None) -> Source:
    """Opens a plain checkpoint by folder or hub id, and builds its model on the meta device.

    Of a hub repository only small files are fetched, and the headers of its shards.

    Raises:
        ModelNotFoundError: for what is no Hugging Face checkpoint, or one of an architecture that is not known.
        AlreadyQuantizedError: for a checkpoint that is quantized already.
    """
    origin = Origin.of(model)
    local = _is_local(origin.model)
    if local and origin.revision is not None:
        raise ConfigError("a folder has no revisions", where=str(origin), hint="leave --revision out")
    folder = Path(origin.model) if local else fetch_small_files(str(origin.model), origin.revision)
    config = read_config(folder)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method:
        raise AlreadyQuantizedError(
            f"the model is quantized already (by {method})", where=str(folder), hint="start from the 16-bit model"
        )
    hub = None if local else _hub_shards(origin, folder)
    files = weight_files(folder) if hub is None else ()
    if local:
        check_shards(folder, files)
    own = dtype or _own_dtype(folder, config, files, hub)
    if origin.raw:
        skeleton: nn.Module = raw_skeleton(_stored(files, hub))
    else:
        skeleton = build_skeleton(folder, config, own, trusted=origin.trust_remote_code)
    return Source(folder, config, own, skeleton, files, hub, origin.raw, origin.trust_remote_code)


def _stored(files: tuple[Path, ...], hub: HubShards | None) -> dict[str, Stored]:
    """Key -> the tensor in its file."""
    found: dict[str, Stored] = dict(hub.stored()) if hub is not None else {}
    for path in files:
        found |= stored_in(path)
    return found


def _hub_shards(origin: Origin, folder: Path) -> HubShards:
    index = folder / INDEX
    indexed = set(read_index(index, shards_may_be_missing=True).values()) if index.is_file() else {SINGLE}
    return HubShards(str(origin.model), folder, sorted(indexed), origin.drop_shards)


def extras(folder: Path) -> list[Path]:
    """The files of a checkpoint that a copy needs beside weights: tokenizer, generation config, licence, code."""
    found = [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")]
    kept = [p for p in found if p.name not in _OWN and not p.name.endswith(_WEIGHT_FILES)]
    for path in kept:
        check_inside(folder, path)  # a copy of what a link leads to would give it away
    return kept


def locate(model: str | Path) -> Path:
    """The local folder of a model; a hub id is downloaded. Raises `ModelNotFoundError`."""
    if _is_local(model):
        return Path(model)
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


def _is_local(model: str | Path) -> bool:
    """Whether it is a folder; else it may be a hub id. Raises `ModelNotFoundError` for what can be neither."""
    path = Path(model)
    if path.is_dir():
        return True
    if path.exists() or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(model)):
        raise ModelNotFoundError(
            "no such model folder", where=str(model), hint="a folder with config.json and safetensors, or a hub id"
        )
    return False


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


def build_skeleton(
    folder: Path, config: dict[str, Any], dtype: torch.dtype, device: str = "meta", *, trusted: bool = False
) -> nn.Module:
    """The model of a config, by default on the meta device; code beside the config runs only if it is trusted.

    Raises:
        ModelNotFoundError: for what transformers does not know.
    """
    import transformers

    names = config.get("architectures") or []
    try:
        parsed = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
        cls = getattr(transformers, names[0], None) if names else None
        with torch.device(device):
            if cls is None:
                return transformers.AutoModelForCausalLM.from_config(parsed, dtype=dtype, trust_remote_code=trusted)
            return cls._from_config(parsed, dtype=dtype)
    except Exception as error:  # configs are checked by each model's code, which raises what it likes
        what = f"transformers {transformers.__version__} cannot build a {config.get('model_type')!r} model: {error}"
        raise _unknown(folder, config, what) from error


def _unknown(folder: Path, config: dict[str, Any], what: str, hint: str | None = None) -> ModelNotFoundError:
    ways = ["--raw takes the matrices of the files by their keys"]
    if config.get("auto_map"):
        ways.append("--trust-remote-code runs the code that the repository brings, if you have read it")
    return ModelNotFoundError(what, where=str(folder), hint=hint or "; ".join(ways))


def parse_dtype(name: str | None) -> torch.dtype | None:
    """`auto` or None -> None; else a floating dtype by name. Raises `ConfigError`."""
    if name in (None, "auto"):
        return None
    found = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(name))
    if found is None:
        raise ConfigError(f"unknown dtype {name!r}", hint="auto, float32, bfloat16 or float16")
    return found


def _own_dtype(
    folder: Path, config: dict[str, Any], files: tuple[Path, ...], hub: HubShards | None = None
) -> torch.dtype:
    """The dtype that `from_pretrained` would choose: config.json's, else that of the first floating tensor."""
    text = config.get("text_config") or {}
    name = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    if name:
        found = getattr(torch, str(name), None)
        if not isinstance(found, torch.dtype):
            raise ModelNotFoundError(f"config.json names the dtype {name!r}, which torch lacks", where=str(folder))
        return found
    return next((t.dtype for t in _stored(files, hub).values() if t.dtype.is_floating_point), torch.float32)
