"""Where a checkpoint comes from, and how it may be read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Origin:
    """A checkpoint by name. Whatever takes the name of a checkpoint to quantize takes one of these too.

    Attributes:
        model: local folder or hub id.
        revision: branch, tag or commit of a hub repository; None is its default branch.
        drop_shards: whether a shard that the run itself has downloaded is deleted when nothing needs it any more.
        raw: take the keys of the files as names and their matrices as weights, for architectures that transformers
            does not know.
        trust_remote_code: run the Python code that lies beside the weights to build the model.
    """

    model: str | Path
    revision: str | None = None
    drop_shards: bool = False
    raw: bool = False
    trust_remote_code: bool = False

    @classmethod
    def of(cls, model: str | Path | Origin) -> Origin:
        """`model` itself, or the origin of that name with nothing special about it."""
        return model if isinstance(model, Origin) else cls(model)

    def __str__(self) -> str:
        return str(self.model)
