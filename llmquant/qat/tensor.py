"""The weight that a module sees while it runs: what it will be once quantized, and what gradients go to.

Whatever is done to it is done to both. Structure (`w[i]`, `w.T`, `w.view(...)`) gives such a pair again. A product has
the value that the quantized weight gives, bit for bit, activations in codes included; its gradient is that of the same
product of the fake-quantized operands. So training meets exactly the model that it ends as, whatever formats and
operations come, and nothing has to be said here about either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmquant.kernels import registry
from llmquant.qat.straight import fake_quantized_input, fake_quantized_weight, straight_through
from llmquant.tensor import QuantizedTensor


class FakeQuantized(torch.Tensor):
    """A weight in both forms, of one shape."""

    _source: Tensor
    _quantize: Callable[[Tensor], QuantizedTensor]

    @classmethod
    def later(cls, weight: Tensor, quantize: Callable[[Tensor], QuantizedTensor]) -> FakeQuantized:
        """The pair of a plain weight, made when it is first read."""
        made = weight.as_subclass(cls)
        made._source, made._quantize = weight, quantize
        return made

    @classmethod
    def of(cls, learning: Tensor, quantized: QuantizedTensor) -> FakeQuantized:
        """The pair of these two."""
        made = learning.as_subclass(cls)
        made.__dict__.update(learning=learning, quantized=quantized)
        return made

    @functools.cached_property
    def quantized(self) -> QuantizedTensor:
        """The weight as `quantize_` makes it."""
        return self._quantize(self._source)

    @functools.cached_property
    def learning(self) -> Tensor:
        """The plain tensor of fake-quantized values, whose gradient reaches the parameter."""
        with torch.enable_grad():
            return fake_quantized_weight(self._source, self.quantized)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # What draws random numbers inside draws the same for both forms: the state is as before afterwards.
        same_draws = torch.random.fork_rng([], enabled=func in _DRAWING)
        with torch.no_grad(), registry.force("reference"), same_draws:
            exact = func(*_each(_quantized, args), **_each(_quantized, kwargs))
        if not _holds_tensors(exact) or (not _holds_weights(exact) and not _learns(args, kwargs)):
            return exact
        return _joined(func(*_learning_inputs(func, args), **_each(_learning, kwargs)), exact)


def _joined(learning: Any, exact: Any) -> Any:
    """The pair of what both forms gave, or, where that is no weight any more, the one's value with the other's
    gradient."""
    if isinstance(exact, QuantizedTensor):
        return FakeQuantized.of(learning, exact)
    if isinstance(exact, Tensor):
        return straight_through(learning, exact)
    return type(exact)(_joined(a, b) for a, b in zip(learning, exact, strict=True))


def _each(change: Callable[[Any], Any], values: Any) -> Any:
    """The same nest of lists, tuples and mappings with other leaves."""
    if isinstance(values, dict):
        return {key: _each(change, value) for key, value in values.items()}
    if type(values) in (list, tuple):
        return type(values)(_each(change, value) for value in values)
    return change(values)


def _quantized(value: Any) -> Any:
    return value.quantized if isinstance(value, FakeQuantized) else value


def _learning(value: Any) -> Any:
    return value.learning if isinstance(value, FakeQuantized) else value


def _holds_tensors(values: Any) -> bool:
    return isinstance(values[0] if type(values) in (list, tuple) and values else values, Tensor)


def _holds_weights(values: Any) -> bool:
    return isinstance(values[0] if isinstance(values, (list, tuple)) else values, QuantizedTensor)


def _learns(*values: Any) -> bool:
    """Whether autograd would take note of a function of these."""
    if not torch.is_grad_enabled():
        return False
    tensors: list[Tensor] = []
    _each(lambda value: tensors.append(_learning(value)) if isinstance(value, Tensor) else None, values)
    return any(tensor.requires_grad for tensor in tensors)


_DRAWING = {F.multi_head_attention_forward}  # dropout inside of a function that takes weights


# --- activations ----------------------------------------------------------------------------------------

_PRODUCTS = {F.linear, torch.einsum, Tensor.__matmul__, Tensor.__rmatmul__}
_PRODUCTS |= {getattr(place, name) for place in (torch, Tensor) for name in ("matmul", "mm", "bmm", "addmm", "baddbmm")}


def _learning_inputs(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with plain weights and, in a product, the input in front of the weight as its codes stand for it.

    So the gradient of a weight meets the inputs that the product met. Of products written otherwise (einsum over
    another dimension than the input's last, the weight on the left) it meets the inputs as they came.
    """
    found = list(_each(_learning, args))
    places = [i for i, arg in enumerate(args) if isinstance(arg, FakeQuantized)]
    if func in _PRODUCTS and len(places) == 1 and places[0] > 0 and isinstance(args[places[0] - 1], Tensor):
        before, weight = places[0] - 1, args[places[0]].quantized
        sums_along_codes = weight.meta.transposed == (func is not F.linear)
        if weight.meta.activation is not None and sums_along_codes and found[before].shape[-1] == weight.meta.columns:
            found[before] = fake_quantized_input(found[before], weight.meta.activation, weight.static_scale)
    return tuple(found)
