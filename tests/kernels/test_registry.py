"""Which kernel is chosen, and what is said about it."""

from __future__ import annotations

import subprocess
import sys

from llmquant.kernels import cpu, registry

WITHOUT_LIBRARY = """
import warnings
from llmquant.kernels.cpu import library
library.load = lambda: None
import torch
from llmquant import Int4WeightOnlyConfig, quantize_weight
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for columns in (64, 96, 64):
        weight = quantize_weight(torch.ones(4, columns), Int4WeightOnlyConfig(32))
        print(torch.nn.functional.linear(torch.ones(1, columns), weight)[0, 0].item(), weight.kernel())
print(len(caught), caught[0].message)
"""


def test_without_the_library_the_reference_serves_and_says_so_once() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_LIBRARY], capture_output=True, text=True, check=True)
    *lines, warned = run.stdout.strip().splitlines()
    assert [line.split()[0] for line in lines] == ["64.0", "96.0", "64.0"]
    assert all("kernel='reference'" in line and "the native library was not built" in line for line in lines)
    assert warned.startswith("1 llmquant runs on its slow reference: the native library was not built")


def test_reasons_name_what_refused() -> None:
    choice = registry.choose("int4", (1, 32), 64, "meta")
    assert choice == ("reference", f"{', '.join(cpu.BACKENDS)}, aten, triton: the weight lies on meta")
