"""The part of `llmquant quantize` that changes the plain model first: `--rotate`, and scales of channels.

The changed model is written beside the output and stands in for the original one, so that everything that comes
afterwards (streaming, calibration, runs that go on after an interruption) is what it is without a change.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmquant.convert.listener import Listener, Silent

if TYPE_CHECKING:
    from llmquant.checkpoint.origin import Origin
    from llmquant.checkpoint.source import Source
    from llmquant.config.fqn import FqnToConfig
    from llmquant.config.recipe import Changes
    from llmquant.convert.calibrated import Reading
    from llmquant.tune.sites import MigrationReport


@dataclass
class Preparation:
    """What is done to a plain model before it is quantized.

    Attributes:
        changes: what.
        rotate_seed: of the rotation.
        listener: hears how it goes.
        reports: what was done, by name, after `applied` was entered.
    """

    changes: Changes
    rotate_seed: int = 0
    listener: Listener = field(default_factory=Silent)
    reports: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def applied(
        self, model: str | Origin, output: Path, config: FqnToConfig, reading: Reading, imatrix: Path | None, dtype: str
    ) -> Iterator[str | Origin]:
        """The model to quantize: the given one, or a changed copy that vanishes when the block ends.

        Raises:
            ConfigError, UnknownArchitectureError, CalibrationError, NoSpaceError and others of `rotate_`, `awq_` and
            `smoothquant_`.
        """
        from llmquant.checkpoint.source import open_source, parse_dtype
        from llmquant.quantize import make_plan

        if not self.changes:
            yield model
            return
        source = open_source(model, parse_dtype(dtype))
        make_plan(source.skeleton, config)  # whose errors are better told before the long part
        if imatrix is not None and imatrix.exists():
            self.listener.warn(f"{imatrix} must come from a run with the same changes of the model")
        output.resolve().parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.changed-", dir=output.resolve().parent))
        try:
            yield str(self._write(source, config, reading, folder / "model"))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _write(self, source: Source, config: FqnToConfig, reading: Reading, folder: Path) -> Path:
        """Writes the changed copy of a checkpoint."""
        from llmquant.checkpoint.save import save

        plain = source.load()
        if self.changes.rotate:
            self._rotate(plain)
        if self.changes.migrate:
            self._migrate(plain, source, config, reading)
        return _dated_by_content(save(plain, folder, extras=source.extras()))

    def _rotate(self, plain: Any) -> None:
        from llmquant.tune.rotate import rotate_

        with self.listener.bar("Rotating") as progress:
            report = rotate_(plain, self.changes.rotate, self.rotate_seed, progress=progress)  # type: ignore[arg-type]
        self._tell("rotation", report)

    def _migrate(self, plain: Any, source: Source, config: FqnToConfig, reading: Reading) -> None:
        from llmquant.convert.calibrated import FEW_TOKENS
        from llmquant.integrations.loading import load_tokenizer
        from llmquant.tune.awq import awq_
        from llmquant.tune.smoothquant import smoothquant_

        text, tokens = reading.text or "builtin", FEW_TOKENS if reading.tokens is None else reading.tokens
        windows: dict[str, Any] = {"tokenizer": load_tokenizer(source.folder), "tokens": tokens, "seed": reading.seed}
        report: MigrationReport
        with self.listener.bar("Scaling channels") as progress:
            if self.changes.migrate == "awq":
                report = awq_(plain, config, text, progress=progress, **windows)
            else:
                report = smoothquant_(plain, text, progress=progress, **windows)
        self._tell("migration", report)

    def _tell(self, name: str, report: Any) -> None:
        """Keeps a report for the JSON file, and shows its first lines."""
        self.reports[name] = asdict(report)
        lines = str(report).splitlines()
        shown = lines if name == "rotation" else lines[:1]
        self.listener.say("\n".join(shown))


def _dated_by_content(folder: Path) -> Path:
    """Gives files of equal content equal times of change, by which a run that was interrupted knows the same copy."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            found = int.from_bytes(hashlib.file_digest(file, "sha256").digest()[:7], "big")
        seconds, rest = divmod(found, 2**25)  # some disks keep nothing below seconds
        os.utime(path, ns=(0, seconds * 10**9 + rest))
    return folder
