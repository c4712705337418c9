"""The one place where config, algorithm, packing and tensor meet: a weight in, a quantized tensor out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmquant.algorithms import ALGORITHMS
from llmquant.config.base import QuantConfig
from llmquant.config.candidates import Candidate, Inventory, Role, find_candidates
from llmquant.config.fqn import FqnToConfig, Resolution, resolve
from llmquant.config.recipe import to_config
from llmquant.errors import AlreadyQuantizedError, BadWeightError, CalibrationError, NothingToQuantizeError
from llmquant.packing.bits import pack
from llmquant.primitives.blockfloat import reach, tensor_scale
from llmquant.primitives.blocks import block_counts, to_blocks
from llmquant.primitives.dynamic import Activation, static_scale
from llmquant.primitives.spec import QParams, QuantSpec, storage_dtype
from llmquant.primitives.stats import InputStats
from llmquant.tensor import Meta, QuantizedTensor, tensor_class

Progress = Callable[[int, int, str], None]
"""Called with elements done, elements in all, and the FQN at work."""

# Rows are worked on in chunks that stay in the cache; temporaries of an algorithm take about so many bytes an element.
_CHUNK_ELEMENTS, _SMALLEST_CHUNK = 2**17, 2**16
_BYTES_AN_ELEMENT = 64


def quantize_weight(
    weight: Tensor, config: QuantConfig, stats: InputStats | None = None, *, transposed: bool = False
) -> QuantizedTensor:
    """A plain weight as a quantized tensor of the same shape and dtype.

    Args:
        weight: [out, in], or [experts, out, in]; with `transposed`, the last two the other way round.
        config: what to do.
        stats: what a calibration run saw of its inputs; a static activation needs their range.
        transposed: whether the weight stands as [..., in, out]. Scales follow the logical [out, in] matrix.

    Raises:
        BadWeightError: for a weight that cannot be quantized (see `check_weight`), and for stats of another width.
        CalibrationError: for a static activation without the range of its inputs.
    """
    check_weight(weight, config)
    logical = weight.detach().mT if transposed else weight.detach()
    rows, columns = logical.shape[-2:]
    importance = None if stats is None else stats.mean_square
    if importance is not None and importance.shape != (columns,):
        raise BadWeightError(f"stats of shape {tuple(importance.shape)} do not fit {columns} input columns")
    spec = config.spec(rows, columns)
    tensors = _allocate(logical, spec)
    fixed = _static_tensors(config.activation, stats, logical)
    algorithm = ALGORITHMS[config.algorithm or "rtn"]
    matrices = logical.unsqueeze(0) if logical.dim() == 2 else logical
    for index, matrix in enumerate(matrices):
        into = tensors if logical.dim() == 2 else {name: t[index] for name, t in tensors.items()}
        _quantize_matrix(matrix, algorithm, spec, importance, into)
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


@dataclass(frozen=True)
class WeightReport:
    """What became of one weight. `names` are all its FQNs, `block` the (rows, columns) that share a scale."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    scheme: str
    algorithm: str
    block: tuple[int, int]
    bytes_before: int
    bytes_after: int
    kernel: str
    kernel_reason: str


