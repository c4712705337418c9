"""The columns of the table of candidates, shared by page and Markdown: a figure, its error, how they are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmquant.report import numbers
from llmquant.report.bars import speedup
from llmquant.report.rows import Row
from llmquant.report.sections import Section

Figure = Callable[[Row, Section], float | None]


def _path(path: str) -> Figure:
    """Reads `kl.mean` and the like from a row; None where a part is missing."""

    def figure(row: Row, section: Section) -> float | None:
        value: object = row
        for name in path.split("."):
            value = getattr(value, name, None)
        return value if isinstance(value, int | float) else None

    return figure


@dataclass(frozen=True)
class Column:
    """A column: its heading, what it means, its figure and how that is written, and perhaps a standard error.

    Attributes:
        brief: whether the short table of the Markdown has it.
    """

    title: str
    hint: str
    figure: Figure
    write: numbers.Format
    error: Figure | None = None
    brief: bool = False

    def text(self, row: Row, section: Section) -> str:
        """The figure with its error, as written in tables."""
        value = self.figure(row, section)
        error = self.error(row, section) if self.error else None
        written = self.write(value)
        return f"{written} ± {self.write(error).lstrip('+')}" if value is not None and error is not None else written


def _change(value: float | None) -> str:
    return numbers.change(value)


COLUMNS = (
    Column("disk", "bytes of the checkpoint's files", _path("bytes.disk"), numbers.size, brief=True),
    Column("of 16 bits", "bytes over the reference's", lambda row, of: of.share(row), numbers.share, brief=True),
    Column("bits", "bits a weight, embeddings included", _path("bytes.bits_per_weight"), numbers.plain(2), brief=True),
    Column(
        "bits, no emb.", "bits a weight without embeddings", _path("bytes.bits_per_weight_without_embeddings"),
        numbers.plain(2),
    ),
    Column(
        "bits (q)", "bits a quantized weight, scales and padding included", _path("bytes.bits_per_quantized_weight"),
        numbers.plain(2),
    ),
    Column("KL", "mean divergence from 16 bits, nats", _path("kl.mean"), numbers.nats, _path("kl.stderr"), True),
    Column("KL median", "half of the tokens are below", _path("kl.median"), numbers.nats),
    Column("KL p99", "99 % of the tokens are below", _path("kl.p99"), numbers.nats, brief=True),
    Column("KL max", "the worst token", _path("kl.max"), numbers.nats),
    Column("top-1", "same most likely token as 16 bits", _path("top1"), numbers.share, brief=True),
    Column("Δp RMS", "root mean square change of the true token's probability", _path("delta_p_rms"), numbers.share),
    Column(
        "perplexity", "of the tokens", _path("perplexity.value"), numbers.perplexity, _path("perplexity.stderr"), True,
    ),
    Column(
        "change", "of perplexity, paired with 16 bits", _path("perplexity.change"), _change,
        _path("perplexity.change_stderr"), True,
    ),
    Column("prefill", "speed over 16 bits", lambda row, _: speedup(row, "prefill"), numbers.times, brief=True),
    Column("decode", "speed over 16 bits", lambda row, _: speedup(row, "decode"), numbers.times, brief=True),
    Column("weights", "bytes of weights in memory", _path("bytes.weights"), numbers.size),
    Column("peak", "largest resident memory of a process of its own", _path("bytes.peak_rss"), numbers.size),
    Column("not finite", "logits that were NaN or infinite", _path("nonfinite.logits"), numbers.plain(0)),
    Column("quantize, s", "seconds to quantize", _path("seconds.quantize"), numbers.plain(1)),
    Column("evaluate, s", "seconds to evaluate", _path("seconds.evaluate"), numbers.plain(1)),
)  # fmt: skip


def present(section: Section, rows: Sequence[Row]) -> list[Column]:
    """Columns with at least one figure in these rows."""
    return [column for column in COLUMNS if any(column.figure(row, section) is not None for row in rows)]
