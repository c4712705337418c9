"""The driver: one forward pass per window, scored on its own and against a baseline's logits.

The baseline is a `Reference`: its logits are computed once and kept on disk for many candidates, so that no two models
need to be in memory.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmquant.errors import LlmQuantError, NoSpaceError
from llmquant.measure.divergence import Divergence, delta_p_rms, kl, top1_agrees
from llmquant.measure.perplexity import Perplexity, token_nll
from llmquant.measure.text import Text
from llmquant.measure.windows import tokens_scored
from llmquant.tensor import QuantizedTensor

Progress = Callable[[int, int], object]  # called with (windows done, windows in all)
Scored = tuple[Tensor, Tensor]  # a window's logits [T, V], in the model's dtype, and NLL [T - 1] float64 on the CPU


@dataclass(frozen=True)
class Protocol:
    """All that two evaluations must share for their numbers to be comparable.

    Attributes:
        text, text_sha256: name and fingerprint of the text.
        context, windows: tokens per window and number of windows; windows do not overlap.
        bos: id that starts each window, None if the tokenizer adds none.
        tokens_scored: windows * (context - 1), for a window's first token has no context.
        dtype: the unquantized tensors' dtype, such as `bfloat16`.
        backend: the kernels that ran.
    """

    text: str
    text_sha256: str
    context: int
    windows: int
    bos: int | None
    tokens_scored: int
    dtype: str
    backend: str

    @classmethod
    def describe(cls, text: Text, windows: Tensor, bos: int | None, dtype: str, backend: str) -> Protocol:
        """The protocol of a run over these windows, [W, T]."""
        count, context = windows.shape
        return cls(text.name, text.sha256, context, count, bos, tokens_scored(windows), dtype, backend)


def backends(model: nn.Module) -> str:
    """The kernels that serve a model's quantized weights, or `torch` for a plain model."""
    kernels = {p.kernel().kernel for p in model.parameters() if isinstance(p, QuantizedTensor)}
    return ", ".join(sorted(kernels)) or "torch"


@dataclass(frozen=True)
class Evaluation:
    """What a run measured. All but `perplexity` and `seconds` is None without a baseline.

    Attributes:
        perplexity, baseline: of the candidate and of its baseline, on the same tokens.
        kl: divergence from the baseline over the scored tokens, in nats.
        top1: fraction of scored tokens where both models' most likely token is the same.
        delta_p_rms: root mean square change of the true token's probability, 0..1.
        seconds: wall time of the run, without the baseline's.
    """

    perplexity: Perplexity
    baseline: Perplexity | None
    kl: Divergence | None
    top1: float | None
    delta_p_rms: float | None
    seconds: float


def evaluate(
    model: nn.Module, windows: Tensor, reference: Reference | None = None, progress: Progress | None = None
) -> Evaluation:
    """Measure a model on windows [W, T] of ids, against a reference over the same windows if there is one.

    Raises:
        LlmQuantError: logits that are not finite, or that do not fit the reference.
    """
    if reference is not None and not torch.equal(reference.windows, windows):
        raise LlmQuantError("the reference was computed over other windows", hint="compute it over the same windows")
    start = time.perf_counter()
    scores = []
    with inference(model):
        for index in _reporting(len(windows), progress):
            scores.append(_score(_forward(model, windows, index), reference.window(index) if reference else None))
    columns = [torch.cat(column) for column in zip(*scores, strict=True)]
    return _summary(time.perf_counter() - start, *columns)


def _score(own: Scored, other: Scored | None) -> tuple[Tensor, ...]:
    """A window's per-token figures, [T - 1] each: NLL, and with a baseline also its NLL, KL and top-1 agreement."""
    logits, nll = own
    if other is None:
        return (nll,)
    other_logits, other_nll = other
    _check_comparable(logits, other_logits)
    p, q = other_logits[:-1].to(logits.device), logits[:-1]
    return nll, other_nll, kl(p, q).cpu(), top1_agrees(p, q).cpu()


def _summary(
    seconds: float,
    nll: Tensor,
    baseline_nll: Tensor | None = None,
    divergence: Tensor | None = None,
    agrees: Tensor | None = None,
) -> Evaluation:
    perplexity = Perplexity.from_nll(nll)
    if baseline_nll is None or divergence is None or agrees is None:
        return Evaluation(perplexity, None, None, None, None, seconds)
    return Evaluation(
        perplexity=perplexity,
        baseline=Perplexity.from_nll(baseline_nll),
        kl=Divergence.from_kl(divergence),
        top1=float(agrees.double().mean()),
        delta_p_rms=delta_p_rms(baseline_nll, nll),
        seconds=seconds,
    )


