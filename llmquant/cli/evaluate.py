"""`llmquant eval`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from llmquant.cli.console import console, errors, progress_bar, size
from llmquant.cli.gate import broken_limits, parse_share
from llmquant.cli.tasks import Tasks, print_tasks, record_of_tasks
from llmquant.convert.listener import Bar as Report
from llmquant.errors import LlmQuantError

if TYPE_CHECKING:
    from torch import Tensor

    from llmquant.measure.evaluate import Evaluation
    from llmquant.measure.processes import Processes
    from llmquant.measure.reference import Reference
    from llmquant.measure.speed import Speed

Bar = Callable[[str], AbstractContextManager[Report]]


def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder or hub id, quantized or plain.")],
    baseline: Annotated[str | None, typer.Option(help="The 16-bit original: adds KL, top-1 and the change.")] = None,
    text: Annotated[
        str, typer.Option(help="builtin (CPython's help topics, no download), wikitext2, or the path of a text file.")
    ] = "builtin",
    context: Annotated[int, typer.Option(help="Tokens a window; the first of each is not scored.")] = 2048,
    windows: Annotated[int, typer.Option(help="Windows to score, from the start of the text; 0 for all.")] = 8,
    dtype: Annotated[
        str, typer.Option(help="To compute in: auto (the model's own), float32, bfloat16 or float16.")
    ] = "auto",
    max_kl: Annotated[
        float | None, typer.Option(min=0, help="Exit with status 1 if the mean KL, in nats, is above this.")
    ] = None,
    max_ppl_increase: Annotated[
        float | None,
        typer.Option(
            parser=parse_share,
            metavar="SHARE",
            help="Exit with status 1 if perplexity rises by more than this: 3% or 0.03.",
        ),
    ] = None,
    noise_floor: Annotated[
        bool, typer.Option("--noise-floor", help="Also run the baseline with bfloat16-sized noise: what means nothing.")
    ] = False,
    speed: Annotated[
        bool, typer.Option("--speed", help="Also time reading and generating, in turns with the baseline.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Also write the record to this file.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Also print KL by the baseline's confidence.")] = False,
    tasks: Annotated[
        str | None, typer.Option(help="Also run these tasks of lm-eval on the model: arc_easy,hellaswag,mmlu_*")
    ] = None,
    task_path: Annotated[Path | None, typer.Option(help="A folder with tasks of your own, in YAML.")] = None,
    limit: Annotated[int | None, typer.Option(help="The first documents of each task only.")] = None,
    tasks_only: Annotated[bool, typer.Option("--tasks-only", help="Run the tasks and measure nothing else.")] = False,
) -> None:
    """Measure perplexity and size, and how far a model is from its 16-bit original.

    Perplexity here is per token, over disjoint windows of the text as it is; it is not lm-eval's word perplexity.
    Compare only figures with the same protocol, which is printed with them. KL is in nats, from the baseline to the
    model.

    Tasks are run by lm-eval (`pip install llmquant[tasks]`) with its prompts, metrics and standard errors, on the model
    alone.

    Exit status: 0, 1 if a limit is broken or logits are not finite, 2 for an error.

    Examples:

    * `llmquant eval ./SmolLM2-int4 --baseline ./SmolLM2 --max-kl 0.05 --max-ppl-increase 3%`

    * `accelerate launch --multi_gpu --num_processes 2 -m llmquant eval ./SmolLM2-int4 --baseline ./SmolLM2`

    * `llmquant eval ./SmolLM2-int4 --tasks common_knowledge --task-path evals/tasks --tasks-only`
    """
    chosen = Tasks(tasks, task_path, limit, tasks_only)
    need = {"--max-kl": max_kl, "--max-ppl-increase": max_ppl_increase, "--noise-floor": noise_floor or None}
    relative = [name for name, value in need.items() if value is not None]
    _check_baseline(baseline, relative)
    chosen.check(relative + ["--speed"] * speed + ["--baseline"] * (baseline is not None))
    found = chosen.load()
    from llmquant.measure.processes import processes

    with processes() as group:
        plan = Plan(model, baseline, text, context, windows, dtype, noise_floor, speed, group)
        record = record_of_tasks(model) if tasks_only else plan.run()
    broken = [] if tasks_only else broken_limits(record, max_kl, max_ppl_increase)
    if group.rank == 0:
        if found:
            record["tasks"] = chosen.run(found, model, dtype)
        if json:
            from llmquant.measure.record import write_record

            write_record(record, json)
        if not tasks_only:
            print_record(record, verbose)
        if found:
            print_tasks(record["tasks"])
        for reason in broken:
            errors.print(f"[bold red]failed:[/] {reason}", highlight=False, soft_wrap=True)
    if broken:
        raise typer.Exit(1)


def _check_baseline(baseline: str | None, options: list[str]) -> None:
    if options and not baseline:
        where = ", ".join(options)
        raise LlmQuantError("these figures are relative to a baseline", where=where, hint="--baseline MODEL")


def run(model: str, baseline: str | None, text: str, context: int, windows: int, dtype: str) -> dict[str, Any]:
    """Evaluates a model, its baseline first and then out of memory; returns the record."""
    from llmquant.measure.processes import Processes

    return Plan(model, baseline, text, context, windows, dtype, False, False, Processes()).run()


@dataclass
class Plan:
    """What one evaluation is asked for, and its parts in order: the baseline, the model, their speed."""

    model: str
    baseline: str | None
    text: str
    context: int
    windows: int
    dtype: str
    noise_floor: bool
    speed: bool
    group: Processes

    def run(self) -> dict[str, Any]:
        """The record."""
        from llmquant.checkpoint.source import locate
        from llmquant.integrations.loading import load_tokenizer
        from llmquant.measure.evaluate import Protocol, backends
        from llmquant.measure.memory import footprint
        from llmquant.measure.record import build_record, machine, versions
        from llmquant.measure.text import load_text
        from llmquant.measure.windows import make_windows, tokenize

        if self.speed and self.group.count > 1:
            raise LlmQuantError("speed is measured in one process", where="--speed", hint="without accelerate launch")
        folder, content = locate(self.model), load_text(self.text)
        ids, bos = tokenize(load_tokenizer(folder), content.content)
        every = make_windows(ids, self.context, self.windows or None, bos)
        with self.referred(self.group.share(every)) as (reference, floor):
            candidate = self.load(self.model)
            evaluation = self.evaluated(candidate, self.group.share(every), reference)
        sizes = footprint(candidate, folder)
        name = str(candidate.dtype).removeprefix("torch.")
        return build_record(
            model=self.model,
            baseline=self.baseline,
            protocol=Protocol.describe(content, every, bos, name, backends(candidate)),
            evaluation=evaluation,
            footprint=replace(sizes, peak_rss=max(self.group.everyones(sizes.peak_rss or 0)) or None),
            versions=versions(),
            machine=machine(),
            noise_floor=floor,
            speed=self.timed(candidate) if self.speed else None,
            processes=self.group.count,
        )

    @contextmanager
    def referred(self, windows: Tensor) -> Iterator[tuple[Reference | None, Evaluation | None]]:
        """The baseline's predictions and its noise floor, with the baseline itself out of memory again."""
        if self.baseline is None:
            yield None, None
            return
        from llmquant.measure.memory import reset_peak_rss
        from llmquant.measure.noise import bfloat16_noise
        from llmquant.measure.reference import Reference

        original, floor = self.load(self.baseline), None
        with self.bar("Baseline") as progress:
            reference = Reference.compute(original, windows, progress)
        with reference:
            if self.noise_floor:
                with bfloat16_noise(original):
                    floor = self.evaluated(original, windows, reference, "Noise floor")
            del original
            gc.collect()
            reset_peak_rss()
            yield reference, floor

    def evaluated(
        self, candidate: Any, windows: Tensor, reference: Reference | None, title: str = "Model"
    ) -> Evaluation:
        """The evaluation over the windows of all processes, of which these are this one's."""
        import time

        from llmquant.measure.evaluate import score, summarize

        start = time.perf_counter()
        with self.bar(title) as progress:
            tokens, rows = score(candidate, windows, reference, progress)
        return summarize(self.group.join(tokens), rows, time.perf_counter() - start)

    def timed(self, candidate: Any) -> Speed:
        """The speed of the model, in turns with its baseline."""
        from llmquant.measure.speed import time_model

        original = self.load(self.baseline) if self.baseline else None
        with self.bar("Speed") as progress:
            return time_model(candidate, original, progress=progress)

    def load(self, model: str) -> Any:
        """A model in the dtype that was asked for."""
        from llmquant.checkpoint.source import locate, parse_dtype
        from llmquant.integrations.loading import load

        return load(locate(model), dtype=parse_dtype(self.dtype) or "auto")

    def bar(self, title: str) -> AbstractContextManager[Report]:
        """A bar, in the process that reports."""
        return progress_bar(title) if self.group.rank == 0 else _silent()


