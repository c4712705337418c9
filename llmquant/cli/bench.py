"""`llmquant bench`."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from llmquant.cli.console import console, errors, progress_bar, shape_name, write_json
from llmquant.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from llmquant.measure.latency import Contestant, Result

SCHEMA = 1
SCHEMES = ["int8", "int4-g32", "int4-g128", "int3-g32", "int2-g32", "float8"]


def bench(
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NxK", help="Outputs x inputs of the weight; may repeat. Default: 4096x4096."),
    ] = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(help=f"Scheme to time, for instance int4-g64; may repeat. Default: {', '.join(SCHEMES)}."),
    ] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(
            "--tokens",
            "-m",
            help="Rows of the input (M): 1 is decoding, many are reading a prompt; may repeat. Default: 1,4,16,128.",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the inputs: bfloat16, float16 or float32.")] = "bfloat16",
    dense: Annotated[
        str, typer.Option(help="Plain weights to compare with, each with inputs of its own dtype.")
    ] = "bfloat16,float32,float16",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: as many as torch takes.")] = None,
    megabytes: Annotated[
        float, typer.Option(min=0.001, help="Of weights in rotation, each; more than the caches hold.")
    ] = 160,
    in_cache: Annotated[
        bool, typer.Option("--in-cache", help="Rotate two weights only, which stay in the cache if it is large enough.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that each weight takes; the least time counts.")] = 10,
    backend: Annotated[
        str | None, typer.Option(help="Use only this kernel backend; schemes that it refuses are listed.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write all figures to this file ('-': only stdout).")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw them to this file (.png, .svg or .pdf); needs llmquant[plot].")
    ] = None,
) -> None:
    """Time linear layers: quantized weights against plain ones, and against the read bandwidth of this machine.

    Weights come from memory, as they do in a model: copies of each rotate, 160 MB by default, so nine contestants take
    1.5 GB. All take turns in one run. Other machines and other runs differ: compare ratios, not milliseconds.

    At M = 1 a layer is about as fast as its weight can be read, so "of read" tells how near the kernel is to the limit.
    At large M arithmetic decides.

    Examples:

    * `llmquant bench`

    * `llmquant bench --shape 2048x2048 --shape 8192x2048 --scheme int4-g32 -m 1,2,4,8 --plot speed.png`
    """
    import torch

    if plot:
        from llmquant.cli.bench_plot import require_matplotlib

        require_matplotlib()
    if threads:
        torch.set_num_threads(threads)
    record = run(
        shapes=[parse_shape(text) for text in shape or ["4096x4096"]],
        schemes=scheme or SCHEMES,
        tokens=parse_counts(",".join(tokens or ["1,4,16,128"])),
        dtype=dtype,
        dense=[name for name in dense.split(",") if name],
        megabytes=None if in_cache else megabytes,
        rounds=rounds,
        backend=backend,
    )
    if json:
        write_json(record, json)
    if not json or str(json) != "-":
        print_record(record)
    if plot:
        from llmquant.cli.bench_plot import draw

        draw(record, plot)
        errors.print(f"plot: {plot}", highlight=False, soft_wrap=True)


def run(
    *,
    shapes: list[tuple[int, int]],
    schemes: list[str],
    tokens: list[int],
    dtype: str,
    dense: list[str],
    megabytes: float | None,
    rounds: int,
    backend: str | None,
) -> dict[str, Any]:
    """Times everything; the record as plain JSON types, in seconds, bytes and bytes per second."""
    from llmquant.kernels import registry
    from llmquant.measure.latency import Rotation, read_method, time_linears
    from llmquant.measure.record import machine, versions

    results: list[Result] = []
    skipped: dict[str, str] = {}
    with registry.force(backend) if backend else contextlib.nullcontext():
        for number, shape in enumerate(shapes, 1):
            contestants, refused = line_up(shape, schemes, parse_float(dtype), dense, backend)
            skipped |= refused
            title = "Timing" if len(shapes) == 1 else f"Timing {shape_name(shape)} ({number} of {len(shapes)})"
            with progress_bar(title) as progress:
                results += time_linears(contestants, tokens, Rotation(megabytes), rounds, progress)
    return {
        "schema": SCHEMA,
        "settings": {
            "dtype": dtype,
            "megabytes": megabytes,  # null: two weights in rotation
            "rounds": rounds,
            "backend": backend,
            "read": read_method()[0],
        },
        "results": [{**asdict(r), "shape": list(r.shape), "share_of_read": r.share_of_read} for r in results],
        "skipped": skipped,
        "versions": versions(),
        "machine": machine(),
    }


def line_up(
    shape: tuple[int, int], schemes: list[str], dtype: torch.dtype, dense: list[str], backend: str | None
) -> tuple[list[Contestant], dict[str, str]]:
    """The weights to time, and the schemes that the forced backend refuses, with its reason.

    Raises:
        ConfigError: for unknown schemes and dtypes, and where the backend refuses them all.
    """
    import torch

    from llmquant.measure.latency import Contestant

    configs = {scheme: _parse(scheme) for scheme in schemes}
    plain = torch.randn(shape) * 0.02  # [N, K]
    found = [Contestant(name, plain.to(parse_float(name)), parse_float(name), "torch") for name in dict.fromkeys(dense)]
    skipped: dict[str, str] = {}
    for scheme, config in configs.items():
        try:
            found.append(_quantized(scheme, config, plain.to(dtype), backend))
        except ConfigError as error:
            if not backend:
                raise
            skipped[scheme] = error.what
    if len(skipped) == len(configs):
        raise ConfigError(f"the backend {backend} serves none of the schemes", where="; ".join(skipped.values()))
    return found, skipped


def _parse(scheme: str) -> Any:
    from llmquant.config.schemes import parse_scheme

    config = parse_scheme(scheme)
    if config is None:
        raise ConfigError("there is nothing to time in the scheme none", hint="plain weights are named by --dense")
    return config


def _quantized(scheme: str, config: Any, plain: torch.Tensor, backend: str | None) -> Contestant:
    """The weight under a scheme. Plain rounding is enough: how codes were chosen does not change the time, nor does
    the range of inputs."""
    import torch
    import torch.nn.functional as F

    from llmquant.measure.latency import Contestant
    from llmquant.primitives.stats import InputStats
    from llmquant.quantize import quantize_weight

    inputs = InputStats(low=torch.tensor(-4.0), high=torch.tensor(4.0))
    weight = quantize_weight(plain, config.with_algorithm("rtn"), inputs)
    F.linear(plain[:1], weight)  # a forced backend refuses here
    return Contestant(scheme, weight, plain.dtype, backend or weight.kernel().kernel)


def parse_shape(text: str) -> tuple[int, int]:
    """(4096, 11008) of `4096x11008`. Raises `ConfigError`."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"cannot read the shape {text!r}", hint="outputs x inputs, for instance 4096x11008")
    return int(parts[0]), int(parts[1])


