"""What a study tries on every model: recipes by algorithms, and budgets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmquant.config.base import QuantConfig
from llmquant.config.fqn import FqnToConfig
from llmquant.config.recipe import Changes, Recipe, change_algorithm, split_algorithm, to_config, to_pairs, to_recipe
from llmquant.convert.budget import Budget
from llmquant.errors import LlmQuantError, StudyError
from llmquant.study.spec import RecipeEntry, Study
from llmquant.tune.budget import SCHEMES
from llmquant.tune.scope import parse_schemes

UNDER_BUDGET = "int4-g32"
"""What is assumed of a weight before a budget has chosen: where scales of channels are sought by a scheme's errors."""


@dataclass(frozen=True)
class Candidate:
    """One way to quantize a model.

    Attributes:
        label: unique within the study.
        recipe: the recipe as the study names it; None for a budget.
        algorithm: the algorithm, or those of the recipe.
        what: what each weight gets, and what is done to the plain model first.
        bits, schemes: of a budget.
    """

    label: str
    recipe: str | None
    algorithm: str | None
    what: Recipe
    bits: float | None = None
    schemes: tuple[str, ...] = field(default=())

    def budget(self, cache: Any = True) -> Budget | None:
        """The budget, if it is one."""
        if self.bits is None:
            return None
        return Budget(self.bits, self.schemes, algorithm=split_algorithm(self.algorithm)[1], cache=cache)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, for another process."""
        changes = self.what.changes
        return {
            "label": self.label,
            "recipe": self.recipe,
            "algorithm": self.algorithm,
            "config": to_pairs(self.what.config),
            "rotate": changes.rotate,
            "migrate": changes.migrate,
            "bits": self.bits,
            "schemes": list(self.schemes),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Candidate:
        """The inverse of `to_dict`."""
        what = Recipe(
            content["label"], "", to_config(content["config"]), Changes(content["rotate"], content["migrate"])
        )
        names = {key: content[key] for key in ("label", "recipe", "algorithm", "bits")}
        return cls(**names, what=what, schemes=tuple(content["schemes"]))


def find_candidates(study: Study) -> tuple[list[Candidate], list[str]]:
    """The candidates of a study, and a sentence for each pair that is left out because a format lacks the algorithm.

    Raises:
        StudyError: for a recipe or scheme that cannot be read, one that none of the algorithms fits, an algorithm that
            fits nothing, and two candidates with one label.
    """
    found: list[Candidate] = []
    left_out: list[str] = []
    for index, entry in enumerate(study.recipes):
        with_place = _Placed(f"recipes[{index}]")
        found += with_place(_of_recipe, entry, study.algorithms, left_out)
    for index, bits in enumerate(study.bits):
        found += _Placed(f"bits[{index}]")(_of_budget, bits, study.schemes, study.algorithms, left_out)
    _check_labels(found)
    return found, left_out


@dataclass(frozen=True)
class _Placed:
    """Calls something, and says of its errors which place of the study they are about."""

    place: str

    def __call__(self, make: Any, *args: Any) -> list[Candidate]:
        try:
            return list(make(*args))
        except StudyError:
            raise
        except LlmQuantError as error:
            where = f"{self.place}{f', {error.where}' if error.where else ''}"
            raise StudyError(error.what, where=where, hint=error.hint) from error


def _of_recipe(entry: RecipeEntry, common: Sequence[str], left_out: list[str]) -> Iterator[Candidate]:
    recipe, label = to_recipe(entry.recipe), entry.label or entry.recipe
    algorithms = common if entry.algorithms is None else entry.algorithms
    if not algorithms:
        yield Candidate(label, entry.recipe, own_algorithm(recipe), recipe)
        return
    fitting = _fitting(label, algorithms, left_out, lambda name: change_algorithm(recipe, name))
    for algorithm, changed in fitting:
        one = entry.label is not None and len(algorithms) == 1
        yield Candidate(label if one else f"{label} {algorithm}", entry.recipe, algorithm, changed)


def _of_budget(
    bits: float, schemes: Sequence[str], algorithms: Sequence[str], left_out: list[str]
) -> Iterator[Candidate]:
    label, base = f"{bits:g} bits", to_recipe(UNDER_BUDGET)
    names = canonical_schemes(schemes or SCHEMES.split(","))
    if not algorithms:
        yield Candidate(label, None, None, base, bits, names)
        return

    def changed(name: str) -> Recipe:
        migrate, own = split_algorithm(name)
        Budget(bits, names, algorithm=own).options()  # whose error says that none has it
        return Recipe(base.name, "", base.config, Changes(None, migrate))

    for algorithm, recipe in _fitting(label, algorithms, left_out, changed):
        yield Candidate(f"{label} {algorithm}", None, algorithm, recipe, bits, names)


def _fitting(label: str, algorithms: Sequence[str], left_out: list[str], make: Any) -> list[tuple[str, Recipe]]:
    """The algorithms that a recipe can have, with the recipe of each."""
    found, missing = [], []
    for algorithm in algorithms:
        try:
            found.append((algorithm, make(algorithm)))
        except LlmQuantError as error:
            missing.append(f"{label} with {algorithm}: {error.what}")
    if not found:
        raise StudyError(
            f"none of the algorithms fits: {'; '.join(missing)}",
            where=label,
            hint="give it algorithms of its own: {recipe: " + label + ", algorithms: [search]}",
        )
    left_out += missing
    return found


def own_algorithm(recipe: Recipe) -> str:
    """The algorithms that a recipe names itself, with what is done to channels before."""
    names = {c.algorithm: None for _, c in recipe.config.items() if isinstance(c, QuantConfig)}
    return "+".join(filter(None, [recipe.changes.migrate, *names]))


def canonical_schemes(schemes: Sequence[str]) -> tuple[str, ...]:
    """Schemes in one order, however they were listed. Raises `ConfigError` for what is none, or is there twice."""
    return tuple(sorted(parse_schemes(list(schemes))))


def resolved(config: FqnToConfig, skeleton: Any) -> dict[str, Any]:
    """FQN -> what the weight gets, as plain JSON: equal for all recipes that mean the same for a model.

    Raises what `make_plan` raises.
    """
    from llmquant.quantize import make_plan

    return {candidate.name: chosen.to_dict() for candidate, chosen in make_plan(skeleton, config).chosen}


def _check_labels(candidates: Sequence[Candidate]) -> None:
    labels = [candidate.label for candidate in candidates]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise StudyError(
            f"two candidates are called {twice[0]!r}",
            where="recipes",
            hint="leave one out, or give it a label: {recipe: ..., label: ...}",
        )
