"""A cache that grows in place is, to everybody who looks, the one that copies."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from itertools import cycle

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from llmquant.errors import LlmQuantError
from llmquant.integrations import growing
from llmquant.integrations.growing import ROOM, append

HEADS, WIDTH = 2, 4


def states(rows: int, tokens: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """New keys and values, as views that a model cuts out of one tensor."""
    k, v = torch.randn(rows, tokens, 2 * HEADS, WIDTH, dtype=dtype).transpose(1, 2).chunk(2, 1)
    return k, v


def filled(rows: int = 2, tokens: int = 5, dtype: torch.dtype = torch.float32) -> DynamicLayer:
    cache = DynamicLayer()
    cache.update(*states(rows, tokens, dtype))
    return cache


def assert_same(a: DynamicLayer, b: DynamicLayer) -> None:
    assert a.get_seq_length() == b.get_seq_length()
    for name in ("keys", "values"):
        assert getattr(a, name).dtype == getattr(b, name).dtype and torch.equal(getattr(a, name), getattr(b, name))


class Pair:
    """A cache that appends and one that updates, and everything anybody was ever handed by the first."""

    def __init__(self, cache: DynamicLayer) -> None:
        self.grown = cache
        self.plain = DynamicLayer()
        self.plain.update(cache.keys.clone(), cache.values.clone())
        self.kept: list[tuple[Tensor, Tensor]] = []

    def grow(self, tokens: int) -> Pair:
        for _ in range(tokens):
            k, v = states(len(self.plain.keys), dtype=self.plain.keys.dtype)
            got = append(self.grown, k, v)
            wanted = self.plain.update(k, v)
            assert all(map(torch.equal, got, wanted))
            assert got[0] is self.grown.keys and got[1] is self.grown.values
            assert_same(self.grown, self.plain)
            self.kept += [(t, t.clone()) for t in got] if len(self.kept) < 80 else []
        return self

    def both(self, change: Callable[[DynamicLayer], object]) -> Pair:
        change(self.grown), change(self.plain)
        assert_same(self.grown, self.plain)
        return self

    def check(self) -> None:
        assert_same(self.grown, self.plain)
        assert all(torch.equal(tensor, before) for tensor, before in self.kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_it_is_update_for_many_tokens(rows: int, dtype: torch.dtype) -> None:
    Pair(filled(rows, dtype=dtype)).grow(2 * ROOM + 9).check()


def test_most_tokens_copy_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    larger = growing._larger
    monkeypatch.setattr(growing, "_larger", lambda seen: copies.append(seen.shape[-2]) or larger(seen))
    Pair(filled()).grow(2 * ROOM + 1)
    assert copies == [length for length in (5, 5 + ROOM, 5 + 2 * ROOM) for _ in "kv"]


CHANGES: dict[str, Callable[[DynamicLayer], object]] = {
    "crop": lambda cache: cache.crop(-3),
    "reorder": lambda cache: cache.reorder_cache(torch.arange(len(cache.keys)).flip(0)),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([len(cache.keys) - 1, 0])),
    "chunk": lambda cache: cache.update(*torch.ones(2, len(cache.keys), HEADS, 3, WIDTH)),
    "swap": lambda cache: (setattr(cache, "keys", cache.values), setattr(cache, "values", -cache.keys)),
    "keys only": lambda cache: setattr(cache, "keys", cache.keys * 2),
    "values only": lambda cache: setattr(cache, "values", cache.values * 2),
    "in place": lambda cache: (cache.keys.mul_(2), cache.values.neg_()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_it_goes_on_after_a_change(name: str) -> None:
    pair = Pair(filled()).grow(5)
    if name == "in place":
        pair.kept.clear()
    pair.both(CHANGES[name]).grow(5).check()


def test_it_goes_on_after_any_changes() -> None:
    names = cycle([name for name in CHANGES if name not in ("in place", "repeat")])
    pair = Pair(filled())
    for i in torch.randint(1, 8, (40,)).tolist():
        for _ in range(i):
            change = CHANGES[next(names)]
        pair.both(change).grow(i + 3)
    pair.check()


MISFITS: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "one row for two": (torch.float32, (1, HEADS, 1, WIDTH)),
    "one head for all": (torch.float32, (2, 1, 1, WIDTH)),
    "one number for a head": (torch.float32, (2, HEADS, 1, 1)),
    "no batch": (torch.float32, (HEADS, 1, WIDTH)),
    "two tokens": (torch.float32, (2, HEADS, 2, WIDTH)),
    "no token": (torch.float32, (2, HEADS, 0, WIDTH)),
    "a narrower dtype": (torch.bfloat16, (2, HEADS, 1, WIDTH)),
    "a wider dtype": (torch.float64, (2, HEADS, 1, WIDTH)),
}


@pytest.mark.parametrize("grown", [0, 3])
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_refused_and_changes_nothing(name: str, side: str, grown: int) -> None:
    dtype, shape = MISFITS[name]
    pair, (k, v) = Pair(filled()).grow(grown), states(2)
    bad = torch.ones(shape, dtype=dtype)
    with pytest.raises(
        LlmQuantError, match=rf"{side} .* no next token of a cache \[2, {HEADS}, {5 + grown}, {WIDTH}\]"
    ):
        append(pair.grown, *((bad, v) if side == "keys" else (k, bad)))
    pair.check()
    pair.grow(3).check()


# ---------------------------------------------------------------------------------- several caches


def _shared(cache: DynamicLayer) -> DynamicLayer:
    other = filled()
    other.keys, other.values = cache.keys, cache.values
    return other


SECONDS: dict[str, Callable[[DynamicLayer], DynamicLayer]] = {
    "the same tensors": _shared,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("how", SECONDS)
@pytest.mark.parametrize("before", [0, 7, ROOM])
def test_two_caches_with_one_past_have_futures_of_their_own(how: str, before: int) -> None:
    first = Pair(filled()).grow(before)
    second = Pair(SECONDS[how](first.grown))
    for _ in range(4):
        first.grow(2), second.grow(3)
        first.check(), second.check()


def test_a_copied_cache_of_a_model_goes_on_alone() -> None:
    cache = DynamicCache()
    for layer in range(2):
        cache.update(*states(1, 5), layer)
    first = [Pair(layer).grow(3) for layer in cache.layers]
    second = [Pair(layer) for layer in copy.deepcopy(cache).layers]
    for pair in (*first, *second, *first):
        pair.grow(4)
    for pair in first + second:
        pair.check()


def test_a_way_back_is_no_way_to_overwrite() -> None:
    """Somebody keeps the tensors, lets the cache grow and puts them back."""
    cache = filled()
    append(cache, *states(2))
    past = cache.keys, cache.values
    futures = []
    for _ in range(3):
        cache.keys, cache.values = past
        got = append(cache, *states(2))
        futures.append([(t, t.clone()) for t in got])
    assert all(torch.equal(t, before) for future in futures for t, before in future)


# ---------------------------------------------------------------------------------- modes and other caches

MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "neither": contextlib.nullcontext}


@pytest.mark.parametrize("made", MODES)
@pytest.mark.parametrize("grown", MODES)
@pytest.mark.parametrize("continued", MODES)
def test_every_mode_goes_on_from_every_other(made: str, grown: str, continued: str) -> None:
    with MODES[made]():
        pair = Pair(filled())
    with MODES[grown]():
        pair.grow(3)
    with MODES[continued]():
        pair.grow(ROOM + 3).check()


def test_an_empty_cache_is_filled_as_update_fills_it() -> None:
    empty, reset = DynamicLayer(), filled()
    append(reset, *states(2))
    reset.reset()
    for cache in (empty, reset):
        k, v = states(3)
        assert all(map(torch.equal, append(cache, k, v), (k, v)))
        Pair(cache).grow(3).check()


def test_a_sliding_window_slides() -> None:
    grown, plain = (DynamicSlidingWindowLayer(sliding_window=8) for _ in "ab")
    for _ in range(20):
        k, v = states(2)
        assert all(map(torch.equal, append(grown, k, v), plain.update(k, v)))
        assert_same(grown, plain)
    assert grown.keys.shape[-2] < 8


def test_a_class_of_somebody_elses_is_asked_itself() -> None:
    class Counting(DynamicLayer):
        calls = 0

        def update(self, *args: Tensor, **kwargs: object) -> tuple[Tensor, Tensor]:
            self.calls += 1
            return super().update(*args, **kwargs)

    cache = Counting()
    for _ in range(3):
        append(cache, *states(1))
    assert cache.calls == 3
