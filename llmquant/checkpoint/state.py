"""One quantized weight as the plain tensors of a checkpoint, and back. The layout is `docs/format.md`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.checkpoint.entries import check_entry, scale_dtype
from llmquant.errors import CheckpointError, ManifestError
from llmquant.formats import get_format
from llmquant.primitives.blocks import block_counts
from llmquant.primitives.dynamic import Activation
from llmquant.primitives.spec import storage_dtype
from llmquant.tensor import Meta, QuantizedTensor, tensor_class
from llmquant.tensor.base import Field


def component_key(fqn: str, field_name: str) -> str:
    """The key of an inner tensor: codes lie under the weight's own key, the others beside it."""
    return fqn if field_name == "qdata" else f"{fqn}_{field_name}"


def components(fqn: str, weight: QuantizedTensor) -> dict[str, Tensor]:
    """The plain tensors of a weight by checkpoint key.

    Codes get a last dimension of 1: their rank then differs from the weight's, so that a program which does
    not know the format stops at the shape instead of taking codes for weights.
    """
    return {
        component_key(fqn, field.name): tensor.unsqueeze(-1) if field.name == "qdata" else tensor
        for field, tensor in weight.parts()
    }


def describe(weight: QuantizedTensor) -> dict[str, Any]:
    """A weight's entry in the manifest."""
    return entry(weight.meta, tuple(weight.shape), weight.scale_dtype, weight.zero_point is not None)


def entry(meta: Meta, shape: Iterable[int], scale_dtype: torch.dtype, asymmetric: bool) -> dict[str, Any]:
    """The manifest's entry of a weight with these properties; `shape` as its module expects it."""
    return {
        "format": meta.format,
        "bits": get_format(meta.format).bits,
        "shape": list(shape),
        "block": list(meta.block),
        "transposed": meta.transposed,
        "scale_dtype": str(scale_dtype).removeprefix("torch."),
        "asymmetric": asymmetric,
        **({"activation": meta.activation.to_dict()} if meta.activation else {}),
    }


def expected(fqn: str, described: Mapping[str, Any]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every component of a weight: what its entry promises.

    Raises:
        ManifestError: for an entry that this version cannot read.
    """
    try:
        fmt = check_entry(described)
        *experts, rows, columns = logical_shape(described)
        across, along = block_counts(rows, columns, tuple(described["block"]))
        kind, asymmetric = scale_dtype(described, fmt), described["asymmetric"]
        stored = storage_dtype(kind)
        activation = described_activation(described)
    except ValueError as error:
        raise ManifestError(
            f"cannot read what the manifest says of a weight: {getattr(error, 'what', str(error))}",
            where=fqn,
            hint="a later llmquant may have written it: pip install --upgrade llmquant",
        ) from error
    found = {
        component_key(fqn, "qdata"): (torch.uint8, (*experts, rows, fmt.row_bytes(columns), 1)),
        component_key(fqn, "scale"): (stored, (*experts, across, along)),
    }
    if fmt.tensor_scale:
        found[component_key(fqn, "tensor_scale")] = (torch.float32, (*experts, 1, 1))
    if fmt.has_row_scale(kind):
        found[component_key(fqn, "row_scale")] = (torch.float32, (*experts, across, 1))
    if asymmetric:
        found[component_key(fqn, "zero_point")] = (torch.uint8, (*experts, across, fmt.row_bytes(along)))
    if activation is not None and activation.static:
        found[component_key(fqn, "act_scale")] = (torch.float32, (*experts, 1, 1))
        if activation.asymmetric:
            found[component_key(fqn, "act_zero_point")] = (torch.int8, (*experts, 1, 1))
    return found


def logical_shape(described: Mapping[str, Any]) -> tuple[int, ...]:
    """[..., out, in], whichever way the weight stands."""
    shape = list(described["shape"])
    if described["transposed"]:
        shape[-2:] = shape[:-3:-1]
    return tuple(shape)


def described_activation(described: Mapping[str, Any]) -> Activation | None:
    """How inputs of products with the weight are quantized, by its entry. Raises `ConfigError` for what is unknown."""
    return Activation.from_dict(described["activation"]) if "activation" in described else None


def assemble(
    fqn: str, described: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> QuantizedTensor:
    """A weight from its components by checkpoint key. Raises `CheckpointError` where one is missing or misshapen."""
    for key, (kind, shape) in expected(fqn, described).items():
        if key not in tensors:
            raise CheckpointError("a quantized weight is incomplete", where=f"{key} is missing")
        if (tensors[key].dtype, tuple(tensors[key].shape)) != (kind, shape):
            raise CheckpointError(
                f"expected {kind} {shape}, found {tensors[key].dtype} {tuple(tensors[key].shape)}", where=key
            )
    fmt = get_format(described["format"])
    cls = tensor_class(fmt)
    inner = {field.name: _component(fqn, field, tensors) for field in cls.fields}
    meta = Meta(
        fmt.name,
        tuple(described["block"]),
        logical_shape(described)[-1],
        described["transposed"],
        described_activation(described),
    )
    return cls(inner, meta, dtype)


def state_dict(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """A model's state as plain tensors, and the entries of its quantized weights. A tied weight appears once."""
    tied = getattr(model, "all_tied_weights_keys", {})
    plain: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    state = model.state_dict(keep_vars=True)
    for fqn, tensor in sorted(state.items(), key=lambda item: item[0] in tied):
        if not isinstance(tensor, QuantizedTensor):
            plain[fqn] = tensor.detach() if isinstance(tensor, Tensor) else tensor
        elif id(tensor) not in seen:
            seen.add(id(tensor))
            plain.update(components(fqn, tensor))
            entries[fqn] = describe(tensor)
    return plain, entries


def _component(fqn: str, field: Field, tensors: Mapping[str, Tensor]) -> Tensor | None:
    tensor = tensors.get(component_key(fqn, field.name))
    return tensor.squeeze(-1) if tensor is not None and field.name == "qdata" else tensor
