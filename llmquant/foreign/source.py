"""Another library's checkpoint as a source of weights under the names of the transformers model.

It is read twice. The first time every weight is a sketch on the meta device: names, shapes, formats and bytes of the
result are known, and all that does not fit is refused, before the memory of one weight is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmquant.checkpoint.config_file import read_config
from llmquant.checkpoint.shards import Stored
from llmquant.checkpoint.source import Source, build_skeleton, locate, weight_files
from llmquant.config.base import QuantConfig
from llmquant.config.candidates import Role, find_candidates
from llmquant.errors import BadWeightError, CheckpointError
from llmquant.foreign.detect import find_reader, quantization_of
from llmquant.foreign.spec import ForeignWeight, Grid, Reader
from llmquant.foreign.store import Store
from llmquant.quantize import quantize_weight


class Asked(NamedTuple):
    """What to do with weights that no format of ours holds: nothing (they are refused), or quantize them again.

    `config` None with `given` leaves them plain.
    """

    given: bool = False
    config: QuantConfig | None = None


NOTHING = Asked()


@dataclass(frozen=True, eq=False)
class Made:
    """A tensor that is made when it is read: plain or quantized, or a sketch."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    def read(self, dtype: torch.dtype | None = None, rows: tuple[int, int] | None = None) -> Tensor:
        """Its values, or those of some rows [first, last)."""
        found = self.make() if rows is None else self.make()[rows[0] : rows[1]]
        return found if dtype is None else found.to(dtype)


@dataclass(frozen=True)
class ForeignSource(Source):
    """A checkpoint of another library. `made` is what stands behind each key: plain tensors and quantized weights."""

    made: Mapping[str, Stored] = field(default_factory=dict)

    def _stored(self) -> dict[str, Stored]:
        return dict(self.made)


@dataclass(frozen=True)
class Opened:
    """A checkpoint of another library, nothing of it read but headers and small tensors.

    Attributes:
        reader: whose it is.
        settings: its `quantization_config`.
        config: the rest of config.json.
        store: its tensors.
        weights: its quantized weights, by the key that a plain checkpoint would have for them.
        asked: what to do with those that no format holds.
        dtype: of the model when it is loaded.
        skeleton: that model on the meta device.
    """

    folder: Path
    reader: Reader
    settings: dict[str, Any]
    config: dict[str, Any]
    store: Store
    files: tuple[Path, ...]
    weights: dict[str, ForeignWeight]
    asked: Asked
    dtype: torch.dtype
    skeleton: nn.Module

    def source(self, *, sketch: bool, on_read: Callable[[str], None] = lambda key: None) -> ForeignSource:
        """The checkpoint as a source: of sketches on the meta device, or of values.

        `on_read` is told each key before it is read.
        """
        skeleton = self.skeleton
        conv1d = {fqn for c in find_candidates(skeleton).candidates if Role.conv1d in c.roles for fqn in c.fqns}
        prefix = f"{getattr(skeleton, 'base_model_prefix', '')}."
        turned = conv1d | {fqn.removeprefix(prefix) for fqn in conv1d}
        taken = {key for weight in self.weights.values() for key in weight.keys}
        made: dict[str, Stored] = {}
        for key in self.store:
            if key not in taken:
                make = partial(self._plain, key, sketch, on_read)
                made[key] = Made(self.store.dtype(key), self.store.shape(key), make)
        for name, weight in self.weights.items():
            make = partial(self._weight, weight, sketch, name in turned, on_read)
            made[name] = Made(self.dtype, weight.shape[::-1] if name in turned else weight.shape, make)
        return ForeignSource(self.folder, self.config, self.dtype, skeleton, self.files, made=made)

    def bytes_of(self, key: str) -> int:
        """Bytes of what stands behind a key of the plain checkpoint."""
        return sum(map(self.store.nbytes, self.weights[key].keys if key in self.weights else (key,)))

    def _plain(self, key: str, sketch: bool, on_read: Callable[[str], None]) -> Tensor:
        on_read(key)
        if sketch:
            return torch.empty(self.store.shape(key), dtype=self.store.dtype(key), device="meta")
        return self.store.read(key)

    def _weight(self, weight: ForeignWeight, sketch: bool, turned: bool, on_read: Callable[[str], None]) -> Tensor:
        on_read(weight.name)
        found = self._sketch(weight) if sketch else self._load(weight)
        return found.t() if turned else found

    def _sketch(self, weight: ForeignWeight) -> Tensor:
        if weight.grid is not None:
            return weight.sketch(self.dtype)
        if self.asked.config is None:
            return torch.empty(weight.shape, dtype=self.dtype, device="meta")
        return as_grid(self.asked.config, weight).sketch(self.dtype)

    def _load(self, weight: ForeignWeight) -> Tensor:
        if weight.grid is not None:
            return weight.load(self.dtype)
        values = weight.values().to(self.dtype)
        try:
            return values if self.asked.config is None else quantize_weight(values, self.asked.config)
        except BadWeightError as error:
            raise BadWeightError(error.what, where=weight.name, hint=error.hint) from error


