"""The quantizer plug-in of transformers: load, save, re-save and quantize while loading."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmquant.checkpoint.checksums import checksum, in_manifest
from llmquant.checkpoint.manifest import METHOD, check_version, new_manifest, shard_metadata, verify
from llmquant.checkpoint.state import assemble, component_key, expected, state_dict
from llmquant.config import recipe
from llmquant.config.base import QuantConfig
from llmquant.config.candidates import Candidate, flat_experts
from llmquant.config.fqn import FqnToConfig
from llmquant.errors import BadWeightError, CheckpointError, ConfigError
from llmquant.integrations import sharding
from llmquant.primitives.spec import QuantSpec
from llmquant.quantize import (
    AFTER_QUANTIZE,
    QuantizationReport,
    check_stats,
    make_plan,
    quantize_weight,
    replace_weight,
    report_weight,
)
from llmquant.tensor import STORAGE, QuantizedTensor


@register_quantization_config(METHOD)
class LlmQuantConfig(QuantizationConfigMixin):
    """The `quantization_config` of a model.

    Args:
        config: what `quantize_` takes: a scheme (`"int4-g64"`), a recipe's name or path, a config, an `FqnToConfig`,
            or a mapping of keys to schemes.
        **manifest: the other fields of a saved manifest, as read from config.json.
    """

    def __init__(self, config: Any = None, **manifest: Any) -> None:
        if manifest and "quant_method" not in manifest:
            raise ConfigError(
                f"LlmQuantConfig knows no {', '.join(map(repr, manifest))}",
                hint='say it all in one config, for instance LlmQuantConfig("int4-g64")',
            )
        self.quant_method = METHOD  # type: ignore[assignment]
        self.manifest = manifest | {"quant_method": METHOD}
        if "format_version" in manifest:
            self.config = config  # as it was saved: the hash covers it, and a later version may say more in it
        else:
            self.config = [] if config is None else recipe.to_pairs(recipe.to_config(config))

    @property
    def fqn_to_config(self) -> FqnToConfig:
        """What to do to which weight."""
        if not self.config:
            raise ConfigError(
                "LlmQuantConfig() does not say what to do", hint='for instance LlmQuantConfig("int4-g64")'
            )
        return recipe.to_config(self.config)

    @property
    def weights(self) -> Mapping[str, Any]:
        """The manifest's entries, by FQN; empty before a model is saved."""
        return self.manifest.get("weights", {})

    def renew(self, entries: Mapping[str, Any], checksums: Mapping[str, Any]) -> dict[str, Any]:
        """A manifest of these weights with a new save id; it becomes what `to_dict` gives."""
        self.manifest = new_manifest(self.config or [], entries, checksums=checksums)
        return self.manifest

    def __deepcopy__(self, memo: Any) -> LlmQuantConfig:
        # Manifests are replaced, never changed, so copies of a model's config can share one.
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        return copy

    def to_dict(self) -> dict[str, Any]:
        """The manifest as it stands in config.json."""
        return {**self.manifest} if self.config is None else {**self.manifest, "config": self.config}

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


