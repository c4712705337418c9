"""`llmquant run`."""

from __future__ import annotations

from typing import Annotated

import typer


def run(
    command: Annotated[list[str], typer.Argument(metavar="PROGRAM", help="The program and its arguments.")],
) -> None:
    """Start any program with llmquant registered, so that quantized checkpoints load in it through transformers.

    `llmquant run -- lm_eval --model hf ...`, `-- transformers serve MODEL`, `-- accelerate launch train.py`,
    `-- python script.py`, `-- python -m module`; the processes that it starts have it too. The exit status is the
    program's own; 127 if there is no such program, 126 if it cannot be started or its Python has no llmquant.
    """
    from llmquant.integrations.program import start

    start(command)
