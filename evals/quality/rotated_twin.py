"""A twin of a model: the same function, other weights.

SmolLM2's weights come out of a 4-bit file and lie on its grid, which some quantizers hit again. The twin's residual
stream is turned by a random orthogonal matrix, and its weights lie on no grid.

    python evals/quality/rotated_twin.py demo/SmolLM2-135M demo/SmolLM2-135M-twin
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from llmquant import rotate_, save
from llmquant.checkpoint.source import open_source

SEED = 0


def write_twin(model: Path, twin: Path, seed: int = SEED, dtype: torch.dtype = torch.float32) -> Path:
    """Writes the twin of a checkpoint and the files beside it, unless one of the same seed and dtype is there already.

    float32 by default: rounded to 16 bits, the twin would be another function than its model. A folder that is no twin
    is not replaced.
    """
    note, known = {"seed": seed, "dtype": str(dtype)}, (twin / "twin.json").is_file()
    if known and json.loads((twin / "twin.json").read_text()) == note:
        return twin
    source = open_source(model, dtype)
    plain = source.load()
    print(rotate_(plain, "random", seed))
    save(plain, twin, overwrite=known, extras=source.extras())
    (twin / "twin.json").write_text(json.dumps(note) + "\n")
    return twin


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("twin", type=Path)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    given = parser.parse_args(arguments)
    print(write_twin(given.model, given.twin, given.seed, getattr(torch, given.dtype)))


if __name__ == "__main__":
    main()