@register_quantizer(METHOD)
class LlmQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves a model."""

    requires_calibration = False
    quantization_config: LlmQuantConfig

    def __init__(self, quantization_config: LlmQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.report = QuantizationReport()
        self._chosen: dict[str, tuple[Candidate, QuantConfig]] = {}  # by every FQN
        self._failure: BadWeightError | None = None

    # --- loading --------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses what cannot work before anything is read."""
        device_map = kwargs.get("device_map")
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise ConfigError(
                "quantized weights cannot be offloaded to disk", where="device_map", hint="use cpu instead of disk"
            )
        if self.pre_quantized:
            check_version(self.quantization_config.manifest, "config.json")
        else:
            _ = self.quantization_config.fqn_to_config

    def update_attn_implementation(self, config: Any) -> Any:
        """Experts run one by one: the grouped product of transformers does not know packed weights."""
        config._experts_implementation = "eager"
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            verify(self.quantization_config.to_dict(), self._files(kwargs))
        else:
            plan = make_plan(model, self.quantization_config.fqn_to_config)
            check_stats(plan, None)  # a model that is being loaded has met no inputs yet
            for candidate, config in plan.chosen:
                for fqn in candidate.fqns:
                    self._chosen[fqn] = (candidate, config)
            self.report.skipped, self.report.warnings = plan.skipped(model), plan.resolution.warnings
        sharding.load_whole(model, lambda name: self._layout(name, model))
        return model

    def _layout(self, name: str, model: Any) -> sharding.Layout | None:
        if name in self._chosen:
            candidate, config = self._chosen[name]
            return sharding.Layout(_spec(candidate, config).block, candidate.transposed)
        fqn = _fqn(name, model, self.quantization_config.weights)
        described = self.quantization_config.weights.get(fqn) if self.pre_quantized else None
        return sharding.Layout(tuple(described["block"]), described["transposed"]) if described else None

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is to be quantized while it is loaded, or arrives quantized."""
        return param_name in (self.quantization_config.weights if self.pre_quantized else self._chosen)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes an element will take, so that `device_map="auto"` plans with true sizes."""
        described = self.quantization_config.weights.get(param_name)
        if described is not None:
            sizes = expected(param_name, described).values()
            return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in sizes) / max(param.numel(), 1)
        if param_name in self._chosen:
            candidate, config = self._chosen[param_name]
            spec = _spec(candidate, config)
            columns = candidate.shape[-2 if candidate.transposed else -1]
            block = spec.block[0] * spec.block[1]
            outer = 4 / columns if spec.row_scale else 0.0
            return spec.format.row_bytes(columns) / columns + spec.scale_dtype.itemsize / max(block, 1) + outer
        return param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that quantizes one parameter after it was read."""
        return _Quantize(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """A quantized checkpoint is keyed by the model's own names; a plain one goes through the model's mapping."""
        if not self.pre_quantized:
            return weight_conversions
        return [_Gather(self._gathered(), [_Assemble(self)])]

    def _gathered(self) -> _Keys:
        return _Keys(
            {
                component_key(fqn, name): (fqn, name)
                for fqn in self.quantization_config.weights
                for name in _Gather.COMPONENTS
            }
        )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        sharding.loaded(model)
        if self._failure is not None:
            raise self._failure
        self._quantize_the_rest(model)
        # Saving writes the model's own names again, so there is nothing to revert.
        model._weight_conversions = []
        if not self.pre_quantized:
            self.report.bytes_after = sum(sharding.local(p).nbytes for p in model.parameters())
        return model

    def _quantize_the_rest(self, model: Any) -> None:
        """Weights that did not pass through `get_quantize_ops` (absent from the file, or split from another)."""
        for fqn, (candidate, _) in self._chosen.items():
            weight = model.get_parameter(fqn)
            if fqn == candidate.name and not isinstance(sharding.local(weight), QuantizedTensor):
                sharding.refuse_sharded(fqn, weight)
                replace_weight(model, candidate.fqns, self.quantize(fqn, weight))

    def quantize(self, fqn: str, weight: Tensor) -> QuantizedTensor:
        """Quantizes one parameter as planned and reports it."""
        candidate, config = self._chosen[fqn]
        try:
            quantized = quantize_weight(weight.reshape(candidate.shape), config, transposed=candidate.transposed)
        except BadWeightError as error:
            raise BadWeightError(error.what, where=fqn, hint=error.hint) from error
        self.report.bytes_before += weight.nbytes
        self.report.quantized[fqn] = report_weight(candidate.fqns, quantized, config, weight.nbytes)
        return quantized

    # --- saving ---------------------------------------------------------------------------------------

    def is_serializable(self) -> bool:
        """Always."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Frozen weights with adapters on top can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The subclasses are traceable."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Plain tensors under the model's own names, and what binds each shard to config.json."""
        sharding.refuse_to_save(model)
        tensors, entries = state_dict(model)
        manifest = self.quantization_config.renew(entries, in_manifest(_checksums(model, tensors)))
        model.config.quantization_config = self.quantization_config
        model._weight_conversions = []
        return tensors, shard_metadata(manifest)

    # --- leaving --------------------------------------------------------------------------------------

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        replaced: dict[int, nn.Parameter] = {}
        for name, weight in list(model.named_parameters(remove_duplicate=False)):
            if isinstance(weight, QuantizedTensor):
                path, _, attribute = name.rpartition(".")
                owner = model.get_submodule(path)
                if id(weight) not in replaced:
                    plain = weight.dequantize(dtype)
                    plain = plain.flatten(0, 1) if flat_experts(owner) else plain
                    replaced[id(weight)] = nn.Parameter(plain, requires_grad=False)
                setattr(owner, attribute, replaced[id(weight)])
        if hasattr(model, "_weight_conversions"):
            del model._weight_conversions  # a plain model saves under its original names again
        return model

    @staticmethod
    def _files(kwargs: Mapping[str, Any]) -> list[str]:
        files = kwargs.get("checkpoint_files") or []
        if not all(str(f).endswith(".safetensors") for f in files):
            raise CheckpointError("a quantized checkpoint is stored in safetensors", where=str(files))
        return list(files)