def parse_counts(text: str) -> list[int]:
    """[1, 4, 16] of `1,4,16`, each once, ascending. Raises `ConfigError`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"cannot read the numbers of tokens {text!r}", hint="for instance 1,4,16")
    return sorted({int(part) for part in parts})


def parse_float(name: str) -> torch.dtype:
    """The dtype of that name. Raises `ConfigError`."""
    from llmquant.checkpoint.source import parse_dtype

    dtype = parse_dtype(name)
    if dtype is None:
        raise ConfigError(f"a benchmark needs a dtype, not {name!r}", hint="bfloat16, float16 or float32")
    return dtype


def print_record(record: dict[str, Any]) -> None:
    """The record for people: a table a shape; then how it was measured, and what was left out."""
    for shape in dict.fromkeys(shape_name(r["shape"]) for r in record["results"]):
        console.print(f"[bold]{shape}[/]", highlight=False)
        results = [r for r in record["results"] if shape_name(r["shape"]) == shape]
        console.print(table_of(results), highlight=False)
        console.print()
    for line in footnotes(record):
        console.print(f"[dim]{line}[/]", highlight=False, soft_wrap=True)


def table_of(results: list[dict[str, Any]]) -> Table:
    """One line a weight, in blocks of equal M."""
    short = {name: name.replace("bfloat", "bf").replace("float", "fp") for name in results[0]["times_faster"]}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("M", "weight", "kernel", "ms", *(f"x {name}" for name in short.values()), "GB/s", "of read"):
        table.add_column(name, justify="left" if name in ("weight", "kernel") else "right", no_wrap=True)
    for i, r in enumerate(results):
        new = i == 0 or results[i - 1]["tokens"] != r["tokens"]
        if new and i:
            table.add_row()
        table.add_row(
            str(r["tokens"]) if new else "",
            r["weight"],
            r["kernel"],
            f"{1e3 * r['seconds']:.3f}",
            *(f"{r['times_faster'][name]:.2f}" for name in short),
            f"{r['bandwidth'] / 1e9:.1f}",
            f"{r['share_of_read']:.0%}",
        )
    return table


def footnotes(record: dict[str, Any]) -> list[str]:
    """What a reader must know to compare the figures."""
    settings, machine = record["settings"], record["machine"]
    megabytes = settings["megabytes"]
    place = "two weights in rotation (in cache)" if megabytes is None else f"{megabytes:g} MB in rotation (from memory)"
    reads = sorted({r["read_bandwidth"] / 1e9 for r in record["results"]})
    span = f"{reads[0]:.1f}" + (f" to {reads[-1]:.1f}" if len(reads) > 1 else "")
    return [
        "x: times faster than the plain weight, F.linear in its own dtype; GB/s: bytes of the weight only.",
        f"{machine['processor']}; threads: {machine['torch_threads']}; inputs: {settings['dtype']}; {place}; "
        f"least of {settings['rounds']} rounds.",
        f"Read bandwidth of as many bytes in the same rounds: {span} GB/s ({settings['read']}).",
        *(f"not timed: {scheme}: {reason}" for scheme, reason in record["skipped"].items()),
    ]
