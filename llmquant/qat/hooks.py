"""What hands a module its fake-quantized weight while it runs, and nothing at any other time.

Before a module's forward its parameter is shadowed by an entry of the module's `__dict__`, where Python looks first;
afterwards, whatever happened, the entry is gone. So between forwards the model is an ordinary one: parameters, state
dict, tied weights, `save_pretrained`, `deepcopy` and optimizers never see more than plain floats, and gradient
checkpointing, which runs modules again, meets the same weights again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmquant.config.base import QuantConfig
from llmquant.config.candidates import Candidate
from llmquant.config.fqn import FqnToConfig
from llmquant.errors import AlreadyQuantizedError
from llmquant.primitives.stats import InputStats
from llmquant.qat.straight import fake_quantized_weight
from llmquant.qat.tensor import FakeQuantized
from llmquant.quantize import quantize_weight
from llmquant.tensor import QuantizedTensor


@dataclass(frozen=True)
class Preparation:
    """What `prepare` decided about a whole model; all of its hooks share it."""

    config: FqnToConfig
    skipped: Mapping[str, str]
    warnings: tuple[str, ...]


@dataclass(eq=False)
class FakeQuantizer:
    """The hooks of one weight in one module.

    Attributes:
        candidate: the weight.
        place: the parameter's name, from the module whose forward reads it.
        config, stats: what `quantize_weight` is given.
        preparation: of the model.
        forwards: how often the module ran since.
        handles: of the hooks.
    """

    candidate: Candidate
    place: str
    config: QuantConfig
    stats: InputStats | None
    preparation: Preparation
    forwards: int = 0
    handles: list[RemovableHandle] = field(default_factory=list)

    def attach(self, module: nn.Module) -> None:
        """Starts to serve a module."""
        self.handles.append(module.register_forward_pre_hook(self.before))
        self.handles.append(module.register_forward_hook(self.after, always_call=True))

    def detach(self) -> None:
        """Leaves the module as it was."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def quantize(self, weight: Tensor) -> QuantizedTensor:
        """What `convert` makes of the weight as it is now, and what every forward takes it for."""
        shaped = weight.detach().reshape(self.candidate.shape)
        return quantize_weight(shaped, self.config, self.stats, transposed=self.candidate.transposed)

    def before(self, module: nn.Module, args: Any) -> None:
        """Puts the fake-quantized weight in front of the parameter."""
        owner, name = self.owner(module)
        weight = owner._parameters[name]
        if isinstance(weight, QuantizedTensor):
            raise AlreadyQuantizedError(
                "a model prepared for training was quantized by other means than convert()",
                where=self.candidate.name,
                hint="llmquant.qat.convert(model) alone",
            )
        assert weight is not None
        quantized = self.quantize(weight)
        self.forwards += 1
        shaped = weight.reshape(self.candidate.shape)
        owner.__dict__[name] = FakeQuantized.of(fake_quantized_weight(shaped, quantized), quantized)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Takes it away again."""
        owner, name = self.owner(module)
        owner.__dict__.pop(name, None)

    def owner(self, module: nn.Module) -> tuple[nn.Module, str]:
        """Which module has the parameter, and under what name."""
        path, _, name = self.place.rpartition(".")
        return module.get_submodule(path), name


def fake_quantizers(model: nn.Module) -> Iterator[tuple[str, nn.Module, FakeQuantizer]]:
    """FQN of each fake-quantized parameter (one a name of it), the module that reads it, and its hooks."""
    for path, module in model.named_modules():
        for hook in list(module._forward_pre_hooks.values()):
            found = getattr(hook, "__self__", None)
            if isinstance(found, FakeQuantizer):
                yield f"{path}.{found.place}".lstrip("."), module, found