def open_foreign(
    model: str | Path, readers: Sequence[Reader], asked: Asked = NOTHING, dtype: torch.dtype | None = None
) -> Opened:
    """Opens another library's checkpoint and works out how each of its quantized weights is to be taken over.

    Raises:
        ModelNotFoundError, AlreadyQuantizedError, ConfigError.
        CheckpointError: for what no reader knows, and for tensors that do not fit their config or each other.
    """
    folder = locate(model)
    config = read_config(folder)
    settings = quantization_of(folder, config)
    reader = find_reader(readers, settings)
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    files = weight_files(folder)
    store = Store(files)
    weights: dict[str, ForeignWeight] = {}
    for weight in reader.weights(store, settings):
        if weight.name in weights:
            raise CheckpointError("the checkpoint holds a weight twice", where=weight.name)
        if weight.grid is None and not asked.given:
            raise _outside(weight)
        weights[weight.name] = weight
    if not weights:
        raise CheckpointError(f"no tensor is quantized as {reader.name} does it", where=str(folder))
    dtype = dtype or _dtype_of(plain, store)
    skeleton = build_skeleton(folder, plain, dtype)
    return Opened(folder, reader, settings, plain, store, files, weights, asked, dtype, skeleton)


def as_grid(config: QuantConfig, weight: ForeignWeight) -> ForeignWeight:
    """The weight as it will be once it is quantized again."""
    spec = config.spec(*weight.shape)
    grid = Grid(spec.format.name, spec.block, spec.scale_dtype, spec.asymmetric)
    return ForeignWeight(weight.name, weight.keys, weight.shape, grid, None)


def kept_names(opened: Opened) -> Iterator[str]:
    """Keys of the checkpoint as a plain one would have them."""
    taken = {key for weight in opened.weights.values() for key in weight.keys}
    yield from (key for key in opened.store if key not in taken)
    yield from opened.weights


def _outside(weight: ForeignWeight) -> CheckpointError:
    return CheckpointError(
        f"no format of llmquant holds this weight: {weight.note}",
        where=weight.name,
        hint="--requantize SCHEME quantizes such weights again, --requantize none leaves them plain",
    )


def _dtype_of(config: Mapping[str, Any], store: Store) -> torch.dtype:
    """The dtype of the model: config.json's, else that of the first 16 or 32-bit float in the files."""
    nested = config.get("text_config")
    nested = nested if isinstance(nested, Mapping) else {}
    named = [place.get(key) for place in (config, nested) for key in ("dtype", "torch_dtype")]
    for name in named:
        found = getattr(torch, name, None) if isinstance(name, str) else None
        if isinstance(found, torch.dtype) and found.is_floating_point:
            return found
    floats = (torch.float16, torch.bfloat16, torch.float32)
    return next((store.dtype(key) for key in store if store.dtype(key) in floats), torch.float32)
