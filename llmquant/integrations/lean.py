"""One token through a Llama-like stack in few torch calls, bit for bit what transformers' modules compute.

Decoding a small model costs more in Python than in arithmetic. Where a call is the plain case (one token for each
sequence, an ordinary cache, nobody watching) `LeanForward` runs a short list of steps; all else goes to the model's
own `forward`. A step is one small function, so that a fused kernel can take its place.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from operator import is_
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from llmquant.errors import UnsupportedOpError
from llmquant.integrations.merge import Product, merge, product
from llmquant.kernels import ops
from llmquant.kernels.packed import Packed
from llmquant.tensor import QuantizedTensor

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Prefixes of the classes of transformers whose layers are the steps below."""

SIBLINGS = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
"""The layers of a block that read the same input."""


# --- the steps ------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where the new tokens stand, the same in all layers.

    cos, sin: [1 or B, 1, 1, D], the first half of the sines negated.
    seen: bool [B, 1, 1, T], the positions that may be looked at; None for all.
    """

    cos: Tensor
    sin: Tensor
    seen: Tensor | None


class Norm(NamedTuple):
    """Weight [n] and epsilon of an RMS norm."""

    weight: Tensor
    eps: float


def norm(x: Tensor, by: Norm) -> Tensor:
    """RMS norm over the last dimension; rounded to x's dtype before the weight, as transformers does it."""
    return by.weight * F.rms_norm(x, by.weight.shape, None, by.eps)


def linear(x: Tensor, by: Product) -> Tensor:
    """x [..., K] -> [..., N]."""
    weight, bias = by
    return ops.linear(x, weight, bias) if isinstance(weight, Packed) else F.linear(x, weight, bias)


def project(x: Tensor, by: tuple[Product, ...]) -> Tensor:
    """x [..., K] -> the outputs of all layers side by side."""
    return linear(x, by[0]) if len(by) == 1 else torch.cat([linear(x, one) for one in by], -1)


def rope(x: Tensor, at: Place) -> Tensor:
    """x [B, H, 1, D] turned by its position."""
    return (x * at.cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(at.sin))


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """q [B, H, 1, D], k and v [B, H / groups, T, D] -> [B, 1, H * D]."""
    batch, heads = q.shape[0], k.shape[1]
    if seen is None:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != heads)
    else:  # the queries of a group as rows, as transformers lays them out
        rows = q.reshape(batch, heads, -1, q.shape[-1])
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=seen, scale=scale)
    return out.reshape(batch, 1, -1)


def gate(x: Tensor) -> Tensor:
    """x [..., 2 * width] -> silu of its first half times the second."""
    gates, up = x.chunk(2, -1)
    return F.silu(gates).mul_(up)


