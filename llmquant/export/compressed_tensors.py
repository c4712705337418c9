"""A folder as compressed-tensors writes it, which transformers loads with that package, and vLLM on its own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.errors import ExportError
from llmquant.export.ct_layers import Layer, Misfit, to_layer
from llmquant.export.folder import QuantizedFolder
from llmquant.export.hf16 import original_keys
from llmquant.export.options import DEQUANTIZE, ROUND, Options
from llmquant.export.report import DEQUANTIZED, EXACT, PLAIN, ROUNDED, Exported, ExportReport
from llmquant.export.shards import check_room, plain_bytes, write_rest, write_shards
from llmquant.quantize import Progress
from llmquant.tensor import QuantizedTensor


def write(
    source: QuantizedFolder, draft: Path, options: Options, report: ExportReport, progress: Progress | None
) -> None:
    """Looks at every weight, refuses what does not fit, then writes the rest. The package is not needed for it."""
    dtype = options.dtype or source.dtype
    reasons = {fqn: why for fqn in source.entries if (why := _misfit(source, fqn, dtype, options))}
    refuse(reasons, options)
    check_room(source, draft, lambda fqn: _bytes(source, fqn, dtype, fqn in reasons))
    schemes: dict[str, dict[str, Any]] = {}

    def convert(fqn: str, value: Tensor) -> Mapping[str, Tensor]:
        if not isinstance(value, QuantizedTensor) or fqn in reasons:
            how = DEQUANTIZED if isinstance(value, QuantizedTensor) else PLAIN
            report.weights[fqn] = Exported(how, str(dtype).removeprefix("torch."), reasons.get(fqn, ""))
            return original_keys(source, fqn, source.plain(fqn, value, options.dtype))
        layer = to_layer(value, dtype, round_scales=options.misfits == ROUND)
        schemes[fqn.removesuffix(".weight")] = layer.scheme
        report.weights[fqn] = _exported(value, layer)
        report.warnings += [note for note in layer.notes if note not in report.warnings]
        (key,) = original_keys(source, fqn, torch.empty(value.shape, device="meta"))
        return {f"{key.removesuffix('weight')}{name}": tensor for name, tensor in layer.tensors.items()}

    write_shards(source, draft, convert, max_shard_bytes=options.max_shard_bytes, progress=progress)
    found = quantization_config(source, schemes)
    if len(found["config_groups"]) > 1 and any(not scheme["weights"]["symmetric"] for scheme in schemes.values()):
        report.warnings.append("transformers 5.23 cannot load zero points beside a second scheme; vLLM can")
    write_rest(source, draft, options.dtype, {"quantization_config": found})


def refuse(reasons: Mapping[str, str], options: Options) -> None:
    """Raises `ExportError` with names and reasons, unless misfits may be dequantized."""
    if not reasons or options.misfits == DEQUANTIZE:
        return
    grouped: dict[str, list[str]] = {}
    for fqn, why in reasons.items():
        grouped.setdefault(why, []).append(fqn)
    lines = [f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}: {why}"
             for why, names in grouped.items()]  # fmt: skip
    raise ExportError(
        f"{len(reasons)} weights do not fit",
        where="\n         ".join(lines),
        hint="--misfits dequantize writes them in 16 bits; --misfits round-scales or --dtype float16 where only scales "
        "do not fit; or other schemes for them (llmquant quantize --set)",
    )


def _misfit(source: QuantizedFolder, fqn: str, dtype: torch.dtype, options: Options) -> str:
    """Why a weight cannot be written as it is, or nothing."""
    if why := not_linear(source, fqn):
        return why
    value = source.read(fqn)
    assert isinstance(value, QuantizedTensor)
    try:
        to_layer(value, dtype, round_scales=options.misfits == ROUND)
    except Misfit as error:
        return str(error)
    return ""


def not_linear(source: QuantizedFolder, fqn: str) -> str:
    """Why a weight is none of a linear layer as the other programs know them, or nothing."""
    module, described = source.module(fqn), source.entries[fqn]
    tied = fqn in source.tied().values()
    if isinstance(module, nn.Embedding) or tied:
        return "it is an embedding; other programs keep these plain"
    if module is source.skeleton.get_output_embeddings():  # type: ignore[operator]
        return "it is the head, which vLLM keeps plain"
    if not isinstance(module, nn.Linear) or described["transposed"] or len(described["shape"]) != 2:
        return f"it belongs to a {type(module).__name__}, not to a linear layer"
    return ""


def _exported(value: QuantizedTensor, layer: Layer) -> Exported:
    scale = layer.tensors["weight_scale"]
    exact = scale.itemsize == 1 or torch.equal(scale.float(), value.packed().scales().float().expand_as(scale))
    return Exported(EXACT if exact else ROUNDED, f"{layer.scheme['format']} {value.meta.format}")


def _bytes(source: QuantizedFolder, fqn: str, dtype: torch.dtype, plain: bool) -> float:
    known = plain_bytes(source, fqn, dtype)
    described = source.entries.get(fqn)
    return known if plain or described is None else known / dtype.itemsize * (described["bits"] + 1) / 8


def quantization_config(source: QuantizedFolder, schemes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The object of config.json: groups of layers by scheme, and the linear layers that are in none.

    One group that holds every linear layer but those ignored has the target `Linear`; others name their layers.
    """
    linears = [name for name, module in source.skeleton.named_modules() if isinstance(module, nn.Linear)]
    ignored = [name for name in linears if name not in schemes]
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(json.dumps(scheme, sort_keys=True), (dict(scheme), []))[1].append(name)
    formats = {scheme["format"] for scheme, _ in groups.values()}
    alone = len(groups) == 1
    asymmetric = any(not scheme["weights"]["symmetric"] for scheme, _ in groups.values())
    return {
        # transformers 5.23 takes packed zero points only where it decodes while it loads, and there knows one group.
        **({"dequantize": True} if asymmetric and alone else {}),
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {
            f"group_{i}": {**scheme, "targets": ["Linear"] if alone else [f"re:^{re.escape(name)}$" for name in names]}
            for i, (scheme, names) in enumerate(groups.values())
        },
        "ignore": ignored,
        "kv_cache_scheme": None,
    }
