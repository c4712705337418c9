"""The operators `torch.ops.llmquant.*`: schema, checks, fake and gradient of each. Backends only compute.

All are differentiable in the weight's scale and, where zero points are real numbers (see `Packed`), in these: whatever
backend ran forward, the reference computes those gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmquant.formats import get_format
from llmquant.kernels import cpu, reference, registry
from llmquant.kernels.packed import Packed
from llmquant.primitives import dynamic
from llmquant.primitives.blocks import block_counts
from llmquant.primitives.dynamic import (
    ALL_TOKENS,
    FLOAT8,
    INT8,
    Activation,
    StaticScale,
    dequantize_activation,
    quantize_activation,
)

_PACKED = "Tensor qdata, Tensor scale, Tensor? zero_point, str format, int[2] block, SymInt columns"

LIBRARY = torch.library.Library("llmquant", "DEF")
LIBRARY.define(f"linear(Tensor x, {_PACKED}, Tensor? bias=None) -> Tensor")
LIBRARY.define(
    f"linear_int8(Tensor x, {_PACKED}, int activation_group, bool activation_asymmetric, Tensor? bias=None) -> Tensor"
)
LIBRARY.define(
    f"linear_int8_static(Tensor x, {_PACKED}, Tensor act_scale, Tensor? act_zero_point, Tensor? bias=None) -> Tensor"
)
LIBRARY.define(f"linear_float8(Tensor x, {_PACKED}, int activation_group, Tensor? bias=None) -> Tensor")
LIBRARY.define(f"linear_float8_static(Tensor x, {_PACKED}, Tensor act_scale, Tensor? bias=None) -> Tensor")
LIBRARY.define('fake_quantize(Tensor x, int group, bool asymmetric, str dtype, str scale_rule="") -> Tensor')
LIBRARY.define(f"matmul(Tensor x, {_PACKED}) -> Tensor")
LIBRARY.define(f"embedding(Tensor indices, {_PACKED}, ScalarType dtype) -> Tensor")


def linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N] in x's dtype. Differentiable in x and bias."""
    if _nobody_watches(x, weight, bias):
        return _linear(x, weight, bias)
    return torch.ops.llmquant.linear(x, *weight.widened(), bias)


def linear_int8(
    x: Tensor, weight: Packed, activation: Activation, bias: Tensor | None = None, static: StaticScale | None = None
) -> Tensor:
    """`linear` of x in int8 codes (see `primitives.dynamic`); `static` only of a static activation.

    The gradient of x is that of `linear`: straight through the rounding; those of scale and zero point meet x as its
    codes stand for it."""
    if _nobody_watches(x, weight, bias):
        return _linear_int8(x, weight, activation, bias, static)
    _check_static("linear_int8", activation, static)
    if static is not None:
        return torch.ops.llmquant.linear_int8_static(x, *weight.widened(), *static, bias)
    return torch.ops.llmquant.linear_int8(x, *weight.widened(), activation.group, activation.asymmetric, bias)


def linear_float8(
    x: Tensor, weight: Packed, activation: Activation, bias: Tensor | None = None, static: StaticScale | None = None
) -> Tensor:
    """`linear` of x in float8 codes (see `primitives.dynamic`), with `static` and gradients as in `linear_int8`."""
    if _nobody_watches(x, weight, bias):
        return _linear_float8(x, weight, activation, bias, static)
    _check_static("linear_float8", activation, static)
    if static is not None:
        return torch.ops.llmquant.linear_float8_static(x, *weight.widened(), static.scale, bias)
    return torch.ops.llmquant.linear_float8(x, *weight.widened(), activation.group, bias)


def linear_as(
    x: Tensor,
    weight: Packed,
    activation: Activation | None,
    bias: Tensor | None = None,
    static: StaticScale | None = None,
) -> Tensor:
    """`linear` of x as the weight asks for it: as it is, in codes of its dtype, or as what such codes mean."""
    if activation is None:
        return linear(x, weight, bias)
    if activation.dtype in (INT8, FLOAT8):
        product = linear_int8 if activation.dtype == INT8 else linear_float8
        return product(x, weight, activation, bias, static)
    return linear(fake_quantize(x, activation), weight, bias)