@dataclass(slots=True)
class Layer:
    """What one decoder layer needs."""

    input_norm: Norm
    qkv: tuple[Product, ...]
    q_norm: Norm | None
    k_norm: Norm | None
    out: Product
    post_norm: Norm
    gate_up: tuple[Product, ...]
    down: Product
    q_heads: int
    k_heads: int
    head_dim: int
    scale: float

    def __call__(self, x: Tensor, at: Place, cache: DynamicLayer) -> Tensor:
        """x [B, 1, hidden] -> the same; appends to the cache."""
        x = x + linear(self.attention(norm(x, self.input_norm), at, cache), self.out)
        return x + linear(gate(project(norm(x, self.post_norm), self.gate_up)), self.down)

    def attention(self, x: Tensor, at: Place, cache: DynamicLayer) -> Tensor:
        """x [B, 1, hidden] -> the heads' outputs, [B, 1, H * D]."""
        heads = (self.q_heads, self.k_heads)
        qkv = project(x, self.qkv).view(x.shape[0], -1, 1, self.head_dim)
        qk, v = qkv.split_with_sizes((sum(heads), self.k_heads), 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split_with_sizes(heads, 1)
            qk = torch.cat([norm(q, self.q_norm), norm(k, self.k_norm)], 1)
        q, k = rope(qk, at).split_with_sizes(heads, 1)
        keys, values = cache.update(k, v)
        return attend(q, keys, values, at.seen, self.scale)


# --- what the steps take for granted --------------------------------------------------------------------


class Unfit(Exception):
    """A model is not what the steps compute; says why."""


@dataclass
class Guards:
    """What a plan read from the modules, to be seen again at every call; the checks run at C speed."""

    spaces: list[dict[str, Any]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    quantized: list[tuple[QuantizedTensor, Tensor]] = field(default_factory=list)
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
                self.quantized.append((parameter, parameter.qdata))
            elif parameter is not None and merged:
                self.dense.append((parameter, parameter.data_ptr()))

    def hold(self) -> bool:
        """Whether everything is as it was."""
        return (
            all(map(is_, map(dict.get, self.spaces, self.names), self.values))
            and all(weight.qdata is qdata for weight, qdata in self.quantized)
            and all(tensor.data_ptr() == address for tensor, address in self.dense)
        )

    def watched(self) -> bool:
        """Whether a hook wants to see what goes through a module. Those of transformers sleep until asked for."""
        return any(self.hooks) and any(
            getattr(hook, "__module__", None) != "transformers.utils.output_capturing"
            for hooks in self.hooks
            for hook in hooks.values()
        )


@dataclass
class Plan:
    """The layers of a stack, ready to run, and what became of their weights."""

    layers: list[Layer] = field(default_factory=list)
    guards: Guards = field(default_factory=Guards)
    merged: list[tuple[str, ...]] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    final_norm: Norm | None = None


# --- from modules to layers -----------------------------------------------------------------------------


def make_plan(stack: nn.Module) -> Plan:
    """Reads a stack and merges the weights of siblings. Raises `Unfit` before anything is changed or read twice."""
    prefix = type(stack).__name__.removesuffix("Model")
    if prefix not in FAMILIES or not type(stack).__module__.startswith("transformers.models."):
        raise Unfit(f"{type(stack).__name__} is none of {', '.join(f'{name}Model' for name in FAMILIES)}")
    plan = Plan()
    found = [_modules(plan.guards, stack, i, prefix) for i in range(len(stack.layers))]  # type: ignore[arg-type]
    plan.final_norm = _norm(plan.guards, stack, "norm", prefix)
    # Merged tensors must be normal ones: the parameters outlive the call that happens to make them.
    with torch.inference_mode(False), torch.no_grad():
        plan.layers = [_layer(plan, f"layers.{i}", *modules) for i, modules in enumerate(found)]
    return plan


def _modules(guards: Guards, stack: Any, index: int, prefix: str) -> tuple[Any, dict[str, Norm], dict[str, Any]]:
    """One decoder layer's attention, norms and linear layers."""
    layer = guards.child(stack.layers, str(index), f"{prefix}DecoderLayer")
    attention: Any = guards.child(layer, "self_attn", f"{prefix}Attention")
    guards.watch(attention.__dict__, "training", False)  # it alone has a dropout
    mlp: Any = guards.child(layer, "mlp", f"{prefix}MLP")
    if type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        raise Unfit(f"the activation is {type(mlp.act_fn).__name__}, not SiLU")
    if attention.head_dim > 256:
        raise Unfit(f"heads of {attention.head_dim} are wider than 256")
    norms = {name: _norm(guards, layer, name, prefix) for name in ("input_layernorm", "post_attention_layernorm")}
    for name in ("q_norm", "k_norm"):
        if name in attention._modules:
            norms[name] = _norm(guards, attention, name, prefix)
    owners = {"q_proj": attention, "k_proj": attention, "v_proj": attention, "o_proj": attention}
    owners |= {"gate_proj": mlp, "up_proj": mlp, "down_proj": mlp}
    return attention, norms, {name: guards.child(owner, name, "Linear") for name, owner in owners.items()}


def _norm(guards: Guards, parent: nn.Module, name: str, prefix: str) -> Norm:
    module = guards.child(parent, name, f"{prefix}RMSNorm")
    guards.parameters(module, merged=False)
    assert isinstance(module.weight, Tensor)
    return Norm(module.weight, float(module.variance_epsilon))  # type: ignore[arg-type]


def _layer(plan: Plan, path: str, attention: Any, norms: dict[str, Norm], linears: dict[str, nn.Linear]) -> Layer:
    joined = {block: _join(plan, f"{path}.{block}", names, linears) for block, names in SIBLINGS.items()}
    for name in ("o_proj", "down_proj"):
        plan.guards.parameters(linears[name], merged=False)
    return Layer(
        input_norm=norms["input_layernorm"],
        qkv=joined["self_attn"],
        q_norm=norms.get("q_norm"),
        k_norm=norms.get("k_norm"),
        out=product(linears["o_proj"]),
        post_norm=norms["post_attention_layernorm"],
        gate_up=joined["mlp"],
        down=product(linears["down_proj"]),
        q_heads=linears["q_proj"].out_features // attention.head_dim,
        k_heads=linears["k_proj"].out_features // attention.head_dim,
        head_dim=attention.head_dim,
        scale=attention.scaling,
    )


def _join(plan: Plan, path: str, names: tuple[str, ...], linears: dict[str, nn.Linear]) -> tuple[Product, ...]:
    """The siblings as one product, or as several where they cannot be merged."""
    group = [linears[name] for name in names]
    try:
        products: tuple[Product, ...] = (merge(group),)
        plan.merged.append(tuple(f"{path}.{name}" for name in names))
    except UnsupportedOpError as error:
        products = tuple(map(product, group))
        plan.left[f"{path}.{{{','.join(names)}}}"] = error.what
    for one in group:
        plan.guards.parameters(one, merged=len(products) == 1)
    return products


# --- the forward of the stack ---------------------------------------------------------------------------

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class LeanForward:
    """Stands in for a stack's `forward`. Copies and pickles of the model make plans of their own."""

    def __init__(self, stack: nn.Module, plan: Plan | None = None) -> None:
        self._stack = weakref.ref(stack)  # the stack holds this object, and models should die when they are dropped
        self.plan = plan
        self.unfit = False

    def __reduce__(self) -> Any:
        return LeanForward, (self._stack(),)

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        stack: Any = self._stack()
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if (
            not torch.compiler.is_compiling()
            and _plain_call(stack, inputs, input_ids is None, use_cache, kwargs)
            and _plain_cache(past_key_values, len(stack.layers))
            and _plain_mask(attention_mask, past_key_values.get_seq_length() + 1)
            and (plan := self._current(stack)) is not None
        ):
            x = stack.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            if x.dtype in _DTYPES:
                return _decode(plan, stack, x, attention_mask, position_ids, past_key_values)
        return type(stack).forward(
            stack,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def _current(self, stack: nn.Module) -> Plan | None:
        """A plan that fits the modules as they are now, or None."""
        if self.plan is not None and self.plan.guards.watched():
            return None
        if self.plan is None or not self.plan.guards.hold():
            self.renew(stack)
        return self.plan

    def renew(self, stack: nn.Module) -> str | None:
        """Plans anew after the modules changed; says why where that cannot be."""
        if self.unfit:
            return "the model changed"
        try:
            self.plan = make_plan(stack)
        except Unfit as error:
            self.plan, self.unfit = None, True
            return str(error)
        return None


def _decode(
    plan: Plan, stack: Any, x: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: DynamicCache
) -> Any:
    """x [B, 1, hidden] -> the model's output, with the cache one longer."""
    if position_ids is None:
        position_ids = torch.full((1, 1), cache.get_seq_length(), device=x.device)
    cos, sin = stack.rotary_emb(x, position_ids=position_ids)
    half = sin.shape[-1] // 2
    sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
    seen = None if mask is None or mask.all() else mask[:, None, None, :].bool()
    at = Place(cos.unsqueeze(1), sin.unsqueeze(1), seen)
    for layer, slot in zip(plan.layers, cache.layers, strict=True):
        x = layer(x, at, slot)  # type: ignore[arg-type]
    assert plan.final_norm is not None
    return BaseModelOutputWithPast(last_hidden_state=norm(x, plan.final_norm), past_key_values=cache)


def _plain_call(stack: Any, inputs: Tensor | None, embedded: bool, use_cache: bool | None, kwargs: Any) -> bool:
    """Whether one token for each sequence is asked for, and nothing but the last hidden state and the cache."""
    config = stack.config
    return (
        inputs is not None
        and inputs.dim() == 2 + embedded
        and inputs.shape[1] == 1
        and not torch.is_grad_enabled()
        and not stack.training
        and bool(config.use_cache if use_cache is None else use_cache)
        and all(value is None or value is (name == "return_dict") for name, value in kwargs.items())
        and not (config.output_attentions or config.output_hidden_states)
        and (config.return_dict or kwargs.get("return_dict"))
        and config._attn_implementation == "sdpa"
        and getattr(config, "is_causal", True) is not False
        and not torch.is_autocast_enabled(inputs.device.type)
    )


def _plain_cache(cache: Any, count: int) -> bool:
    """Whether a cache keeps everything it has seen, in memory and unquantized."""
    return (
        type(cache) is DynamicCache
        and not cache.offloading
        and len(cache.layers) == count
        and all(
            type(layer) is DynamicLayer
            or (type(layer) is DynamicSlidingWindowLayer and layer.cumulative_length + 1 < layer.sliding_window)
            for layer in cache.layers
        )
    )


def _plain_mask(mask: Tensor | None, length: int) -> bool:
    """Whether a mask says for each of `length` positions whether it is padding."""
    return mask is None or (mask.dim() == 2 and mask.shape[1] == length)
