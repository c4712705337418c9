"""What hands a module its fake-quantized weight while it runs, and nothing at any other time.

Before a forward the parameter is shadowed by an entry of its owner's `__dict__`, where Python looks first; afterwards,
whatever happened, the entry is gone. So between forwards the model is an ordinary one: parameters, state dict, tied
weights, `save_pretrained`, `deepcopy` and optimizers never see more than plain floats, and gradient checkpointing,
which runs modules again, meets the same weights again.

The owner is hooked, and the module around it, for some read the weights of their children (Mamba, DBRX).
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
    """The hooks of one name of a weight.

    Attributes:
        candidate: the weight.
        owner, attribute: where the parameter is.
        config, stats: what `quantize_weight` is given.
        preparation: of the model.
        reads: how often a forward read the weight since.
        depth: how many of the hooked modules are running.
        handles: of the hooks.
    """

    candidate: Candidate
    owner: nn.Module
    attribute: str
    config: QuantConfig
    stats: InputStats | None
    preparation: Preparation
    reads: int = 0
    depth: int = 0
    handles: list[RemovableHandle] = field(default_factory=list)

    def attach(self, *modules: nn.Module) -> None:
        """Starts to serve the owner, and other modules that may read its parameter."""
        for module in modules:
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

    def read(self, weight: Tensor) -> QuantizedTensor:
        """`quantize` in a forward."""
        self.reads += 1
        return self.quantize(weight)

    def before(self, module: nn.Module, args: Any) -> None:
        """Puts the fake-quantized weight in front of the parameter."""
        weight = self.owner._parameters[self.attribute]
        if isinstance(weight, QuantizedTensor):
            raise AlreadyQuantizedError(
                "a model prepared for training was quantized by other means than convert()",
                where=self.candidate.name,
                hint="llmquant.qat.convert(model) alone",
            )
        assert weight is not None
        self.depth += 1
        if self.depth == 1:
            shaped = weight.reshape(self.candidate.shape)
            self.owner.__dict__[self.attribute] = FakeQuantized.later(shaped, self.read)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Takes it away again."""
        self.depth = max(self.depth - 1, 0)  # this hook runs also where another hook failed before `before` could
        if self.depth == 0:
            self.owner.__dict__.pop(self.attribute, None)


def fake_quantizers(model: nn.Module) -> Iterator[tuple[str, FakeQuantizer]]:
    """FQN and hooks of each fake-quantized parameter, under each of its names."""
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            found = getattr(hook, "__self__", None)
            if isinstance(found, FakeQuantizer) and found.owner is module:
                yield f"{path}.{found.attribute}".lstrip("."), found
