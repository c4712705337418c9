"""Mixed precision under a budget: which scheme for which weight, so that a small model stays near the plain one.

Scores (`sensitivity`) go into an exact knapsack over real bytes, and what comes out is measured: it must beat every
uniform recipe of no larger size, or that is the answer. Errors are not additive where they are large, and an optimizer
that trusts its own scores can make a model worse than no optimizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llmquant.algorithms.knapsack import knapsack
from llmquant.config.fqn import FqnToConfig
from llmquant.config.recipe import to_config
from llmquant.errors import BudgetError
from llmquant.measure.reference import Reference
from llmquant.measure.text import BUILTIN
from llmquant.quantize import Progress
from llmquant.tune.bank import Bank, Quantize, bytes_under, plain_quantize
from llmquant.tune.mixture import MIXED, Contender, Mixture
from llmquant.tune.scope import HEAD_FLOOR, Scope, make_scope
from llmquant.tune.scores import Scores, Store
from llmquant.tune.sensitivity import CONTEXT, TOKENS, as_windows, measured_kl, score, store_of

SCHEMES = "int2-g32,int3-g64,int3-g32,int4-g64,int4-g32,int5-g64,int6-g64,int8"


def mixed_precision(
    model: nn.Module, bits: float, schemes: str | Sequence[Any] = SCHEMES, **options: Any
) -> FqnToConfig:
    """The schemes for a model's weights that keep it nearest to itself within a size.

        quantize_(model, mixed_precision(model, 4.25, tokenizer=tokenizer))

    For arguments and errors see `choose_mixture`, which also tells what else was compared and writes a recipe file.
    """
    return choose_mixture(model, bits, schemes, **options).config


def choose_mixture(
    model: nn.Module,
    bits: float,
    schemes: str | Sequence[Any] = SCHEMES,
    data: Any = BUILTIN,
    *,
    tokenizer: Any = None,
    method: str = "fisher",
    fixed: Any = None,
    embeddings: bool = False,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    together: bool = True,
    tokens: int = TOKENS,
    context: int = CONTEXT,
    seed: int = 0,
    validate: bool = True,
    quantize: Quantize = plain_quantize,
    cache: str | Path | bool = True,
    progress: Progress | None = None,
) -> Mixture:
    """Chooses a scheme for each group of weights, so that all fit in a budget and the scores' sum is least.

    The mixture's KL is then measured on the tokens of the scores, and that of every uniform recipe of no larger size
    among the schemes; the least is the answer. Scores and measurements are kept, so another budget costs one
    measurement, and none with `validate=False`.

    Args:
        model: a plain model, in the dtype to compute in. It is as it was afterwards.
        bits: the most bits per quantized weight, with all that is stored beside the codes. Fixed weights count; what
            stays in float, embeddings and tied heads unless `embeddings`, does not.
        schemes: texts or configs, or one text with commas. The output head gets one of six bits or more (or the
            widest), unless `method` is `measured`.
        data, tokenizer, method, fixed, embeddings, filter_fn, together, tokens, context, seed, quantize, cache,
            progress: as for `sensitivity`.
        validate: whether anything is measured.

    Raises:
        BudgetError: if even the smallest schemes exceed the budget. It names the least and the most bits.
        ConfigError, NothingToQuantizeError, AlreadyQuantizedError, BadWeightError, TextError, CalibrationError.
    """
    scope = make_scope(model, schemes, fixed=fixed, embeddings=embeddings, filter_fn=filter_fn, together=together)
    windows = as_windows(data, tokenizer, tokens=tokens, context=context, seed=seed)
    _check_reach(scope, bits, _floor(method))
    bank = Bank(model, quantize)
    scores = score(bank, scope, windows, method, seed=seed, cache=cache, progress=progress)
    mixed = solve(scope, scores, bits)
    compared: tuple[Contender, ...] = (mixed,)
    if validate:
        rivals = [mixed, *(other for other in uniforms(scope) if other.bits <= bits)]
        store = store_of(bank, scope, windows, method, seed, cache)
        compared, scores = _measured(bank, scope, rivals, windows, scores, store, progress)
    best = min(compared, key=lambda contender: (contender.kl or 0.0, contender.bytes))
    return Mixture(as_config(scope, best, fixed), best, compared, scores, bits)


def solve(scope: Scope, scores: Scores, bits: float) -> Contender:
    """The mixture of least score within a budget.

    Raises:
        BudgetError: if there is none.
    """
    floor = _floor(scores.method)
    allowed = [scope.allowed(group, floor) for group in scope.groups]
    options = [[g.options[name] for name in names] for g, names in zip(scores.groups, allowed, strict=True)]
    sizes, costs = ([[getattr(o, field) for o in group] for group in options] for field in ("bytes", "score"))
    room = int(bits * scope.elements / 8) - scope.fixed_bytes
    _check_reach(scope, bits, floor)
    picked = knapsack(sizes, costs, room)
    chosen = {g.name: names[i] for g, names, i in zip(scores.groups, allowed, picked, strict=True)}
    return contender(MIXED, scope, chosen)


def _floor(method: str) -> int:
    return 0 if method == "measured" else HEAD_FLOOR


def uniforms(scope: Scope) -> list[Contender]:
    """One scheme for all open weights, each in turn; the head too, for its cost is then measured."""
    return [contender(name, scope, {group.name: name for group in scope.groups}) for name in scope.schemes]


def contender(name: str, scope: Scope, schemes: Mapping[str, str]) -> Contender:
    """A choice, group -> scheme, with its size."""
    size = sum(bytes_under(candidate, config) for candidate, config in scope.choice(schemes).items())
    return Contender(name, schemes, 8 * size / scope.elements, size)


def as_config(scope: Scope, chosen: Contender, fixed: Any) -> FqnToConfig:
    """Weight -> config of a choice, then what was fixed."""
    given = dict(to_config(fixed).items()) if fixed is not None else {}
    open_weights = {m.name: scope.schemes[chosen.schemes[g.name]] for g in scope.groups for m in g.members}
    return FqnToConfig({**open_weights, **given})


def _check_reach(scope: Scope, bits: float, floor: int) -> None:
    """Raises `BudgetError` if the smallest schemes take more than a budget."""
    sizes = [
        [sum(bytes_under(m, scope.schemes[name]) for m in group.members) for name in scope.allowed(group, floor)]
        for group in scope.groups
    ]
    least, most = (8 * (sum(map(end, sizes)) + scope.fixed_bytes) / scope.elements for end in (min, max))
    if not bits >= least:
        raise BudgetError(
            f"a budget of {bits:g} bits per weight is out of reach: these schemes take [{least:.3f}, {most:.3f}]",
            where="scales, zero points and padding count, and what is fixed",
            hint="more bits, or a smaller scheme among them, for instance int2-g64",
        )


def _measured(
    bank: Bank,
    scope: Scope,
    rivals: Sequence[Contender],
    windows: Tensor,
    scores: Scores,
    store: Store,
    progress: Progress | None,
) -> tuple[tuple[Contender, ...], Scores]:
    """The rivals with their KL, and the scores that remember it. What was measured before is not measured again."""
    missing = [rival for rival in rivals if _key(rival) not in scores.measured]
    if missing:
        with Reference.compute(bank.model, windows) as reference:
            for done, rival in enumerate(missing):
                if progress:
                    progress(done, len(missing), f"measuring {rival.name}")
                kl = measured_kl(bank, scope.choice(rival.schemes), reference)
                scores = scores.with_measured(_key(rival), kl)
                store.write(scores)
        if progress:
            progress(len(missing), len(missing), "")
    return tuple(replace(rival, kl=scores.measured[_key(rival)]) for rival in rivals), scores


def _key(rival: Contender) -> str:
    """What a measurement is kept under: the choice, whatever its name."""
    return hashlib.sha256(json.dumps(rival.schemes, sort_keys=True).encode()).hexdigest()[:16]
