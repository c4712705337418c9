"""`optimize(model)`: faster decoding through plain `generate`, with the same weights, files and tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from llmquant.integrations.guards import Unfit
from llmquant.integrations.lean import LeanForward, make_plan
from llmquant.integrations.merge import separate


@dataclass
class OptimizeReport:
    """What was made faster.

    Attributes:
        layers: decoder layers that decode on the short path.
        merged: groups of linear layers that became one product, by FQN.
        left: what was left alone, and why.
    """

    layers: int = 0
    merged: list[tuple[str, ...]] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.layers} layers decode on the short path, {len(self.merged)} groups of layers merged"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"left alone: {names[0]}{more}: {reason}")
        return "\n".join(lines)


def optimize(model: nn.Module) -> OptimizeReport:
    """Makes decoding of a Llama, Mistral, Qwen2 or Qwen3 of transformers faster, in place; quantized or not.

    Quantized layers that read the same input share one product (their parameters become views, so memory and saved
    files stay as they are), and a call for one token takes a short path. A call that is anything else (a prompt,
    padding, training, hooks, another cache, other attention than sdpa, `torch.compile`) runs the model's own code.
    Call it again after a change of the model's structure. `restore` undoes it.
    """
    stack = _stack(model)
    try:
        lean = stack.__dict__.get("forward")
        if lean is not None and not isinstance(lean, LeanForward):
            raise Unfit("its forward is already replaced")
        if lean is None or lean.plan is None or not lean.plan.guards.hold():
            lean = LeanForward(stack, make_plan(stack))
            stack.forward = lean  # type: ignore[assignment]
    except Unfit as error:
        return OptimizeReport(left={type(model).__name__: str(error)})
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is stack)
    plan = lean.plan
    assert plan is not None
    report = OptimizeReport(
        layers=len(plan.layers),
        merged=[tuple(prefix + name for name in group) for group in plan.merged],
        left={prefix + name: reason for name, reason in plan.left.items()},
    )
    attention = stack.config._attn_implementation  # type: ignore[union-attr]
    if attention != "sdpa":
        report.left[prefix + "layers"] = f"attention is {attention}; the short path waits for sdpa"
    return report


def restore(model: nn.Module) -> None:
    """Undoes `optimize`: the model's own forward, and a tensor of its own for every parameter."""
    stack = _stack(model)
    lean = stack.__dict__.get("forward")
    if not isinstance(lean, LeanForward):
        return
    del stack.forward
    with torch.inference_mode(False), torch.no_grad():
        for group in lean.plan.merged if lean.plan is not None else []:
            for name in group:
                separate(stack.get_submodule(name))  # type: ignore[arg-type]


def _stack(model: nn.Module) -> nn.Module:
    """The decoder layers' owner, below the head."""
    return getattr(model, "base_model", model)
