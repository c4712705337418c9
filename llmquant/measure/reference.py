"""A baseline's predictions, computed once for many candidates, so that no two models need to be in memory."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from llmquant.errors import LlmQuantError, NoSpaceError
from llmquant.measure.codes import coding_of, decode, encode
from llmquant.measure.forward import Pass, forward, inference, rows_in_block
from llmquant.measure.perplexity import target_nll
from llmquant.measure.reference_file import (
    DTYPES,
    Layout,
    checksum,
    damaged,
    read_block,
    read_end,
    read_layout,
    write_end,
)
from llmquant.measure.rows import map_rows

Progress = Callable[[int, int], object]  # called with (windows done, windows in all)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Reference:
    """A baseline's logits for all windows, in a file that is read back one block of rows at a time.

    Logits of 16 bits are kept as they are, wider ones as the codes of `measure.codes`; what needs no other model (NLL,
    most likely token and its probability) is kept as it was computed. Use it in a `with`. Without a path the file has
    no name where the system allows that, so it goes with the process at the latest.

    Attributes:
        windows: the ids it was computed over, [W, T] int64.
        nll: the baseline's NLL in nats, [W, T - 1] float64.
        confidence: the probability of its most likely token, [W, T - 1] float64.
        top1: that token, [W, T - 1] int64.
        path: of the file that stays; None for a temporary one.
    """

    def __init__(self, file: BufferedIOBase, layout: Layout, figures: dict[str, Tensor], path: Path | None) -> None:
        self._file, self._layout, self._checksums = file, layout, figures["checksums"].tolist()
        self.windows, self.nll, self.confidence = figures["windows"], figures["nll"], figures["confidence"]
        self.top1 = figures["top1"].long()
        self.path = path

    @classmethod
    def compute(
        cls,
        model: nn.Module,
        windows: Tensor,
        progress: Progress | None = None,
        folder: str | Path | None = None,
        path: str | Path | None = None,
    ) -> Reference:
        """Run the baseline over windows [W, T].

        Args:
            model: the baseline; its logits take W * T * V * 2 bytes.
            windows: ids, int64.
            progress: called with (done, total) after each window.
            folder: where a temporary file goes, by default the system's folder for them (`TMPDIR`). It should be on a
                disk: on a tmpfs the file takes memory.
            path: where a file goes that stays, for `open`; it appears there when it is whole, in place of an older one.

        Raises:
            NoSpaceError: the folder has no room for the logits.
            LlmQuantError: logits that are not finite.
        """
        path = None if path is None else Path(path)
        with _draft(path, folder) as (file, place), inference(model):
            writer = _Writer(file, windows, place)
            for index in range(len(windows)):
                writer.add(model, index)
                if progress:
                    progress(index + 1, len(windows))
            return cls(file, *writer.finish(seal=path is not None), path)

    @classmethod
    def open(cls, path: str | Path) -> Reference:
        """Open what `compute` left at a path; the logits themselves are verified block by block as they are read.

        Raises:
            ReferenceFileError: no such file, or one that is cut, changed, of another kind or version.
        """
        where = str(path)
        try:
            file = Path(path).open("rb")  # noqa: SIM115
        except OSError as error:
            raise damaged(where, str(error.strerror)) from error
        try:
            layout = read_layout(file, where)
            return cls(file, layout, read_end(file, layout, where), Path(path))
        except BaseException:
            file.close()
            raise

    @property
    def vocabulary(self) -> int:
        """V, the logits of a token."""
        return self._layout.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the logits as they are kept."""
        return self._layout.ends()["logits"]

    def blocks(self, index: int) -> Iterator[Tensor]:
        """A window's logits in blocks of rows, [R, V], up to a constant in each row; the rows are those of `forward`.

        Raises:
            ReferenceFileError: a block is not what was written.
        """
        where = str(self.path or "the temporary file")
        for block, expected in enumerate(self._checksums[index]):
            yield decode(read_block(self._file, self._layout, index, block, expected, where))

    def window(self, index: int) -> tuple[Tensor, Tensor]:
        """All logits [T, V] of a window, up to a constant in each row, and its NLL [T - 1]."""
        return torch.cat(list(self.blocks(index))), self.nll[index]

    def close(self) -> None:
        """Close the file, and delete it if it was temporary. Twice is fine."""
        self._file.close()

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


