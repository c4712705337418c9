"""What a short path read from a model, and whether it still holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from llmquant.tensor import QuantizedTensor


class Unfit(Exception):
    """A model is not what the steps compute; says why."""


@dataclass
class Guards:
    """What a plan read from the modules, to be seen again at every call; the checks run at C speed."""

    spaces: list[dict[str, Any]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    quantized: list[tuple[QuantizedTensor, Tensor, Tensor]] = field(default_factory=list)
    dense: list[tuple[Tensor, int]] = field(default_factory=list)
    hooks: list[dict[int, Any]] = field(
        default_factory=lambda: [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
    )

    def watch(self, space: dict[str, Any], name: str, value: Any) -> None:
        """Expects a name to keep its value, or its absence (None)."""
        self.spaces.append(space)
        self.names.append(name)
        self.values.append(value)

    def child(self, parent: nn.Module, name: str, kind: str) -> nn.Module:
        """A submodule, which must be of transformers' or torch's class of that name, unpatched."""
        module = parent._modules.get(name)
        if type(module).__name__ != kind or not type(module).__module__.startswith(
            ("transformers.models.", "torch.nn.")
        ):
            raise Unfit(f"{name} is a {type(module).__name__}, not a {kind}")
        assert module is not None
        if "forward" in module.__dict__:
            raise Unfit(f"{name}.forward is replaced")
        self.watch(parent._modules, name, module)
        self.watch(module.__dict__, "forward", None)
        self.hooks += [module._forward_hooks, module._forward_pre_hooks]
        return module

    def parameters(self, module: nn.Module, merged: bool) -> None:
        """Expects a module to keep its parameters; where biases were merged, their memory too."""
        for name, parameter in module._parameters.items():
            self.watch(module._parameters, name, parameter)
            if isinstance(parameter, QuantizedTensor):
                self.quantized.append((parameter, parameter.qdata, parameter.scale))
            elif parameter is not None and merged:
                self.dense.append((parameter, parameter.data_ptr()))

    def hold(self) -> bool:
        """Whether everything is as it was."""
        return (
            all(map(is_, map(dict.get, self.spaces, self.names), self.values))
            and all(weight.qdata is qdata and weight.scale is scale for weight, qdata, scale in self.quantized)
            and all(tensor.data_ptr() == address for tensor, address in self.dense)
        )

    def watched(self) -> bool:
        """Whether a hook wants to see what goes through a module. Those of transformers sleep until asked for."""
        return any(self.hooks) and any(
            getattr(hook, "__module__", None) != "transformers.utils.output_capturing"
            for hooks in self.hooks
            for hook in hooks.values()
        )
