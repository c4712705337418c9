"""A plain checkpoint: quantized weights as what their codes stand for, under the original checkpoint's own keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from llmquant.export.folder import QuantizedFolder
from llmquant.export.options import Options
from llmquant.export.report import DEQUANTIZED, PLAIN, Exported, ExportReport
from llmquant.export.shards import check_room, plain_bytes, write_rest, write_shards
from llmquant.quantize import Progress
from llmquant.tensor import QuantizedTensor


def write(
    source: QuantizedFolder, draft: Path, options: Options, report: ExportReport, progress: Progress | None
) -> None:
    """Writes the folder tensor by tensor, in the model's dtype or the one asked for."""
    check_room(source, draft, lambda fqn: plain_bytes(source, fqn, options.dtype))

    def convert(fqn: str, value: Tensor) -> Mapping[str, Tensor]:
        found = source.plain(fqn, value, options.dtype)
        how = DEQUANTIZED if isinstance(value, QuantizedTensor) else PLAIN
        report.weights[fqn] = Exported(how, str(found.dtype).removeprefix("torch."))
        return original_keys(source, fqn, found)

    write_shards(source, draft, convert, max_shard_bytes=options.max_shard_bytes, progress=progress)
    write_rest(source, draft, options.dtype)


def original_keys(source: QuantizedFolder, fqn: str, value: Tensor) -> dict[str, Tensor]:
    """A parameter under the keys, and in the pieces, that its family's checkpoints have."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(source.skeleton, {fqn: value}))  # type: ignore[arg-type]
