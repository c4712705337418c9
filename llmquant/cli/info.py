"""`llmquant info`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from llmquant.cli.console import console, write_json

_EXTRAS = {
    "datasets": "eval --text wikitext2 (pip install 'llmquant[wikitext]')",
    "matplotlib": "bench --plot (pip install 'llmquant[plot]')",
    "gguf": "make demo",
}


def info(
    json: Annotated[Path | None, typer.Option(help="Write everything to this file instead ('-': stdout).")] = None,
) -> None:
    """Show versions, the processor and its features, the kernels at hand, and what is missing."""
    found = collect()
    if json:
        write_json(found, json)
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for section, values in found.items():
        for key, value in values.items():
            table.add_row(f"{section}: {key}", escape(str(value)))
    console.print(table, highlight=False)


def collect() -> dict[str, dict[str, Any]]:
    """Everything that `llmquant info` shows, as plain JSON."""
    from llmquant.formats import FORMATS
    from llmquant.kernels import aten, cpu
    from llmquant.kernels.triton import TRITON
    from llmquant.measure.record import machine, versions

    missing_backends = {name: backend.missing for name, backend in cpu.BACKENDS.items()}
    missing_backends |= {"aten (CUDA)": aten.missing(), "triton (CUDA)": TRITON.missing}
    return {
        "version": versions(),
        "machine": {**machine(), "features": ", ".join(_cpu_features()) or "none known"},
        "kernels": {
            "native library": cpu.missing() or "loaded",
            **{name: missing or "can run here" for name, missing in missing_backends.items()},
            "formats": ", ".join(FORMATS),
        },
        "missing": {name: use for name, use in _EXTRAS.items() if importlib.util.find_spec(name) is None},
    }


def _cpu_features() -> list[str]:
    """The flags of the processor that decide how fast low-bit kernels can be."""
    wanted = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    present = set(line.partition(":")[2].split())
    return [flag for flag in wanted if flag in present]