@contextmanager
def _silent() -> Iterator[Report]:
    yield lambda done, total, item="", /: None


def print_record(record: dict[str, Any], verbose: bool = False) -> None:
    """The record for people."""
    protocol, sizes = record["protocol"], record["bytes"]
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for row in _quality_rows(record, verbose):
        table.add_row(*row)
    if speed := record["speed"]:
        table.add_row("prefill, decode", _speed(speed))
    table.add_row("on disk", size(sizes["disk"]))
    table.add_row("weights in memory", size(sizes["weights"]))
    table.add_row("peak resident", size(sizes["peak_rss"]))
    table.add_row("bits per weight", _bits(sizes))
    console.print(table, highlight=False)
    console.print(
        f"[dim]{protocol['text']} {protocol['text_sha256'][:12]}, {protocol['windows']} windows of "
        f"{protocol['context']}, BOS {protocol['bos']}, {protocol['tokens_scored']} tokens scored, "
        f"{protocol['dtype']}, {protocol['backend']}, "
        f"{record['seconds']:.0f} s{_shared(record['processes'])}[/]",
        highlight=False,
        soft_wrap=True,
    )


def _quality_rows(record: dict[str, Any], verbose: bool) -> Iterator[tuple[str, str]]:
    """Name and figures of what says how good the model is."""
    ppl, nonfinite = record["perplexity"], record["nonfinite"]
    if nonfinite["tokens"]:
        told = f"{nonfinite['logits']:,} logits, of {nonfinite['tokens']:,} of {record['protocol']['tokens_scored']:,}"
        yield "[red]not finite[/]", f"[red]{told} tokens: the other figures are not those of a working model[/]"
    change = "" if ppl["baseline"] is None else f" (baseline {ppl['baseline']:.3f}, {_change(ppl)})"
    yield "perplexity", _with_error(ppl["value"], ppl["stderr"], ".3f") + change
    if not (kl := record["kl"]):
        return
    spread = ", ".join(f"{name} {_number(kl[name], '.4f')}" for name in ("median", "p90", "p99", "max"))
    yield "KL", f"{_with_error(kl['mean'], kl['stderr'], '.5f')} nats ({spread})"
    if floor := record["noise_floor"]:
        yield "noise floor", f"{_with_error(floor['kl']['mean'], floor['kl']['stderr'], '.5f')} nats"
    if verbose:
        for cell in kl["by_confidence"]:
            told = f"{_number(cell['mean'], '.5f')} nats, {cell['tokens']:,} tokens" if cell["tokens"] else "no tokens"
            yield f"  baseline {cell['low']:.0%} to {cell['high']:.0%}", told
    yield "same top-1", f"{record['top1']:.2%}"
    yield "RMS Δ probability", f"{record['delta_p_rms']:.2%}"