@contextlib.contextmanager
def _draft(path: Path | None, folder: str | Path | None) -> Iterator[tuple[BufferedIOBase, str]]:
    """A file to write to, and its folder. Left well it gets its name, if it has one; otherwise it is gone."""
    place = str(path.parent if path else folder or tempfile.gettempdir())
    if path is None:
        file, draft = cast(BufferedIOBase, tempfile.TemporaryFile(prefix="llmquant-", dir=place)), None  # noqa: SIM115
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        file = draft.open("w+b")
    try:
        yield file, place
        if path and draft:
            file.flush()
            os.fsync(file.fileno())
            os.replace(draft, path)
    except BaseException:
        file.close()
        if draft:
            draft.unlink(missing_ok=True)
        raise


class _Writer:
    """Collects a baseline's predictions, window by window."""

    def __init__(self, file: BufferedIOBase, windows: Tensor, place: str) -> None:
        self._file, self._place = file, place
        self._windows = windows.clone()
        self._layout: Layout | None = None
        self._checksums: list[int] = []
        self._figures: list[tuple[Tensor, ...]] = []

    def add(self, model: nn.Module, index: int) -> None:
        """Run one window."""
        ids = self._windows[index]
        with forward(model, ids) as run:
            start = 0
            for logits in run.blocks:
                self._check(logits, run, index)
                self._write(encode(logits))
                self._figures.append(tuple(value.cpu() for value in _figures(logits, ids[start + 1 :])))
                start += len(logits)

    def finish(self, seal: bool) -> tuple[Layout, dict[str, Tensor]]:
        """The layout and the figures, also written to the file if it is to be opened again."""
        assert self._layout is not None, "there are no windows"
        count, context = self._windows.shape
        columns = [torch.cat(column).view(count, context - 1) for column in zip(*self._figures, strict=True)]
        figures = dict(zip(("nll", "confidence", "top1"), columns, strict=True))
        figures |= {"windows": self._windows, "checksums": torch.tensor(self._checksums).view(count, -1)}
        with self._no_space_errors():
            if seal:
                write_end(self._file, self._layout, figures)
            self._file.flush()
        return self._layout, figures

    def _check(self, logits: Tensor, run: Pass, index: int) -> None:
        if not torch.stack(logits.aminmax()).isfinite().all():  # NaN spreads to both, and no mask is made
            hint = "a dtype of wider range, more bits, or a check of the checkpoint's weights"
            raise LlmQuantError("the baseline's logits are not finite", where=f"window {index}", hint=hint)
        if self._layout is None:
            dtype = _NAMES[logits.dtype if coding_of(logits.dtype) == "plain" else torch.uint16]
            count, context = self._windows.shape
            self._layout = Layout(dtype, (count, context, run.vocabulary), min(rows_in_block(run.vocabulary), context))
            self._begin(self._layout)

    def _begin(self, layout: Layout) -> None:
        need, free = layout.total(), shutil.disk_usage(self._place).free
        if need > free:
            raise self._no_space(f"{need:,} bytes needed, {free:,} free")
        with self._no_space_errors():
            self._file.write(layout.header())

    def _write(self, stored: Tensor) -> None:
        """Append a block. Written, not mapped: on a full disk a write fails, a mapping kills the process."""
        content = stored.view(torch.uint8).numpy()
        self._checksums.append(checksum([content]))
        with self._no_space_errors():
            self._file.write(content.data)
            self._file.flush()

    @contextlib.contextmanager
    def _no_space_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._no_space(str(error)) if error.errno in (errno.ENOSPC, errno.EDQUOT) else error from error

    def _no_space(self, detail: str) -> NoSpaceError:
        hint = "fewer --windows, a smaller --context, or TMPDIR on a larger disk"
        return NoSpaceError(f"no room for the reference's logits: {detail}", where=self._place, hint=hint)


def _figures(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """NLL, confidence and most likely token of the rows [R, V] that have a target; a window's last row has none."""
    scored = logits[: len(targets)]
    return target_nll(scored, targets[: len(scored)]), map_rows(_confidence, scored), scored.argmax(-1)


def _confidence(logits: Tensor) -> Tensor:
    """The probability of each row's most likely token, [R] float64."""
    logits = logits.float()
    return (logits.amax(-1) - logits.logsumexp(-1)).double().exp()
