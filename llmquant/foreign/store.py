"""The tensors of a checkpoint by key: their dtypes and shapes from the headers, one read at a time."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from llmquant.checkpoint.header import read_header
from llmquant.errors import CheckpointError

Shape = Sequence[int]


class Store:
    """A checkpoint's tensors. Reading a header takes no memory for what it promises.

    Args:
        files: safetensors files.

    Raises:
        CheckpointError: for a file that is damaged or no safetensors, and for a key in two files.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._file: dict[str, Path] = {}
        self._kind: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {}
        for path in files:
            if path.suffix != ".safetensors":
                raise CheckpointError(
                    "only safetensors are imported, not files that may hold programs",
                    where=str(path),
                    hint="save the model as safetensors with the library that made it",
                )
            for key, kind in read_header(path).tensors.items():
                if key in self._file:
                    raise CheckpointError("two files hold one tensor", where=f"{key}: {path}, {self._file[key]}")
                self._file[key], self._kind[key] = path, kind

    def __contains__(self, key: object) -> bool:
        return key in self._file

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of a tensor. Raises `CheckpointError` for one that torch does not know."""
        found = self._kind[key][0]
        if found is None:
            raise CheckpointError("torch has no dtype for this tensor", where=key)
        return found

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._kind[key][1]

    def nbytes(self, key: str) -> int:
        """The bytes of a tensor."""
        return torch.Size(self.shape(key)).numel() * self.dtype(key).itemsize

    def read(self, key: str) -> Tensor:
        """A tensor's values. Raises `CheckpointError` for what cannot be read."""
        try:
            with safe_open(self._file[key], framework="pt") as file:
                return file.get_tensor(key)  # type: ignore[no-any-return]
        except Exception as error:
            raise CheckpointError(f"cannot read a tensor: {error}", where=f"{self._file[key]}: {key}") from error

    def expect(self, key: str, dtypes: Container[torch.dtype], *shapes: Shape) -> tuple[int, ...]:
        """The shape of a tensor that must be there, of one of these dtypes and, if any are given, shapes.

        Raises:
            CheckpointError: naming what was found and what it should be.
        """
        if key not in self:
            raise CheckpointError("the checkpoint lacks a tensor of a quantized weight", where=key)
        found = self.shape(key)
        if self.dtype(key) not in dtypes:
            raise CheckpointError(f"a tensor of a quantized weight is {self.dtype(key)}", where=key)
        if shapes and found not in [tuple(shape) for shape in shapes]:
            wanted = " or ".join(str(tuple(shape)) for shape in dict.fromkeys(map(tuple, shapes)))
            raise CheckpointError(f"the shape {found} does not fit the others: expected {wanted}", where=key)
        return found

    def rank(self, key: str, dtypes: Container[torch.dtype], rank: int) -> tuple[int, ...]:
        """As `expect`, of a tensor with so many dimensions, none of them empty."""
        shape = self.expect(key, dtypes)
        if len(shape) != rank or min(shape, default=1) < 1:
            raise CheckpointError(f"a tensor of a quantized weight has the shape {shape}, not {rank} sides", where=key)
        return shape