def _number(value: float | None, form: str) -> str:
    """A figure, or that JSON has none because it is not finite."""
    return "infinite" if value is None else format(value, form)


def _with_error(value: float | None, error: float | None, form: str) -> str:
    return _number(value, form) if value is None or error is None else f"{value:{form}} ± {error:{form}}"


def _change(ppl: dict[str, Any]) -> str:
    if ppl["change"] is None or ppl["change_stderr"] is None:
        return _number(ppl["change"], "+.2%")
    return f"{ppl['change']:+.2%} ± {ppl['change_stderr']:.2%}"


def _shared(processes: int) -> str:
    return f" in {processes} processes" if processes > 1 else ""


def _speed(speed: dict[str, Any]) -> str:
    def one(name: str) -> str:
        own, other = speed[name], speed[f"{name}_reference"]
        return f"{own:.1f}" + (f" ({own / other:.2f} of the baseline's)" if other else "")

    threads = f"{speed['threads']} thread{'s' if speed['threads'] > 1 else ''}"
    return f"{one('prefill')}, {one('decode')} tokens/s; prompt {speed['prompt']}, {threads}"


def _bits(sizes: dict[str, Any]) -> str:
    body, quantized = sizes["bits_per_weight_without_embeddings"], sizes["bits_per_quantized_weight"]
    more = [f"{body:.2f} without embeddings"] if body else []
    more += [f"{quantized:.3f} where quantized"] if quantized else []
    return f"{sizes['bits_per_weight']:.2f}" + (f" ({', '.join(more)})" if more else "")
