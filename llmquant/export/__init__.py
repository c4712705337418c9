"""Quantized checkpoints in the formats of other programs: codes as they are, or a refusal that names the weight.

The package can be called: `llmquant.export(folder, to, output)` is `export_checkpoint`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A module that is its main function, too."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from llmquant.export.run import export_checkpoint

        return export_checkpoint(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