def _forward(model: nn.Module, windows: Tensor, index: int) -> Scored:
    ids = windows[index].to(next(model.parameters()).device)
    logits = model(ids[None], use_cache=False).logits[0]
    _check_finite(logits, index)
    return logits, token_nll(logits, ids).cpu()


def _check_finite(logits: Tensor, index: int) -> None:
    if not torch.stack(logits.aminmax()).isfinite().all():  # NaN spreads to both, and no mask of [T, V] is made
        hint = "a dtype of wider range, more bits, or a check of the checkpoint's weights"
        raise LlmQuantError("the model's logits are not finite", where=f"window {index}", hint=hint)


def _check_comparable(logits: Tensor, other: Tensor) -> None:
    if logits.shape != other.shape:
        shapes = f"{list(logits.shape)} and {list(other.shape)}"
        hint = "a baseline with the same vocabulary"
        raise LlmQuantError("the two models' logits differ in shape", where=shapes, hint=hint)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Inference mode with the model in eval mode; every module gets its own `training` back afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _reporting(total: int, progress: Progress | None) -> Iterator[int]:
    """Count 0..total-1 and report each after its turn is over."""
    for index in range(total):
        yield index
        if progress:
            progress(index + 1, total)


class Reference:
    """A baseline's logits for all windows, kept in a temporary file and read back one mapped window at a time.

    Use it in a `with`. The file has no name where the system allows that, so it goes with the process at the latest.

    Attributes:
        windows: the ids it was computed over, [W, T] int64.
    """

    def __init__(self, windows: Tensor, folder: str | Path | None = None) -> None:
        self.windows = windows.clone()
        self._nll: list[Tensor] = []
        self._folder = str(folder or tempfile.gettempdir())
        self._file = tempfile.TemporaryFile(prefix="llmquant-", dir=self._folder)  # noqa: SIM115

    @classmethod
    def compute(
        cls, model: nn.Module, windows: Tensor, progress: Progress | None = None, folder: str | Path | None = None
    ) -> Reference:
        """Run the baseline over windows [W, T].

        Args:
            model: the baseline; its logits are stored in their own dtype, W * T * V values in all.
            windows: ids, int64.
            progress: called with (done, total) after each window.
            folder: where the file goes, by default the system's temporary folder (`TMPDIR`). It should be on a disk:
                on a tmpfs the file takes memory.

        Raises:
            NoSpaceError: the folder has no room for the logits.
            LlmQuantError: logits that are not finite.
        """
        reference = cls(windows, folder)
        try:
            with inference(model):
                for index in _reporting(len(windows), progress):
                    reference._append(*_forward(model, windows, index))
        except BaseException:
            reference.close()
            raise
        return reference

    @property
    def nll(self) -> Tensor:
        """The baseline's NLL, [W, T - 1] float64, in nats."""
        return torch.stack(self._nll)

    def window(self, index: int) -> Scored:
        """Logits [T, V] of a window, mapped from the file for as long as they live, and its NLL [T - 1]."""
        raw = np.memmap(self._file, np.uint8, mode="r+", offset=index * self._bytes, shape=(self._bytes,))
        return torch.from_numpy(raw).view(self._dtype).view(self._shape), self._nll[index]

    def close(self) -> None:
        """Delete the file. Twice is fine."""
        self._file.close()

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _append(self, logits: Tensor, nll: Tensor) -> None:
        if not self._nll:
            self._shape, self._dtype, self._bytes = logits.shape, logits.dtype, logits.nbytes
            self._check_room()
        self._write(logits)
        self._nll.append(nll)

    def _check_room(self) -> None:
        need, free = self._bytes * len(self.windows), shutil.disk_usage(self._folder).free
        if need > free:
            raise self._no_space(f"{need:,} bytes needed, {free:,} free")

    def _write(self, logits: Tensor) -> None:
        """Append [T, V] as bytes. Written, not mapped: on a full disk a write fails, a mapping kills the process."""
        try:
            self._file.write(logits.cpu().contiguous().view(torch.uint8).numpy().data)
            self._file.flush()
        except OSError as error:
            raise self._no_space(str(error)) if error.errno == errno.ENOSPC else error from error

    def _no_space(self, detail: str) -> NoSpaceError:
        hint = "fewer --windows, a smaller --context, or TMPDIR on a larger disk"
        return NoSpaceError(f"no room for the reference's logits: {detail}", where=self._folder, hint=hint)
