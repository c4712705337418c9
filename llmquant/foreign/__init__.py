"""Quantized checkpoints of other libraries, read as ours.

`READERS` is the table: a row says which `quantization_config` is its own, and gives each quantized weight as codes,
scales and zero points of a format of ours. Everything else (names, merges, shards, the report) is `importer`'s.
"""

from __future__ import annotations

from llmquant.foreign.awq import AWQ
from llmquant.foreign.bnb import BITSANDBYTES
from llmquant.foreign.compressed import COMPRESSED_TENSORS
from llmquant.foreign.fp8 import FP8
from llmquant.foreign.gptq import GPTQ
from llmquant.foreign.importer import import_checkpoint
from llmquant.foreign.report import ImportedWeight, ImportReport
from llmquant.foreign.spec import Reader

READERS: tuple[Reader, ...] = (COMPRESSED_TENSORS, AWQ, GPTQ, BITSANDBYTES, FP8)

__all__ = ["READERS", "ImportReport", "ImportedWeight", "Reader", "import_checkpoint"]