@dataclass
class QuantizationReport:
    """What `quantize_` did to every weight of two or more dimensions, and what it cost.

    Attributes:
        quantized: by canonical FQN.
        skipped: FQN -> why it stays as it is.
        bytes_before, bytes_after: of all parameters, tied ones once.
        warnings: what the user should look at.
        seconds: wall time.
    """

    quantized: dict[str, WeightReport] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        schemes: dict[str, list[WeightReport]] = {}
        for weight in self.quantized.values():
            schemes.setdefault(f"{weight.scheme} ({weight.algorithm})", []).append(weight)
        before, after = self.bytes_before / 1e6, self.bytes_after / 1e6
        lines = [f"{len(self.quantized)} weights quantized in {self.seconds:.1f} s: {before:.1f} MB -> {after:.1f} MB"]
        lines += [f"  {name}: {len(found)} weights" for name, found in schemes.items()]
        lines += [f"  kept {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines + [f"  warning: {warning}" for warning in self.warnings])


class Plan(NamedTuple):
    """What is to be done to a model, before anything is done."""

    inventory: Inventory
    resolution: Resolution

    @property
    def chosen(self) -> list[tuple[Candidate, QuantConfig]]:
        """The weights to quantize, in model order."""
        found = self.resolution.chosen
        return [(c, found[c.name]) for c in self.inventory.candidates if c.name in found]  # type: ignore[misc]

    @property
    def calibrated(self) -> list[Candidate]:
        """The weights whose inputs get a scale from a calibration run.

        Raises:
            CalibrationError: for an embedding, which has no inputs.
        """
        found = [c for c, config in self.chosen if config.activation is not None and config.activation.static]
        for candidate in found:
            if all(role is Role.embedding for role in candidate.roles):
                raise CalibrationError(
                    "an embedding meets no activations that could have a static scale",
                    where=candidate.name,
                    hint="give it the scheme of the weight alone, for instance int8",
                )
        return found

    def skipped(self, model: nn.Module) -> dict[str, str]:
        """FQN -> reason of every weight of two or more dimensions that stays as it is."""
        wide = {name for name, p in model.named_parameters(remove_duplicate=False) if p.dim() >= 2}
        return {**self.resolution.kept, **{n: why for n, why in self.inventory.others.items() if n in wide}}


def make_plan(model: nn.Module, config: FqnToConfig, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> Plan:
    """Decides about every weight of a model (which may lie on the meta device).

    Raises:
        AlreadyQuantizedError: if one of its weights is quantized already.
        NothingToQuantizeError: if no weight would be quantized.
        ConfigError: for keys that do not fit the model.
    """
    done = [name for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)]
    if done:
        raise AlreadyQuantizedError(
            "the model is quantized already", where=done[0], hint="start from the 16-bit model, or dequantize() first"
        )
    inventory = find_candidates(model)
    resolution = resolve(config, inventory)
    if filter_fn is not None:
        resolution = _filtered(model, inventory, resolution, filter_fn)
    if not resolution.chosen:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(resolution.kept.items())[:3])
        raise NothingToQuantizeError(
            "no weight would be quantized", where=reasons or "the model has no linear, embedding or expert weight"
        )
    return Plan(inventory, resolution)


def check_stats(plan: Plan, stats: Mapping[str, InputStats] | None) -> None:
    """Raises `CalibrationError` where a static activation lacks the range of its inputs."""
    stats = stats or {}
    lacking = [c.name for c in plan.calibrated if c.name not in stats or stats[c.name].low is None]
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise CalibrationError(
            "static activations need a calibration run",
            where=", ".join(lacking[:3]) + more,
            hint="quantize_(model, config, stats=llmquant.collect_stats(model, config, data)), or `llmquant quantize "
            "--calib builtin`",
        )


