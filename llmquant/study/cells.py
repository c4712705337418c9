"""What workers compute. Each function takes plain JSON and gives plain JSON; files go where it is told."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoint.inspect import inspect_checkpoint
from llmquant.checkpoint.source import open_source, parse_dtype
from llmquant.convert.calibrated import Reading
from llmquant.convert.job import Conversion
from llmquant.convert.listener import Silent
from llmquant.errors import TextError
from llmquant.integrations.loading import load, load_tokenizer
from llmquant.measure.evaluate import Evaluation, Protocol, backends, evaluate
from llmquant.measure.memory import footprint
from llmquant.measure.noise import noise_floor
from llmquant.measure.perplexity import Perplexity
from llmquant.measure.record import figures, machine, versions
from llmquant.measure.reference import Reference
from llmquant.measure.speed import time_model
from llmquant.measure.text import Text, load_text
from llmquant.measure.windows import make_windows, tokenize
from llmquant.primitives.metrics import compute_error
from llmquant.study.candidates import Candidate
from llmquant.study.job import Job
from llmquant.study.keys import Digests, model_key
from llmquant.tensor import QuantizedTensor

Progress = Callable[[int, int], object]
Result = dict[str, Any]


def perform(job: Job, progress: Progress | None = None) -> Result:
    """Computes a job in this process. Raises whatever goes wrong."""
    functions: Mapping[str, Callable[..., Result]] = {
        "reference": reference,
        "noise": noise,
        "quantize": quantize,
        "quality": quality,
        "tasks": tasks,
        "performance": performance,
    }
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    started = time.perf_counter()
    result = functions[job.kind](progress=progress, **job.arguments)
    seconds = time.perf_counter() - started
    return _finite({**result, "seconds": seconds, "versions": versions(), "machine": machine()})


def reference(model: str, text: Mapping[str, Any], dtype: str, path: str, progress: Progress | None = None) -> Result:
    """Keeps the logits of a 16-bit model at a path."""
    content = _checked_text(text["name"], text["sha256"], "test")
    ids, bos = tokenize(load_tokenizer(model), content.content)
    windows = make_windows(ids, text["context"], text["windows"] or None, bos)
    plain = _load(model, dtype)
    with Reference.compute(plain, windows, progress, path=path) as found:
        evaluation = Evaluation(Perplexity.from_nll(found.nll), None, None, None, None, 0.0)
    return _figures(evaluation, _protocol(plain, model, text, windows))


def noise(model: str, text: Mapping[str, Any], dtype: str, reference: str, progress: Progress | None = None) -> Result:
    """The divergence that 16-bit arithmetic alone makes."""
    plain = _load(model, dtype)
    with Reference.open(reference) as kept:
        return _figures(noise_floor(plain, kept.windows, kept, progress), _protocol(plain, model, text, kept.windows))


def quality(
    model: str, text: Mapping[str, Any], dtype: str, reference: str, progress: Progress | None = None
) -> Result:
    """A quantized model against the 16-bit one's logits."""
    candidate = _load(model, dtype)
    with Reference.open(reference) as kept:
        evaluation = evaluate(candidate, kept.windows, kept, progress)
        return _figures(evaluation, _protocol(candidate, model, text, kept.windows))


def quantize(
    model: str,
    candidate: Mapping[str, Any],
    calibration: Mapping[str, Any] | None,
    output: str,
    scores: str,
    progress: Progress | None = None,
) -> Result:
    """Writes a quantized checkpoint, as `llmquant quantize` does."""
    asked = Candidate.from_dict(dict(candidate))
    reading = Reading()
    if calibration:
        _checked_text(calibration["text"], calibration["sha256"], "train")
        reading = Reading(calibration["text"], calibration["tokens"], calibration["seed"])
    found: list[Any] = []
    listener = Silent()
    report, changes = Conversion(asked.what, reading, asked.budget(Path(scores))).write(
        model,
        Path(output),
        overwrite=True,
        listener=listener,
        on_plain=lambda plain: found.extend(_layers(plain, output)),
    )
    return {
        "layers": found,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "warnings": [*listener.warnings, *report.warnings],
        "changes": changes,
        "model": model_key(Path(output), Digests()),
    }


def tasks(
    model: str, names: list[str], options: Mapping[str, Any], dtype: str, progress: Progress | None = None
) -> Result:
    """Tasks through lm-eval."""
    from llmquant.integrations.lm_eval import run_tasks

    def tell(done: int, total: int, task: str) -> None:
        if progress:
            progress(done, total)

    candidate = _load(model, dtype)
    found = run_tasks(
        candidate,
        load_tokenizer(model),
        names,
        include_path=options["path"],
        limit=options["limit"],
        batch_size=options["batch_size"],
        progress=tell,
    )
    return {"tasks": found}


def performance(
    model: str, plain: str, prompt: int, new: int, rounds: int, speed: bool, progress: Progress | None = None
) -> Result:
    """Sizes and speed in the model's own dtype. The process must be new: its peak of memory is that of the model."""
    candidate = _load(model, "auto")
    ids = torch.arange(prompt)[None] % candidate.get_input_embeddings().weight.shape[0]
    with torch.inference_mode():
        candidate(ids, use_cache=False)
    sizes = asdict(footprint(candidate, model))
    if not speed:
        return {"bytes": sizes, "speed": None}
    baseline = None if plain == model else _load(plain, "auto")
    timed = asdict(time_model(candidate, baseline, prompt=prompt, new=new, rounds=rounds, progress=progress))
    if baseline is None:
        timed |= {"prefill_reference": timed["prefill"], "decode_reference": timed["decode"]}
    return {"bytes": sizes, "speed": timed}


def _protocol(of: Any, model: str, text: Mapping[str, Any], windows: Tensor) -> Protocol:
    """What a figure of a loaded model means, on these windows of a text."""
    _, bos = tokenize(load_tokenizer(model), "a")
    named = Text(text["name"], "", text["sha256"])
    return Protocol.describe(named, windows, bos, str(of.dtype).removeprefix("torch."), backends(of))


def _checked_text(name: str, sha256: str, split: str) -> Text:
    content = load_text(name, split)
    if content.sha256 != sha256:
        raise TextError("the text changed while the study ran", where=name, hint="run the sweep again")
    return content


def _load(model: str, dtype: str) -> Any:
    return load(model, dtype=parse_dtype(dtype) or "auto").eval()


def _figures(evaluation: Evaluation, protocol: Protocol) -> Result:
    """The parts of a record that are quality."""
    return {**figures(evaluation), "nonfinite": asdict(evaluation.nonfinite), "protocol": asdict(protocol)}


def _finite(value: Any) -> Any:
    """Plain JSON, with null in place of NaN and infinity."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _layers(plain: str, quantized: str) -> Iterator[Result]:
    """Each quantized weight's bits and SQNR in dB against the one it was made of; null where nothing was lost."""
    model = load(quantized, dtype="auto")
    rows = {row.fqn: row for row in inspect_checkpoint(quantized).rows if row.quantized}
    for fqn, weight in open_source(plain).parameters():
        if fqn not in rows:
            continue
        found = model.get_parameter(fqn)
        assert isinstance(found, QuantizedTensor)
        sqnr = float(compute_error(weight.float(), found.dequantize(torch.float32).reshape(weight.shape)))
        bits = 8 * rows[fqn].bytes / rows[fqn].elements
        yield {"fqn": fqn, "format": rows[fqn].format, "bits": bits, "sqnr": sqnr}