def fake_quantize(x: Tensor, activation: Activation) -> Tensor:
    """x [..., K] -> what its codes stand for, in x's dtype (see `primitives.dynamic`); its gradient is theirs.

    Not for static activations."""
    if _nobody_watches(x):
        return _fake_quantize(x, activation)
    _check_static("fake_quantize", activation, None)
    return torch.ops.llmquant.fake_quantize(
        x, activation.group, activation.asymmetric, activation.dtype, activation.scale_rule
    )


def matmul(x: Tensor, weight: Packed) -> Tensor:
    """x [..., N], weight [N, K] -> [..., K] in x's dtype. Differentiable in x."""
    return torch.ops.llmquant.matmul(x, *weight.widened())


def embedding(indices: Tensor, weight: Packed, dtype: torch.dtype) -> Tensor:
    """indices [...] int32 or int64, weight [N, K] -> [..., K] in `dtype`."""
    if _nobody_watches(indices, weight, None):
        return _embedding(indices, weight, dtype)
    return torch.ops.llmquant.embedding(indices, *weight.widened(), dtype)


def _nobody_watches(x: Tensor, weight: Packed | None = None, bias: Tensor | None = None) -> bool:
    """Whether a call may go straight to the backend: plain tensors, and no autograd, tracer, transform or profiler
    that wants to see an operator. Going through torch's dispatcher would cost several microseconds a call."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and (x.is_cpu or x.is_cuda)
        and not (torch.is_grad_enabled() and _learns(x, weight, bias))
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.autograd.profiler._is_profiler_enabled
        and torch.autograd.forward_ad._current_level < 0
    )


def _learns(x: Tensor, weight: Packed | None, bias: Tensor | None) -> bool:
    """Whether autograd has to see the operator."""
    if x.requires_grad or (bias is not None and bias.requires_grad):
        return True
    return weight is not None and (
        weight.scale.requires_grad or (weight.zero_point is not None and weight.zero_point.requires_grad)
    )


def check_packed(weight: Packed) -> None:
    """Raises `RuntimeError` where the tensors of a packed matrix do not fit each other."""
    if "checked" in weight.__dict__:
        return
    fmt = get_format(weight.format)
    across, along = block_counts(weight.rows, weight.columns, weight.block)
    _check_tensor("qdata", weight.qdata, (weight.rows, fmt.row_bytes(weight.columns)), torch.uint8, weight)
    _check_tensor("scale", weight.scale, (across, along), weight.scale.dtype, weight)
    if weight.zero_point is not None and weight.has_real_zeros:
        _check_tensor("zero_point", weight.zero_point, (across, along), weight.zero_point.dtype, weight)
    elif weight.zero_point is not None:
        _check_tensor("zero_point", weight.zero_point, (across, fmt.row_bytes(along)), torch.uint8, weight)
    weight.__dict__["checked"] = True


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, int], dtype: torch.dtype, weight: Packed) -> None:
    # A plain comparison first: this runs before every product.
    if tensor.shape != shape or tensor.dtype != dtype:
        raise RuntimeError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}; {weight.rows} x {weight.columns} weights of "
            f"{weight.format} in blocks of {weight.block[0]} x {weight.block[1]} need {dtype} {shape}"
        )


def _check_float_input(name: str, x: Tensor, width: int) -> None:
    if not x.is_floating_point():
        raise RuntimeError(f"llmquant::{name} needs a floating input, not {x.dtype}")
    if x.dim() < 1 or x.shape[-1] != width:
        raise RuntimeError(f"llmquant::{name}: input {tuple(x.shape)} does not end in {width}")


def _check_device(name: str, x: Tensor, weight: Packed) -> None:
    if x.device != weight.qdata.device:  # kernels would read addresses of another memory
        raise RuntimeError(f"llmquant::{name}: the input lies on {x.device}, the weight on {weight.qdata.device}")


def _check_linear(name: str, x: Tensor, weight: Packed, bias: Tensor | None) -> None:
    check_packed(weight)
    _check_float_input(name, x, weight.columns)
    _check_device(name, x, weight)
    if bias is not None and bias.shape != (weight.rows,):
        raise RuntimeError(f"llmquant::{name}: bias {tuple(bias.shape)} does not fit {weight.rows} rows")


def _linear_op(x: Tensor, *args: Any) -> Tensor:
    return _linear(x, Packed.passing(*args[:6]), args[6] if len(args) > 6 else None)


def _linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    _check_linear("linear", x, weight, bias)
    return registry.backend(weight).linear(x, weight, bias)


def _linear_int8_op(x: Tensor, *args: Any) -> Tensor:
    return _linear_int8(x, Packed.passing(*args[:6]), Activation(*args[6:8]), args[8] if len(args) > 8 else None)


def _linear_int8_static_op(x: Tensor, *args: Any) -> Tensor:
    static = StaticScale(*args[6:8])
    weight, bias = Packed.passing(*args[:6]), args[8] if len(args) > 8 else None
    return _linear_int8(x, weight, _static(static), bias, static)


def _linear_int8(
    x: Tensor, weight: Packed, activation: Activation, bias: Tensor | None, static: StaticScale | None = None
) -> Tensor:
    _check_linear("linear_int8", x, weight, bias)
    if activation.dtype != INT8:
        raise RuntimeError(f"llmquant::linear_int8 takes no activations in {activation.dtype}")
    _check_static("linear_int8", activation, static)
    return registry.backend(weight).linear_int8(x, weight, activation, bias, static)


def _static(static: StaticScale, dtype: str = INT8) -> Activation:
    """The activation that brings these scales along."""
    return Activation(ALL_TOKENS, static.zero_point is not None, dtype, static=True)


def _check_static(name: str, activation: Activation, static: StaticScale | None) -> None:
    """A static activation has one scale, and one zero point if it is asymmetric; all others have none."""
    if static is None and not activation.static:
        return
    wanted = [(torch.float32, 1), (torch.int8, 1) if activation.asymmetric else None]
    found = [None if t is None else (t.dtype, t.numel()) for t in static or (None, None)]
    if found != wanted or not activation.static:
        raise RuntimeError(f"llmquant::{name}: {activation.scheme} does not go with scale and zero point {found}")


def _linear_float8_op(x: Tensor, *args: Any) -> Tensor:
    activation = Activation(args[6], dtype=FLOAT8)
    return _linear_float8(x, Packed.passing(*args[:6]), activation, args[7] if len(args) > 7 else None)


def _linear_float8_static_op(x: Tensor, *args: Any) -> Tensor:
    static = StaticScale(args[6])
    weight, bias = Packed.passing(*args[:6]), args[7] if len(args) > 7 else None
    return _linear_float8(x, weight, _static(static, FLOAT8), bias, static)


def _linear_float8(
    x: Tensor, weight: Packed, activation: Activation, bias: Tensor | None, static: StaticScale | None = None
) -> Tensor:
    _check_linear("linear_float8", x, weight, bias)
    if activation.dtype != FLOAT8:
        raise RuntimeError(f"llmquant::linear_float8 takes no activations in {activation.dtype}")
    _check_static("linear_float8", activation, static)
    return registry.backend(weight).linear_float8(x, weight, activation, bias, static)


def _fake_quantize_op(x: Tensor, *args: Any) -> Tensor:
    return _fake_quantize(x, Activation(*args))


def _fake_quantize(x: Tensor, activation: Activation) -> Tensor:
    if not x.is_floating_point() or x.dim() < 1:
        raise RuntimeError(f"llmquant::fake_quantize needs floating tokens, not {x.dtype} {tuple(x.shape)}")
    _check_static("fake_quantize", activation, None)
    return cpu.fake_quantize(x, activation)


def _matmul(x: Tensor, *args: Any) -> Tensor:
    weight = Packed.passing(*args)
    check_packed(weight)
    _check_float_input("matmul", x, weight.rows)
    _check_device("matmul", x, weight)
    return registry.backend(weight).matmul(x, weight)


def _embedding_op(indices: Tensor, *args: Any) -> Tensor:
    return _embedding(indices, Packed.passing(*args[:6]), args[6])


def _embedding(indices: Tensor, weight: Packed, dtype: torch.dtype) -> Tensor:
    check_packed(weight)
    torch._check(
        indices.dtype in (torch.int32, torch.int64),
        lambda: f"llmquant::embedding: indices must be int32 or int64, not {indices.dtype}",
    )
    _check_device("embedding", indices, weight)
    return registry.backend(weight).embedding(indices, weight, dtype)


def _linear_fake(x: Tensor, qdata: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], qdata.shape[0])


def _fake_quantize_fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _matmul_fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], Packed(*args).columns)


def _embedding_fake(indices: Tensor, *args: Any) -> Tensor:
    return indices.new_empty(*indices.shape, Packed(*args[:6]).columns, dtype=args[6])


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps the weight, which every operator takes second, and what the gradients of its parameters need."""
    ctx.weight = Packed.passing(*inputs[1:7])
    ctx.count = len(inputs)
    ctx.trains = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    if ctx.trains:  # scale and zero point only so that autograd notices if they change before backward
        ctx.save_for_backward(inputs[0], *inputs[2:4])


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save_weight(ctx, inputs, output)
    ctx.bias_dtype = inputs[-1].dtype if isinstance(inputs[-1], Tensor) else None  # it comes last, or is left out
    ctx.activation = ctx.static = None