def quantize_(
    model: nn.Module,
    config: Any,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    stats: Mapping[str, InputStats] | None = None,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Quantizes the weights of a model in place.

    Args:
        model: any module with linear, Conv1D, embedding or expert weights.
        config: a config, an `FqnToConfig`, a scheme (`"int4-g64"`), or a recipe's name or path.
        filter_fn: called with (module, FQN of the module); weights of modules for which it is false stay as they are.
        stats: FQN of a weight -> what a calibration run saw of its inputs, as `collect_stats` gives it.
        progress: called before each weight.

    Returns:
        A report of every weight. All checks are made before the first weight changes.

    Raises:
        ConfigError, NothingToQuantizeError, AlreadyQuantizedError, BadWeightError, CalibrationError.
    """
    started = time.perf_counter()
    resolved = to_config(config)
    plan = make_plan(model, resolved, filter_fn)
    check_stats(plan, stats)
    for candidate, chosen in plan.chosen:
        check_weight(model.get_parameter(candidate.name), chosen, candidate.name)
    report = QuantizationReport(
        skipped=plan.skipped(model), warnings=plan.resolution.warnings, bytes_before=_parameter_bytes(model)
    )
    total, done = sum(model.get_parameter(c.name).numel() for c, _ in plan.chosen), 0
    for candidate, chosen in plan.chosen:
        if progress:
            progress(done, total, candidate.name)
        weight = model.get_parameter(candidate.name)
        done += weight.numel()
        found = stats.get(candidate.name) if stats else None
        quantized = quantize_weight(weight.reshape(candidate.shape), chosen, found, transposed=candidate.transposed)
        replace_weight(model, candidate.fqns, quantized)
        report.quantized[candidate.name] = report_weight(candidate.fqns, quantized, chosen, weight.nbytes)
    if progress:
        progress(total, total, "")
    report.bytes_after = _parameter_bytes(model)
    report.seconds = time.perf_counter() - started
    for callback in AFTER_QUANTIZE:
        callback(model, resolved, report)
    return report


AFTER_QUANTIZE: list[Callable[[nn.Module, FqnToConfig, QuantizationReport], None]] = []
"""Called after a model was quantized in place. Integrations register here."""


def replace_weight(model: nn.Module, fqns: tuple[str, ...], weight: Tensor) -> None:
    """Puts one parameter under all of its names, so that tied weights stay tied."""
    parameter = nn.Parameter(weight, requires_grad=False)
    for fqn in fqns:
        path, _, name = fqn.rpartition(".")
        setattr(model.get_submodule(path), name, parameter)


def report_weight(
    fqns: tuple[str, ...], weight: QuantizedTensor, config: QuantConfig, bytes_before: int
) -> WeightReport:
    """The report of one quantized weight."""
    kernel, reason = weight.kernel()
    return WeightReport(
        fqns,
        tuple(weight.shape),
        config.scheme,
        config.algorithm or "",
        weight.meta.block,
        bytes_before,
        weight.nbytes,
        kernel,
        reason,
    )


def _filtered(
    model: nn.Module, inventory: Inventory, resolution: Resolution, filter_fn: Callable[[nn.Module, str], bool]
) -> Resolution:
    """The resolution without the weights that the filter refuses under any of their names."""
    kept = dict(resolution.kept)
    for candidate in inventory.candidates:
        modules = [fqn.rpartition(".")[0] for fqn in candidate.fqns]
        if not all(filter_fn(model.get_submodule(path), path) for path in modules):
            kept[candidate.name] = "filter_fn says no"
    chosen = {name: config for name, config in resolution.chosen.items() if name not in kept}
    return replace(resolution, chosen=chosen, kept=kept)


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
    if spec.format.row_scale:
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


def _quantize_matrix(
    matrix: Tensor, algorithm: Any, spec: QuantSpec, stats: Tensor | None, into: dict[str, Tensor]
) -> None:
    """Fills the inner tensors of one [out, in] matrix, some rows at a time."""
    rows, columns = matrix.shape
    if spec.format.tensor_scale:
        into["tensor_scale"].fill_(tensor_scale(torch.stack(torch.aminmax(matrix)).float().abs().amax(), spec))
    tall = spec.block[0]
    shared = _shared_qparams(matrix, algorithm, spec) if tall > 1 and spec.block == (rows, columns) else None
    allowed = matrix.numel() * matrix.element_size() // (2 * _BYTES_AN_ELEMENT)  # half of the weight
    step = max(min(_CHUNK_ELEMENTS, max(allowed, _SMALLEST_CHUNK)) // columns, 1)
    if shared is None:
        step = -(-step // tall) * tall  # whole blocks
    for start in range(0, rows, step):
        part = matrix[start : start + step].float().contiguous()  # sums then run in one order, however it lay
        if spec.format.tensor_scale:
            part = part / into["tensor_scale"]
        if spec.format.row_scale:
            outer = into["row_scale"][start : start + step]
            part = part / outer.copy_(tensor_scale(part.abs().amax(-1, keepdim=True), spec))
        if shared is None:
            codes, qparams = algorithm(part, _importance(part, stats), spec)
            _store(qparams, spec, into, slice(start // tall, (start + step) // tall))
        else:
            x = to_blocks(part, (part.shape[0], columns))
            codes = spec.format.numerics.encode(x, shared, spec.format).reshape(part.shape)
        into["qdata"][start : start + step] = spec.format.packing.pack(codes, spec.format.bits)
    if shared is not None:
        _store(shared, spec, into, slice(None))


def _store(qparams: QParams, spec: QuantSpec, into: dict[str, Tensor], blocks: slice) -> None:
    into["scale"][blocks] = qparams.scale.view(into["scale"].dtype)
    if qparams.zero_point is not None:
        into["zero_point"][blocks] = pack(qparams.zero_point, spec.format.bits)


def _shared_qparams(matrix: Tensor, algorithm: Any, spec: QuantSpec) -> QParams:
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


def _importance(rows: Tensor, stats: Tensor | None) -> Tensor | None:
    """Weights of squared errors, as llama.cpp's imatrix: E[a^2] of the column's input times sqrt(mean x^2 + x^2)."""
    if stats is None:
        return None
    square = rows.square()
    return (square + square.mean(-1, keepdim=True)).sqrt_().mul_(stats)


def _check_range(largest: float, weight: Tensor, config: QuantConfig, fqn: str | None) -> None:
    """Refuses weights so large that the stored scale would overflow."""
    spec = config.spec(*weight.shape[-2:])
    if spec.format.tensor_scale or spec.format.row_scale:
        return  # which reaches as far as float32
    if largest > reach(spec):
        name = str(spec.scale_dtype).removeprefix("torch.")
        raise BadWeightError(
            f"values up to {largest:.3g} need a scale that {name} cannot hold", where=fqn, hint="scale_dtype=float32"
        )


def _parameter_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())
