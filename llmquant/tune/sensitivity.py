"""How much each group of weights suffers in each scheme: by second order, by measuring, or without data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.calibrate.collect import as_batches
from llmquant.config.base import QuantConfig
from llmquant.config.candidates import Candidate
from llmquant.errors import CalibrationError, ConfigError
from llmquant.measure.evaluate import evaluate
from llmquant.measure.reference import Reference
from llmquant.measure.text import BUILTIN
from llmquant.quantize import Progress
from llmquant.tune.bank import Bank, Quantize, bytes_under, plain_quantize
from llmquant.tune.fisher import fisher_scores
from llmquant.tune.groups import Group
from llmquant.tune.scope import Scope, make_scope
from llmquant.tune.scores import GroupScores, Option, Scores, Store, cache_folder, fingerprint

TOKENS, CONTEXT = 4096, 1024
Table = dict[tuple[str, str], float]  # (group, scheme) -> score


def sensitivity(
    model: nn.Module,
    schemes: str | Sequence[Any],
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
    quantize: Quantize = plain_quantize,
    cache: str | Path | bool = True,
    progress: Progress | None = None,
) -> Scores:
    """Scores each group of weights alone in each scheme, the others plain.

    Args:
        model: a plain model, in the dtype to compute in. It is as it was afterwards.
        schemes, fixed, embeddings, filter_fn, together: see `scope.make_scope`. Fixed weights are plain here, too.
        data: a text's name or path (see `calibration_windows`), or token ids [W, T] int64. Texts need the tokenizer.
        tokenizer: that of the model.
        method: `fisher`: nats a token to second order, all schemes in one pass (see `fisher`); `measured`: the KL
            itself, one run a group and scheme, for small models; `data-free`: relative squared error of the weights
            times the 0.2th power of their number, which only ranks.
        tokens, context, seed: of `calibration_windows`.
        quantize: what makes a quantized weight; by default the config's algorithm, or the format's own where that needs
            a calibration run. Scores with another are not kept.
        cache: folder where scores are kept and looked for; true is the user's own (see `cache_folder`), false none.
        progress: called with steps done, in all, and what is at work; each phase counts anew.

    Raises:
        ConfigError, NothingToQuantizeError, AlreadyQuantizedError, BadWeightError, TextError, CalibrationError.
    """
    scope = make_scope(model, schemes, fixed=fixed, embeddings=embeddings, filter_fn=filter_fn, together=together)
    windows = as_windows(data, tokenizer, tokens=tokens, context=context, seed=seed)
    return score(Bank(model, quantize), scope, windows, method, seed=seed, cache=cache, progress=progress)


def score(
    bank: Bank,
    scope: Scope,
    windows: Tensor,
    method: str = "fisher",
    *,
    seed: int = 0,
    cache: str | Path | bool = False,
    progress: Progress | None = None,
) -> Scores:
    """The scores of a scope on windows [W, T]: kept ones where there are any, else new ones, which are then kept."""
    if method not in METHODS_OF_SCORING:
        raise ConfigError(f"no method {method!r} to score by", hint=f"one of {', '.join(METHODS_OF_SCORING)}")
    store = store_of(bank, scope, windows, method, seed, cache)
    if found := store.read():
        return found
    _quantize_all(bank, scope, progress)
    table = METHODS_OF_SCORING[method](bank, scope, windows, seed, progress)
    groups = tuple(_group_scores(scope, group, table) for group in scope.groups)
    scores = Scores(method, windows.numel() if method != "data-free" else 0, groups, {})
    store.write(scores)
    return scores


def store_of(bank: Bank, scope: Scope, windows: Tensor, method: str, seed: int, cache: str | Path | bool) -> Store:
    """Where these scores are kept: under a hash of the model, the schemes, the groups, the tokens and the method."""
    if cache is False or not bank.is_plain:
        return Store(None, "")
    facts = [
        [config.to_dict() for config in scope.schemes.values()],
        [[group.name, [member.name for member in group.members]] for group in scope.groups],
        [[candidate.name, config.to_dict()] for candidate, config in scope.fixed.items()],
        [method, seed],
        windows,
    ]
    return Store(cache_folder() if cache is True else Path(cache), fingerprint(bank.model, *facts))


def as_windows(data: Any, tokenizer: Any, **windows: int) -> Tensor:
    """Token ids [W, T] as they are, or windows of a text."""
    if not isinstance(data, Tensor):
        data = torch.cat([b for b in as_batches(data, tokenizer, windows) if isinstance(b, Tensor)])
    if data.dim() != 2 or not data.numel():
        raise CalibrationError("scores need token ids [windows, tokens]", where=f"shape {tuple(data.shape)}")
    return data


def _quantize_all(bank: Bank, scope: Scope, progress: Progress | None) -> None:
    """Every copy that will be wanted, which is the long part."""
    wanted = [(m, scope.schemes[s]) for g in scope.groups for s in scope.schemes for m in g.members]
    for done, (candidate, config) in enumerate(wanted):
        if progress:
            progress(done, len(wanted), f"quantizing {candidate.name}: {config}")
        bank.get(candidate, config)


def _group_scores(scope: Scope, group: Group, table: Table) -> GroupScores:
    options = {
        name: Option(sum(bytes_under(m, config) for m in group.members), table[group.name, name])
        for name, config in scope.schemes.items()
    }
    return GroupScores(group.name, tuple(m.name for m in group.members), group.elements, options)


# --- three ways to score ----------------------------------------------------------------------------------


def _by_fisher(bank: Bank, scope: Scope, windows: Tensor, seed: int, progress: Progress | None) -> Table:
    """The members of a group add up: errors of different layers are taken as unrelated."""
    options = {candidate: list(scope.schemes.values()) for candidate in scope.open()}
    found = fisher_scores(bank, options, windows, seed=seed, progress=progress)
    return {
        (group.name, name): sum(found[member, config] for member in group.members)
        for group in scope.groups
        for name, config in scope.schemes.items()
    }


def _by_measuring(bank: Bank, scope: Scope, windows: Tensor, seed: int, progress: Progress | None) -> Table:
    found: Table = {}
    pairs = [(group, name) for group in scope.groups for name in scope.schemes]
    with Reference.compute(bank.model, windows) as reference:
        for done, (group, name) in enumerate(pairs):
            if progress:
                progress(done, len(pairs), f"{group.name}: {name}")
            choice = dict.fromkeys(group.members, scope.schemes[name])
            found[group.name, name] = measured_kl(bank, choice, reference)
    if progress:
        progress(len(pairs), len(pairs), "")
    return found


def measured_kl(bank: Bank, choice: Mapping[Candidate, QuantConfig], reference: Reference) -> float:
    """Mean KL, in nats a token, of the model with some weights quantized from the plain one."""
    with bank.installed(choice) as model:
        found = evaluate(model, reference.windows, reference).kl
    assert found is not None
    return found.mean


def _without_data(bank: Bank, scope: Scope, windows: Tensor, seed: int, progress: Progress | None) -> Table:
    return {
        (group.name, name): sum(_data_free(bank, member, config) for member in group.members)
        for group in scope.groups
        for name, config in scope.schemes.items()
    }


def _data_free(bank: Bank, candidate: Candidate, config: QuantConfig) -> float:
    """|W' - W|^2 / |W|^2 * numel^0.2."""
    plain = bank.weight(candidate).float()
    error = bank.get(candidate, config).dequantize(torch.float32) - plain
    energy = float(plain.square().sum())
    return float(error.square().sum()) / energy * plain.numel() ** 0.2 if energy else 0.0


METHODS_OF_SCORING: dict[str, Callable[[Bank, Scope, Tensor, int, Progress | None], Table]] = {
    "fisher": _by_fisher,
    "measured": _by_measuring,
    "data-free": _without_data,
}