def _save_linear_int8(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save_linear(ctx, inputs, output)
    ctx.activation = Activation(*inputs[7:9])


def _save_linear_int8_static(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save_linear(ctx, inputs, output)
    ctx.static = StaticScale(*inputs[7:9])
    ctx.activation = _static(ctx.static)


def _save_linear_float8(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save_linear(ctx, inputs, output)
    ctx.activation = Activation(inputs[7], dtype=FLOAT8)


def _save_linear_float8_static(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save_linear(ctx, inputs, output)
    ctx.static = StaticScale(inputs[7])
    ctx.activation = _static(ctx.static, FLOAT8)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = matmul(grad, ctx.weight) if ctx.needs_input_grad[0] else None
    trained = None
    if ctx.trains:
        x = ctx.saved_tensors[0]
        if ctx.activation is not None:
            x = _seen(x, ctx.activation, ctx.static)
        trained = reference.qparams_gradients(grad, x, ctx.weight)
    grads = _in_order(ctx, grad_x, trained)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[-1]:
        grads[-1] = grad.sum_to_size(grad.shape[-1]).to(ctx.bias_dtype)
    return tuple(grads)


def _seen(x: Tensor, activation: Activation, static: StaticScale | None) -> Tensor:
    """x as products meet it."""
    if activation.dtype == FLOAT8:
        return dynamic.fake_quantize(x, activation, static)
    return dequantize_activation(quantize_activation(x, activation, static), activation)


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, *[None] * (len(ctx.needs_input_grad) - 1)


def _matmul_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = linear(grad, ctx.weight) if ctx.needs_input_grad[0] else None
    trained = reference.qparams_gradients(ctx.saved_tensors[0], grad, ctx.weight) if ctx.trains else None
    return tuple(_in_order(ctx, grad_x, trained))


def _embedding_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    trained = reference.embedding_gradients(ctx.saved_tensors[0], grad, ctx.weight) if ctx.trains else None
    return tuple(_in_order(ctx, None, trained))


def _in_order(ctx: Any, grad_x: Tensor | None, trained: tuple[Tensor, Tensor] | None) -> list[Tensor | None]:
    """One gradient an argument of the operator: x, qdata, scale, zero point, and None for all others."""
    grads: list[Tensor | None] = [grad_x, *[None] * (ctx.count - 1)]
    for index, parameter in ((2, ctx.weight.scale), (3, ctx.weight.zero_point)):
        if trained is not None and ctx.needs_input_grad[index]:
            grads[index] = trained[index - 2].to(parameter.dtype)
    return grads


for _name, _impl, _fake in (
    ("linear", _linear_op, _linear_fake),
    ("linear_int8", _linear_int8_op, _linear_fake),
    ("linear_int8_static", _linear_int8_static_op, _linear_fake),
    ("linear_float8", _linear_float8_op, _linear_fake),
    ("linear_float8_static", _linear_float8_static_op, _linear_fake),
    ("fake_quantize", _fake_quantize_op, _fake_quantize_fake),
    ("matmul", _matmul, _matmul_fake),
    ("embedding", _embedding_op, _embedding_fake),
):
    LIBRARY.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"llmquant::{_name}", _fake, lib=LIBRARY)
for _name, _save, _backward in (
    ("linear", _save_linear, _linear_backward),
    ("linear_int8", _save_linear_int8, _linear_backward),
    ("linear_int8_static", _save_linear_int8_static, _linear_backward),
    ("linear_float8", _save_linear_float8, _linear_backward),
    ("linear_float8_static", _save_linear_float8_static, _linear_backward),
    ("matmul", _save_weight, _matmul_backward),
    ("embedding", _save_weight, _embedding_backward),
):
    torch.library.register_autograd(f"llmquant::{_name}", _backward, setup_context=_save, lib=LIBRARY)
torch.library.register_autograd("llmquant::fake_quantize", _straight_through, lib=LIBRARY)
