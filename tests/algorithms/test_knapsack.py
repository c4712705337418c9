"""The knapsack against all choices tried one by one, against a plain table over bytes, and its errors."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmquant.algorithms.knapsack import knapsack
from llmquant.errors import BudgetError

OPTION = st.tuples(st.integers(0, 30), st.integers(-20, 20).map(lambda n: n / 4))  # many ties
PROBLEM = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5)


def cost(problem: list[list[tuple[int, float]]], chosen: tuple[int, ...] | list[int]) -> tuple[float, int]:
    """Score and bytes of a choice."""
    picked = [options[i] for options, i in zip(problem, chosen, strict=True)]
    return math.fsum(score for _, score in picked), sum(size for size, _ in picked)


def solve(problem: list[list[tuple[int, float]]], budget: int) -> list[int]:
    return knapsack([[s for s, _ in o] for o in problem], [[c for _, c in o] for o in problem], budget)


@given(PROBLEM, st.integers(0, 150))
def test_nothing_is_better_than_the_choice(problem: list[list[tuple[int, float]]], budget: int) -> None:
    every = [cost(problem, chosen) for chosen in itertools.product(*(range(len(o)) for o in problem))]
    fitting = [found for found in every if found[1] <= budget]
    if not fitting:
        with pytest.raises(BudgetError):
            solve(problem, budget)
        return
    assert cost(problem, solve(problem, budget)) == min(fitting)  # of equal scores, the fewest bytes


def by_table(sizes: list[list[int]], scores: list[list[float]], budget: int) -> float:
    """The least score by the textbook's table over every number of bytes."""
    best = np.zeros(budget + 1)
    for group_sizes, group_scores in zip(sizes, scores, strict=True):
        trials = np.full((len(group_sizes), budget + 1), np.inf)
        for row, size, score in zip(trials, group_sizes, group_scores, strict=True):
            if size <= budget:
                row[size:] = best[: budget + 1 - size] + score
        best = trials.min(0)
    return float(best[budget])


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.8])
def test_it_agrees_with_the_table_on_many_groups(share: float) -> None:
    random = np.random.default_rng(3)
    sizes = [sorted(random.integers(1, 60, 5).tolist()) for _ in range(60)]
    scores = [sorted(random.lognormal(0, 1.5, 5).tolist(), reverse=True) for _ in range(60)]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    budget = int(least + share * (most - least))
    chosen = knapsack(sizes, scores, budget)
    assert sum(s[i] for s, i in zip(sizes, chosen, strict=True)) <= budget
    total = math.fsum(s[i] for s, i in zip(scores, chosen, strict=True))
    assert total == pytest.approx(by_table(sizes, scores, budget), rel=1e-12)


@pytest.mark.parametrize("bits", [2.6, 3.25, 4.25, 6.0])
def test_a_large_model_with_sizes_to_the_byte_takes_seconds(bits: float) -> None:
    """200 groups of six formats: errors fall by four a bit, and differ from layer to layer and by chance."""
    random = np.random.default_rng(0)
    numel = random.integers(10**6, 10**8, 200)
    per_weight = np.array([2.5, 3.25, 3.5, 4.25, 6.25, 8.05])
    sizes = (numel[:, None] * per_weight / 8).astype(np.int64) + random.integers(0, 999, (200, 6))
    scores = random.lognormal(0, 2, (200, 1)) * 4.0**-per_weight * random.uniform(0.7, 1.4, (200, 6))
    budget = int(bits * numel.sum() / 8)
    start = time.perf_counter()
    chosen = knapsack(sizes.tolist(), scores.tolist(), budget)
    assert time.perf_counter() - start < 10
    rows = np.arange(200)
    assert sizes[rows, chosen].sum() <= budget
    # No exchange of the options of two groups improves on an optimum.
    total, free = scores[rows, chosen].sum(), budget - sizes[rows, chosen].sum()
    assert free < np.diff(sizes, axis=1).max()
    for a, b in zip(random.permutation(200), random.permutation(200), strict=True):
        for i, j in itertools.product(range(6), range(6)) if a != b else ():
            grown = sizes[a, i] - sizes[a, chosen[a]] + sizes[b, j] - sizes[b, chosen[b]]
            gained = scores[a, i] - scores[a, chosen[a]] + scores[b, j] - scores[b, chosen[b]]
            assert grown > free or gained >= -1e-12 * total


def test_a_budget_out_of_reach_names_what_is_in_reach() -> None:
    with pytest.raises(BudgetError, match=r"4,000 bytes is out of reach.*\[4,001, 9,500\]"):
        knapsack([[2000, 5000], [2001, 4500]], [[1, 0], [1, 0]], 4000)


def test_a_budget_with_room_for_all_takes_the_best_not_the_largest() -> None:
    assert knapsack([[1, 2, 9], [3, 4]], [[5.0, 1.0, 2.0], [2.0, 2.0]], 10**6) == [1, 0]
