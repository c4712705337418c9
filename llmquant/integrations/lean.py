"""Tokens through a Llama-like stack in few torch calls: what transformers computes, bit for bit in 16-bit types.

Decoding a small model costs more in Python than in arithmetic. Where a call is the plain case (one token for each
sequence or a whole prompt, an ordinary cache, nobody watching) `LeanForward` runs a short list of steps; all else goes
to the model's own `forward`. The steps are in `steps.py`, what they take for granted in `guards.py`.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from llmquant.errors import UnsupportedOpError
from llmquant.integrations.guards import Guards, Unfit
from llmquant.integrations.merge import Product, merge, product
from llmquant.integrations.steps import ChainedStack, Layer, Norm, Place, can_attend, can_chain, norm, rooms_of_all

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Prefixes of the classes of transformers whose layers are the steps below."""

SIBLINGS = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
"""The layers of a block that read the same input."""


@dataclass
class Plan:
    """The layers of a stack, ready to run, and what became of their weights."""

    layers: list[Layer] = field(default_factory=list)
    guards: Guards = field(default_factory=Guards)
    merged: list[tuple[str, ...]] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    final_norm: Norm | None = None
    chained: dict[tuple[int, torch.dtype, bool], ChainedStack | None] = field(default_factory=dict)

    def run(self, x: Tensor, at: Place, caches: list[DynamicLayer]) -> Tensor:
        """x [B, L, hidden] -> the normed output; natively where that can be and no other thread is at it."""
        assert self.final_norm is not None
        rooms = rooms_of_all(at, caches) if x.shape[1] == 1 else None
        stack = self._chained(x, rooms is not None) if x.shape[1] == 1 else None
        if stack is not None and stack.lock.acquire(blocking=False):
            try:
                return stack(x, at, caches, rooms)
            finally:
                stack.lock.release()
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, at, cache)
        return norm(x, self.final_norm)

    def _chained(self, x: Tensor, whole: bool) -> ChainedStack | None:
        """The native stack for such a call, built when first needed, or None; `whole` where its caches allow that."""
        assert self.final_norm is not None
        key = (x.shape[0], x.dtype, whole)
        if key not in self.chained:
            fits = can_chain(self.layers, self.final_norm, x.squeeze(1))
            attends = whole and can_attend(self.layers, x.dtype)
            with torch.inference_mode(False), torch.no_grad():  # its buffers outlive this call
                self.chained[key] = ChainedStack(self.layers, self.final_norm, *key[:2], attends) if fits else None
        return self.chained[key]


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
            and _plain_cache(past_key_values, len(stack.layers), inputs.shape[1])  # type: ignore[union-attr]
            and _plain_mask(attention_mask, past_key_values.get_seq_length() + inputs.shape[1])  # type: ignore[union-attr]
            and _plain_prompt(attention_mask, position_ids, past_key_values, inputs.shape[1])  # type: ignore[union-attr]
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
    """x [B, L, hidden] -> the model's output, with the cache L longer."""
    if position_ids is None:
        position_ids = cache.get_seq_length() + torch.arange(x.shape[1], device=x.device).unsqueeze(0)
    cos, sin = stack.rotary_emb(x, position_ids=position_ids)
    half = sin.shape[-1] // 2
    sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
    seen = None if mask is None or mask.all() else mask[:, None, None, :].bool()
    at = Place(cos.unsqueeze(1), sin.unsqueeze(1), seen)
    out = plan.run(x, at, cache.layers)  # type: ignore[arg-type]
    return BaseModelOutputWithPast(last_hidden_state=out, past_key_values=cache)


def _plain_call(stack: Any, inputs: Tensor | None, embedded: bool, use_cache: bool | None, kwargs: Any) -> bool:
    """Whether nothing but the last hidden state and the cache is asked for."""
    config = stack.config
    return (
        inputs is not None
        and inputs.dim() == 2 + embedded
        and inputs.shape[1] > 0
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


def _plain_cache(cache: Any, count: int, tokens: int) -> bool:
    """Whether a cache keeps everything it has seen, in memory and unquantized, and so many tokens more."""
    return (
        type(cache) is DynamicCache
        and not cache.offloading
        and len(cache.layers) == count
        and all(
            type(layer) is DynamicLayer
            or (type(layer) is DynamicSlidingWindowLayer and layer.cumulative_length + tokens < layer.sliding_window)
            for layer in cache.layers
        )
    )


def _plain_mask(mask: Tensor | None, length: int) -> bool:
    """Whether a mask says for each of `length` positions whether it is padding."""
    return mask is None or (mask.dim() == 2 and mask.shape[1] == length)


def _plain_prompt(mask: Tensor | None, position_ids: Tensor | None, cache: DynamicCache, tokens: int) -> bool:
    """Whether several tokens are a whole prompt: nothing before them, no padding, positions from 0 on."""
    if tokens == 1:
        return True
    return (
        cache.get_seq_length() == 0
        and (mask is None or bool(mask.all()))
        and (position_ids is None or bool((position_ids == torch.arange(tokens, device=position_ids.device)).all()))
    )
