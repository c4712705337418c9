"""Finds the weights of a model that can be quantized, and says of every other parameter why it cannot.

Modules are recognised by what they are (a linear, an embedding, fused experts), never by where they sit or by the rank
of their parameters. A skeleton on the meta device and the loaded model give the same answer, so a checkpoint can be
planned before a byte of it is read. Transformers' own classes are recognised without importing transformers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import nn


class Role(StrEnum):
    """What a model does with a weight; a tied weight has one role per name."""

    linear = "linear"
    conv1d = "conv1d"
    embedding = "embedding"
    head = "head"
    experts = "experts"
    norm = "norm"  # a matrix that is one by its key, where nothing else is known


@dataclass(frozen=True)
class Candidate:
    """One quantizable weight under all of its names.

    Args:
        fqns: every name of the weight, the canonical one first.
        roles: the role of each name, in the same order.
        shape: the shape to quantize it in: that of the parameter, but for experts that lie one under another in two
            dimensions, which get a dimension of their own.
        transposed: whether the last two dimensions stand as [in, out] instead of [out, in].
        dtype: the dtype as the parameter stands.
    """

    fqns: tuple[str, ...]
    roles: tuple[Role, ...]
    shape: tuple[int, ...]
    transposed: bool
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The canonical name: the one under which the weight is reported and saved."""
        return self.fqns[0]

    @property
    def tied(self) -> bool:
        """Whether the weight has several names."""
        return len(self.fqns) > 1


@dataclass(frozen=True)
class Inventory:
    """All parameters of a model: `candidates` in model order, and for each of the `others` why it is none."""

    candidates: tuple[Candidate, ...]
    others: Mapping[str, str]


def find_candidates(model: nn.Module) -> Inventory:
    """Sort the parameters of `model` into quantizable weights and others.

    A tied weight is a candidate only if every one of its owners can bear it: they share the values.
    """
    uses = _uses(model)
    candidates: list[Candidate] = []
    others: dict[str, str] = {}
    for fqns in _weights(model, uses):
        obstacles = {fqn: why for fqn in fqns if (why := _obstacle(uses[fqn]))}
        if obstacles:
            others |= {fqn: obstacles.get(fqn) or _tied_to_other(obstacles) for fqn in fqns}
        else:
            candidates.append(_candidate(fqns, uses))
    return Inventory(tuple(candidates), {fqn: others[fqn] for fqn in uses if fqn in others})


# -------------------------------------------------------------------------------- names and their owners


@dataclass(frozen=True)
class _Use:
    """One name of a parameter: the module that owns it there, the attribute that holds it, the role it plays.

    `routing` says how it chooses among experts, if it does.
    """

    owner: nn.Module
    attribute: str
    param: nn.Parameter
    role: Role | None
    routing: str | None


def _uses(model: nn.Module) -> dict[str, _Use]:
    """Every name of every parameter, in model order."""
    modules = dict(model.named_modules(remove_duplicate=False))
    declared_head = _declared_head(model)
    uses = {}
    for fqn, param in model.named_parameters(remove_duplicate=False):
        path, _, attribute = fqn.rpartition(".")
        owner = modules[path]
        is_head = owner is declared_head if declared_head is not None else path.rpartition(".")[2] == "lm_head"
        role = _role(owner, attribute, param, is_head)
        uses[fqn] = _Use(owner, attribute, param, role, _routing(modules, path))
    return uses


def _declared_head(model: nn.Module) -> nn.Linear | None:
    """The output embedding that the model names itself, if it does; model code may raise here for lack of one."""
    head = None
    with contextlib.suppress(Exception):
        head = model.get_output_embeddings()  # type: ignore[operator]  # only transformers' models have it
    return head if isinstance(head, nn.Linear) else None


def _weights(model: nn.Module, uses: Mapping[str, _Use]) -> Iterable[tuple[str, ...]]:
    """The names of each weight, canonical one first, in the model order of the canonical names."""
    canonical = _canonical_names(model, uses)
    names: dict[str, list[str]] = {fqn: [fqn] for fqn in uses if canonical[fqn] == fqn}
    for fqn in uses:
        if canonical[fqn] != fqn:
            names[canonical[fqn]].append(fqn)
    return map(tuple, names.values())


def _canonical_names(model: nn.Module, uses: Mapping[str, _Use]) -> dict[str, str]:
    """Name of a parameter -> canonical name of its weight: the first, or the source of a declared tie."""
    first: dict[int, str] = {}
    canonical = {fqn: first.setdefault(id(use.param), fqn) for fqn, use in uses.items()}
    declared: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in declared.items():
        if target in uses and source in uses and _tie_holds(uses[target].param, uses[source].param):
            tied = {canonical[target], canonical[source]}
            leader = canonical[source] if source in declared else source
            canonical |= {fqn: leader for fqn, name in canonical.items() if name in tied}
    return canonical


def _tie_holds(target: nn.Parameter, source: nn.Parameter) -> bool:
    """Whether a declared tie is real: a skeleton may not be tied yet, but a loaded model may have been untied."""
    return target is source or target.is_meta or source.is_meta


# -------------------------------------------------------------------------------- roles and obstacles

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_EXPERTS_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")  # set by `use_experts_implementation`
_ROUTERS = ("Router", "MoEGate", "MoEV1Gate", "TopKGate", "TopKGating")  # how the names of their classes end