class _Quantize(ConversionOps):
    """Quantizes the parameters that one or more tensors of the file turned into."""

    def __init__(self, quantizer: LlmQuantizer) -> None:
        self.quantizer = quantizer

    def __deepcopy__(self, memo: Any) -> _Quantize:
        return self

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {fqn: self._one(fqn, value, kwargs["model"]) for fqn, value in input_dict.items()}

    def _one(self, fqn: str, value: Any, model: Any) -> Any:
        value = value[0] if isinstance(value, list) else value
        if fqn not in self.quantizer._chosen:
            return value
        dtype = model.get_parameter(fqn).dtype
        value = value if value.dtype == dtype else value.to(dtype)
        try:
            weight = self.quantizer.quantize(fqn, value)
            return nn.Parameter(_own_part(weight, model, fqn), requires_grad=False)
        except BadWeightError as error:
            # Raised here, it would end in a log and a RuntimeError of transformers; it is raised after the loading.
            self.quantizer._failure = self.quantizer._failure or error
            return value


class _Assemble(ConversionOps):
    """Puts the components of one weight together."""

    def __init__(self, quantizer: LlmQuantizer) -> None:
        # The attribute's name tells transformers to leave the components' dtypes alone.
        self.hf_quantizer = quantizer

    def __deepcopy__(self, memo: Any) -> _Assemble:
        return self

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        name, model = kwargs["full_layer_name"], kwargs["model"]
        entries = self.hf_quantizer.quantization_config.weights
        fqn = _fqn(name, model, entries)
        if fqn not in entries:
            raise CheckpointError("the manifest does not list this weight", where=name)
        tensors = {component_key(fqn, field): tensors[0] for field, tensors in input_dict.items()}
        weight = assemble(fqn, entries[fqn], tensors, model.get_parameter(name).dtype)
        return {name: nn.Parameter(_own_part(weight, model, name), requires_grad=False)}


class _Keys(dict[str, tuple[str, str]]):
    """Checkpoint key -> (FQN, component). Shared, never copied: transformers copies converters for every parameter."""

    def __deepcopy__(self, memo: Any) -> _Keys:
        return self


class _Gather(WeightConverter):
    """Collects the components of each quantized weight, by exact keys instead of patterns."""

    COMPONENTS = tuple(dict.fromkeys(field.name for cls in STORAGE.values() for field in cls.fields))
    __slots__ = ("keys",)

    def __init__(self, keys: _Keys, operations: list[ConversionOps]) -> None:
        super().__init__(list(self.COMPONENTS), ["weight"], operations)
        self.keys = keys

    def __deepcopy__(self, memo: Any) -> _Gather:
        # One is made for every weight: new collections, and nothing else that is worth making again.
        new = copy(self)
        new.collected_tensors, new.layer_targets = defaultdict(list), defaultdict(set)
        return new

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return self.keys.get(source_key, (source_key, None))


def _fqn(name: str, model: Any, entries: Mapping[str, Any]) -> str:
    """The manifest's name of a parameter, where a base model is loaded from a model with a head or the reverse."""
    if name in entries:
        return name
    prefix = f"{model.base_model_prefix}."
    return prefix + name if prefix + name in entries else name.removeprefix(prefix)


def _checksums(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Those of the tensors that `save_pretrained` writes: names that are tied to another it leaves out.

    Offloaded tensors, which are not in memory, go without.
    """
    tied, ignored = getattr(model, "all_tied_weights_keys", {}), getattr(model, "_keys_to_ignore_on_save", None) or ()
    left = {key for key, other in tied.items() if other in tensors} | set(ignored)
    return {
        key: checksum(t) for key, t in tensors.items() if key not in left and isinstance(t, Tensor) and not t.is_meta
    }


def _spec(candidate: Candidate, config: QuantConfig) -> QuantSpec:
    return config.spec(*(candidate.shape[:-3:-1] if candidate.transposed else candidate.shape[-2:]))


def _own_part(weight: QuantizedTensor, model: nn.Module, fqn: str) -> QuantizedTensor:
    path, _, name = fqn.rpartition(".")
    return sharding.own_part(weight, model.get_submodule(path), name)


def attach(model: nn.Module, config: FqnToConfig, report: QuantizationReport | None = None) -> None:
    """Makes a transformers model that was quantized in memory ready for `save_pretrained`, `dequantize` and use."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return
    quantizer = LlmQuantizer(LlmQuantConfig(config), pre_quantized=True)
    quantizer.report = report or quantizer.report
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    model.config.quantization_config = quantizer.quantization_config
    model.quantization_method = METHOD  # type: ignore[assignment]
    model.is_quantized = True  # type: ignore[assignment]
    model.set_experts_implementation("eager")


AFTER_QUANTIZE.append(attach)
