"""The one place where config, algorithm, packing and tensor meet: a weight in, a quantized tensor out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmquant.algorithms import ALGORITHMS, CALIBRATED, Algorithm, Codes, Note
from llmquant.config.base import QuantConfig
from llmquant.errors import BadWeightError, CalibrationError
from llmquant.formats import METHODS
from llmquant.packing.bits import pack
from llmquant.primitives.blockfloat import reach, tensor_scale
from llmquant.primitives.blocks import block_counts, to_blocks
from llmquant.primitives.dynamic import Activation, static_scale
from llmquant.primitives.spec import QParams, QuantSpec, storage_dtype
from llmquant.primitives.stats import InputStats
from llmquant.tensor import Meta, QuantizedTensor, tensor_class

# Rows are worked on in chunks that stay in the cache; temporaries of an algorithm take about so many bytes an element.
_CHUNK_ELEMENTS, _SMALLEST_CHUNK = 2**17, 2**16
_BYTES_AN_ELEMENT = 64

CALIBRATE_HINT = (
    "quantize_with_data_(model, config, text, tokenizer=...), or `llmquant quantize --calib builtin`; or hand over "
    "stats=collect_stats(...)"
)


def quantize_weight(
    weight: Tensor,
    config: QuantConfig,
    stats: InputStats | None = None,
    *,
    transposed: bool = False,
    codes: Sequence[Codes] | None = None,
    note: Note = lambda _: None,
) -> QuantizedTensor:
    """A plain weight as a quantized tensor of the same shape and dtype.

    Args:
        weight: [out, in], or [experts, out, in]; with `transposed`, the last two the other way round.
        config: what to do.
        stats: what a calibration run saw of its inputs: a static activation needs their range, `gptq` their Hessian,
            and the others weigh errors by their mean square where it is there.
        transposed: whether the weight stands as [..., in, out]. Scales follow the logical [out, in] matrix.
        codes: of each matrix, where an algorithm that runs the model has chosen them already.
        note: told in words what did not go as asked, for instance a Hessian that cannot be inverted.

    Raises:
        BadWeightError: for a weight that cannot be quantized (see `check_weight`), and for stats of another width.
        CalibrationError: for an algorithm or a static activation without the statistics that it needs.
    """
    check_weight(weight, config)
    logical = weight.detach().mT if transposed else weight.detach()
    rows, columns = logical.shape[-2:]
    if stats is not None:
        _check_width(stats, columns)
    spec = config.spec(rows, columns)
    tensors = _allocate(logical, spec)
    fixed = _static_tensors(config.activation, stats, logical)
    matrices = logical.unsqueeze(0) if logical.dim() == 2 else logical
    for index, matrix in enumerate(matrices):
        into = tensors if logical.dim() == 2 else {name: t[index] for name, t in tensors.items()}
        own = stats.of_expert(index) if stats is not None and logical.dim() == 3 else stats
        algorithm = _given(codes[index]) if codes is not None else _bound(config, own, note)
        _quantize_matrix(matrix, algorithm, spec, None if own is None else own.mean_square, into)
    meta = Meta(spec.format.name, spec.block, columns, transposed, config.activation)
    return tensor_class(spec.format)(tensors | fixed, meta, weight.dtype)


def check_weight(weight: Tensor, config: QuantConfig, fqn: str | None = None) -> None:
    """Raises `BadWeightError` for what cannot be quantized: no float, meta, empty, NaN or infinite, out of range."""
    if not weight.is_floating_point() or weight.dim() not in (2, 3):
        raise BadWeightError(f"cannot quantize a {weight.dim()}-D tensor of {weight.dtype}", where=fqn)
    if weight.is_meta:
        raise BadWeightError("the weight has no values (it lies on the meta device)", where=fqn, hint="load it first")
    if weight.numel() == 0:
        raise BadWeightError(f"the weight is empty: {tuple(weight.shape)}", where=fqn)
    low, high = torch.aminmax(weight.detach())
    largest = max(-float(low), float(high))
    if not largest < float("inf"):
        raise BadWeightError(
            "the weight holds NaN or infinite values",
            where=fqn,
            hint="the checkpoint may be damaged; to leave this weight as it is, give it the scheme none",
        )
    _check_range(largest, weight, config, fqn)


def _allocate(logical: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
    """The inner tensors of the result, unfilled."""
    *experts, rows, columns = logical.shape
    across, along = block_counts(rows, columns, spec.block)
    row_bytes, device = spec.format.row_bytes, logical.device
    tensors = {
        "qdata": torch.empty(*experts, rows, row_bytes(columns), dtype=torch.uint8, device=device),
        "scale": torch.empty(*experts, across, along, dtype=storage_dtype(spec.scale_dtype), device=device),
    }
    if spec.format.tensor_scale:
        tensors["tensor_scale"] = torch.empty(*experts, 1, 1, dtype=torch.float32, device=device)
    if spec.row_scale:
        tensors["row_scale"] = torch.empty(*experts, across, 1, dtype=torch.float32, device=device)
    if spec.asymmetric:
        tensors["zero_point"] = torch.empty(*experts, across, row_bytes(along), dtype=torch.uint8, device=device)
    return tensors


def _static_tensors(activation: Activation | None, stats: InputStats | None, logical: Tensor) -> dict[str, Tensor]:
    """The inner tensors of a static activation, one entry a matrix: [..., 1, 1]. Others have none."""
    if activation is None or not activation.static:
        return {}
    if stats is None or stats.low is None or stats.high is None:
        raise CalibrationError(
            "a static activation needs the range of its inputs", hint="InputStats(low=..., high=...)"
        )
    leading = logical.shape[:-2]
    if stats.low.shape != stats.high.shape or stats.low.shape not in (leading, ()):
        shapes = f"{tuple(stats.low.shape)} and {tuple(stats.high.shape)}"
        raise CalibrationError(f"ranges of shape {shapes} do not fit matrices {tuple(leading)}")
    chosen = static_scale(stats.low.float(), stats.high.float(), activation)
    if not (torch.isfinite(chosen.scale) & (chosen.scale > 0)).all():
        raise CalibrationError(
            "inputs that are all zero or not finite give no static scale",
            hint="other texts to calibrate on, or a dynamic activation",
        )
    named = {"act_scale": chosen.scale, "act_zero_point": chosen.zero_point}
    return {
        name: t.to(logical.device)[..., None, None].expand(*leading, 1, 1).contiguous()
        for name, t in named.items()
        if t is not None
    }


def _check_width(stats: InputStats, columns: int) -> None:
    for name, found in (("mean_square", stats.mean_square), ("hessian", stats.hessian)):
        if found is not None and found.shape[-1] != columns:
            raise BadWeightError(f"stats.{name} of shape {tuple(found.shape)} does not fit {columns} input columns")


def _bound(config: QuantConfig, stats: InputStats | None, note: Note) -> Algorithm:
    """The config's algorithm, with what it needs of one matrix's inputs."""
    name = config.algorithm or "rtn"
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    needs = METHODS[name].needs
    if name not in CALIBRATED or stats is None or getattr(stats, needs) is None:
        raise CalibrationError(f"{name} needs a calibration run", hint=CALIBRATE_HINT)
    return CALIBRATED[name](stats, note)


def _given(codes: Codes) -> Algorithm:
    """Stands in for an algorithm where codes [R, K] of the whole matrix were chosen already."""
    return lambda rows, importance, spec: codes


def _quantize_matrix(
    matrix: Tensor, algorithm: Algorithm, spec: QuantSpec, stats: Tensor | None, into: dict[str, Tensor]
) -> None:
    """Fills the inner tensors of one [out, in] matrix, some rows at a time."""
    rows, columns = matrix.shape
    if spec.format.tensor_scale:
        into["tensor_scale"].fill_(tensor_scale(torch.stack(torch.aminmax(matrix)).float().abs().amax(), spec))
    tall = spec.block[0]
    shared = _shared_qparams(matrix, algorithm, spec) if tall > 1 and spec.block == (rows, columns) else None
    step = rows if algorithm not in ALGORITHMS.values() else _chunk_rows(matrix)
    if shared is None:
        step = -(-step // tall) * tall  # whole blocks
    for start in range(0, rows, step):
        part = matrix[start : start + step].float().contiguous()  # sums then run in one order, however it lay
        if spec.format.tensor_scale:
            part = part / into["tensor_scale"]
        if spec.row_scale:
            outer = into["row_scale"][start : start + step]
            part = part / outer.copy_(tensor_scale(part.abs().amax(-1, keepdim=True), spec))
        if shared is None:
            codes, qparams = algorithm(part, importance_of(part, stats), spec)
            _store(qparams, spec, into, slice(start // tall, (start + step) // tall))
        else:
            x = to_blocks(part, (part.shape[0], columns))
            codes = spec.format.numerics.encode(x, shared, spec.format).reshape(part.shape)
        into["qdata"][start : start + step] = spec.format.packing.pack(codes, spec.format.bits)
    if shared is not None:
        _store(shared, spec, into, slice(None))


def _chunk_rows(matrix: Tensor) -> int:
    """How many rows a plain algorithm works on at a time. Calibrated ones take all: they visit column after column."""
    allowed = matrix.numel() * matrix.element_size() // (2 * _BYTES_AN_ELEMENT)  # half of the weight
    return max(min(_CHUNK_ELEMENTS, max(allowed, _SMALLEST_CHUNK)) // matrix.shape[1], 1)


def _store(qparams: QParams, spec: QuantSpec, into: dict[str, Tensor], blocks: slice) -> None:
    into["scale"][blocks] = qparams.scale.view(into["scale"].dtype)
    if qparams.zero_point is not None:
        into["zero_point"][blocks] = pack(qparams.zero_point, spec.format.bits)


def _shared_qparams(matrix: Tensor, algorithm: Algorithm, spec: QuantSpec) -> QParams:
    """Parameters of one block that spans the matrix, from the distinct bfloat16 values in it and their counts.

    There are at most 65536 of them, so a whole tensor is chosen for without a float32 copy of it.
    """
    counts = torch.zeros(2**16, dtype=torch.float32, device=matrix.device)
    for rows in matrix.split(max(_CHUNK_ELEMENTS // matrix.shape[1], 1)):
        keys = rows.to(torch.bfloat16).view(torch.int16).flatten().int() + 2**15
        counts += torch.bincount(keys, minlength=2**16)
    present = counts.nonzero().squeeze(-1)
    values = (present - 2**15).to(torch.int16).view(torch.bfloat16).float()
    ends = torch.stack(torch.aminmax(matrix)).float()  # the exact extremes, which rounding may have moved
    x = torch.cat([values.clamp_(ends[0], ends[1]), ends]).unsqueeze(0)
    importance = torch.cat([counts[present], torch.ones_like(ends)]).unsqueeze(0)
    return algorithm(x, importance, replace(spec, block=(1, x.shape[1]))).qparams


def importance_of(rows: Tensor, stats: Tensor | None) -> Tensor | None:
    """Weights of squared errors, as llama.cpp's imatrix: E[a^2] of the column's input times sqrt(mean x^2 + x^2)."""
    if stats is None:
        return None
    square = rows.square()
    return (square + square.mean(-1, keepdim=True)).sqrt_().mul_(stats)


def _check_range(largest: float, weight: Tensor, config: QuantConfig, fqn: str | None) -> None:
    """Refuses weights so large that the stored scale would overflow."""
    spec = config.spec(*weight.shape[-2:])
    if spec.format.tensor_scale or spec.row_scale:
        return  # which reaches as far as float32
    if largest > reach(spec):
        name = str(spec.scale_dtype).removeprefix("torch.")
        raise BadWeightError(
            f"values up to {largest:.3g} need a scale that {name} cannot hold", where=fqn, hint="scale_dtype=float32"
        )