def _role(owner: nn.Module, attribute: str, param: nn.Parameter, is_head: bool) -> Role | None:
    """What the owner uses the parameter for, or None if that is not known."""
    raw_roles: Mapping[str, Role] | None = getattr(owner, "raw_roles", None)
    if raw_roles is not None:  # of a model of which only the keys are known
        return raw_roles.get(attribute)
    if flat_experts(owner):
        return Role.experts if param.ndim == 2 else None
    if _is_experts(owner):
        return Role.experts if _stacks_experts(owner, param) and not attribute.endswith("bias") else None
    if attribute != "weight" or param.ndim != 2:
        return None
    if isinstance(owner, nn.Linear):
        return Role.head if is_head else Role.linear
    if isinstance(owner, nn.Embedding):
        return Role.embedding
    return Role.conv1d if _is_conv1d(owner) else None


def _is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's linear with a transposed weight."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_experts(module: nn.Module) -> bool:
    """Whether this module holds the weights of all experts as 3-D parameters."""
    marked = all(hasattr(module, mark) for mark in _EXPERTS_MARKS)
    return marked or (type(module).__name__.endswith("Experts") and bool(_expert_counts(module)))


def _expert_counts(module: nn.Module) -> set[int]:
    """How many experts a module says it has: `num_experts`, `n_shared_experts`, `total_experts` and others."""
    return {value for name, value in vars(module).items() if name.endswith("experts") and isinstance(value, int)}


def _stacks_experts(experts: nn.Module, param: nn.Parameter) -> bool:
    """Whether a parameter is one matrix an expert."""
    counts = _expert_counts(experts)
    return param.ndim == 3 and (not counts or param.shape[0] in counts)


def flat_experts(module: nn.Module) -> int | None:
    """How many experts lie one under another in each parameter of a module, or None for other modules.

    So they lie in DBRX: three parameters [experts * inner, hidden], which its forward views as 3-D ones, so that it
    takes these too. It multiplies by the last, `w2`, as [in, out].
    """
    if not type(module).__name__.endswith("ExpertGLU"):
        return None
    return next(iter(_expert_counts(module)), None)


def _routing(modules: Mapping[str, nn.Module], path: str) -> str | None:
    """How a module, or one that it lies in, chooses among experts; None if it does not.

    Routers are small, and an error in them picks other experts. Most hold a plain parameter, but those of Llama 4 and
    Phi-MoE are linears, and those of AFMoE, DBRX, Gemma 4, JetMoE, LongCat, Switch and others have some inside. The
    gate of a shared expert is known by its name alone.
    """
    if path.endswith("shared_expert_gate"):
        return "the gate of a shared expert"
    while path:
        kind = type(modules[path]).__name__
        if kind.endswith(_ROUTERS):
            return f"{kind}: a router, where a small error picks other experts"
        path = path.rpartition(".")[0]
    return None


def _obstacle(use: _Use) -> str | None:
    """Why a parameter cannot be quantized in this use of it, or None if it can."""
    kind = type(use.owner).__name__
    if hasattr(use.param, "qdata"):
        return "already quantized"
    if use.param.dtype not in _DTYPES:
        return f"stored as {str(use.param.dtype).removeprefix('torch.')}, not as a plain float"
    if use.role is Role.embedding and getattr(use.owner, "max_norm", None) is not None:
        return f"{kind}: max_norm renormalises the weight in place"
    if use.role is not None:
        return use.routing
    if use.attribute.endswith("bias"):
        return "a bias"
    if "norm" in kind.lower():
        return "a norm"
    if use.param.ndim < 2:
        return f"{use.param.ndim}-D"
    if hasattr(use.owner, "raw_roles"):
        return f"{use.param.ndim}-D, and by its key alone only a matrix is a weight"
    return use.routing or f"{kind}: not a linear, embedding or expert weight"


def _tied_to_other(obstacles: Mapping[str, str]) -> str:
    fqn, why = next(iter(obstacles.items()))
    return f"tied to {fqn} ({why})"


# -------------------------------------------------------------------------------- candidates


def _candidate(fqns: tuple[str, ...], uses: Mapping[str, _Use]) -> Candidate:
    param = uses[fqns[0]].param
    roles = tuple(role for fqn in fqns if (role := uses[fqn].role))
    assert len(roles) == len(fqns), "a name without a role has an obstacle"
    use = uses[fqns[0]]
    return Candidate(fqns, roles, _shape(use), _is_transposed(use), param.dtype)


def _shape(use: _Use) -> tuple[int, ...]:
    count = flat_experts(use.owner)
    return tuple(use.param.shape if count is None else (count, use.param.shape[0] // count, use.param.shape[1]))


def _is_transposed(use: _Use) -> bool:
    if flat_experts(use.owner):
        return use.attribute == "w2"
    if use.role is Role.experts:
        return _has_transposed_experts(use.owner)
    return use.role is Role.conv1d


def _has_transposed_experts(experts: nn.Module) -> bool:
    """Whether expert weights stand as [expert, in, out].

    Llama 4 stores them so without saying so; then the shapes tell, for `down_proj` reads half of what `gate_up_proj`
    writes, and no pair of shapes fits both readings.
    """
    if (declared := getattr(experts, "is_transposed", None)) is not None:
        return bool(declared)
    gate_up, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    if not (isinstance(gate_up, nn.Parameter) and isinstance(down, nn.Parameter) and gate_up.ndim == down.ndim == 3):
        return False
    return gate_up.shape[1:] == (down.shape[2], 2 * down.shape[1])
