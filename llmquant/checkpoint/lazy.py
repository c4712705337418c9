"""A plain model whose weights lie on the disk until they are used, for runs that meet one block after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from llmquant.checkpoint.mapping import Group
from llmquant.checkpoint.source import Source, build_skeleton
from llmquant.checkpoint.steps import dtypes
from llmquant.quantize.model import put_parameter


class LazyModel:
    """The model of a checkpoint. A block is read when it runs and dropped behind it; what lies outside of blocks is
    read when it is first used.

    Blocks are the members of the model's outermost lists of modules. Nothing is mapped from the files.

    Args:
        source: the checkpoint.

    Attributes:
        model: the model; parameters that are not in memory are on the meta device.
    """

    def __init__(self, source: Source) -> None:
        with _parameters_on_meta():
            self.model = build_skeleton(source.folder, source.config, source.dtype, "cpu", trusted=source.trusted)
        self.model.eval()
        tied = dict(getattr(source.skeleton, "all_tied_weights_keys", {}))
        self._names: dict[str, tuple[str, ...]] = {}  # canonical FQN -> all of its names
        for name, _ in self.model.named_parameters(remove_duplicate=False):
            first = tied.get(name, name)
            self._names[first] = (*self._names.get(first, ()), name)
        self._canonical = {name: first for first, names in self._names.items() for name in names}
        self._dtype_of = dtypes(source)
        self._groups: dict[str, Group] = {}
        for group in source.groups():
            self._groups |= {tied.get(name, name): group for name in group.specs()}
        self._absent = {name: self.model.get_parameter(name) for name in self._names}
        self._held: set[str] = set()
        self._over: set[str] = set()
        self._read_buffers()
        self._watch()

    @contextmanager
    def held(self, prefix: str, names: Iterable[str] = ()) -> Iterator[None]:
        """While it is entered, the weights of a block, or some others, are in memory, and what else runs meanwhile.

        The block is not read again afterwards.
        """
        self.drop()
        found = {*self._inside(prefix), *(self._canonical[name] for name in names)}
        self._read(found)
        self._held |= found
        try:
            yield
        finally:
            self._held -= found
            self.drop()
            if prefix:
                self._over.add(prefix)

    def drop(self, names: Iterable[str] | None = None) -> None:
        """Forgets weights: by default all that nobody holds, changed ones too."""
        for name in set(self._names if names is None else names) - self._held:
            put_parameter(self.model, self._names[name], self._absent[name])

    def _inside(self, prefix: str) -> set[str]:
        return {f for name, f in self._canonical.items() if prefix and name.startswith(prefix + ".")}

    def _read(self, names: Iterable[str]) -> None:
        """Reads those that are not in memory."""
        for name in sorted(names):
            path, _, key = name.rpartition(".")
            if not getattr(self.model.get_submodule(path), key).is_meta:  # no parameter inside of functional_call
                continue
            group = self._groups[name]
            dtype = self._dtype_of(name, self._absent[name].dtype)
            for given, value in group.read(dtype).items():
                first = self._canonical.get(given)
                if first == name:
                    put_parameter(self.model, self._names[first], nn.Parameter(value.to(dtype), requires_grad=False))

    def _read_buffers(self) -> None:
        """Reads the buffers that the files hold: they are small."""
        for name in [name for name, _ in self.model.named_buffers()]:
            if name in self._groups:
                value = self._groups[name].read()[name]
                path, _, key = name.rpartition(".")
                setattr(self.model.get_submodule(path), key, value.to(self._dtype_of(name, value.dtype)))

    def _watch(self) -> None:
        """Makes every module read what it needs before it runs."""
        blocks: dict[str, nn.Module] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, nn.ModuleList) and not any(name.startswith(block + ".") for block in blocks):
                blocks |= {f"{name}.{key}": child for key, child in module.named_children()}
        for name, block in blocks.items():
            block.register_forward_pre_hook(lambda *_, name=name: self._enter(name))
            block.register_forward_hook(lambda *_, name=name: self.drop(self._inside(name)), always_call=True)
        for name, module in self.model.named_modules():
            own = [f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)]
            if own and not any(f"{name}.".startswith(block + ".") for block in blocks):
                # Some models ask an embedding where it lies before they call it.
                asked = self.model if isinstance(module, nn.Embedding) else module
                asked.register_forward_pre_hook(lambda *_, own=own: self._read(self._canonical[n] for n in own))

    def _enter(self, block: str) -> None:
        if block not in self._over:
            self._read(self._inside(block))


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters of modules that are made meanwhile have no values; buffers, which no file need hold, have theirs."""
    register = nn.Module.register_parameter

    def registered(module: nn.Module, name: str, parameter: Any) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = registered  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
