"""The arithmetic and the fairness of the benchmark; never the times themselves."""

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmquant import quantize_weight
from llmquant.config.schemes import parse_scheme
from llmquant.kernels import cpu
from llmquant.measure import latency
from llmquant.measure.latency import Contestant, Result, Rotation, Timing, read_method, take_turns, time_linears

SHAPE = (48, 64)


def weight(scheme: str) -> Tensor:
    config = parse_scheme(scheme)
    assert config is not None
    return quantize_weight(torch.randn(SHAPE), config)


def contestants() -> list[Contestant]:
    plain = [Contestant(str(d), torch.randn(SHAPE).to(d), d, "torch") for d in (torch.float32, torch.bfloat16)]
    return [*plain, *(Contestant(s, weight(s), torch.float32, "k") for s in ("int8", "int4-g32", "float8"))]


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return time_linears(contestants(), [1, 3], Rotation(0.02), rounds=2)


def test_every_weight_is_timed_at_every_m_in_order(results: list[Result]) -> None:
    names = [c.name for c in contestants()]
    assert [(r.tokens, r.weight) for r in results] == [(m, name) for m in (1, 3) for name in names]
    assert {r.shape for r in results} == {SHAPE}
    assert [r.dense for r in results if r.tokens == 1] == [True, True, False, False, False]


def test_the_columns_agree_with_each_other(results: list[Result]) -> None:
    for r in results:
        seconds = {other.weight: other.seconds for other in results if other.tokens == r.tokens}
        assert set(r.times_faster) == {"torch.float32", "torch.bfloat16"}
        for name, ratio in r.times_faster.items():
            assert ratio == pytest.approx(seconds[name] / r.seconds)
        assert r.bandwidth == pytest.approx(r.bytes / r.seconds)
        assert r.share_of_read == pytest.approx(r.bandwidth / r.read_bandwidth)
        assert 0 < r.seconds <= r.median
        assert r.times_faster.get(r.weight, 1) == 1


def test_from_memory_all_weights_of_one_m_are_held_against_one_read(results: list[Result]) -> None:
    assert len({r.read_bandwidth for r in results if r.tokens == 1}) == 1


def test_bytes_are_those_that_the_weight_takes(results: list[Result]) -> None:
    sizes = {r.weight: r.bytes for r in results}
    assert sizes["torch.float32"] == 2 * sizes["torch.bfloat16"] == 4 * 48 * 64
    assert sizes["int4-g32"] == 48 * 64 // 2 + 48 * 2 * 2  # codes and float16 scales


@pytest.mark.parametrize("scheme", ["int4-g32", "float8"])
@pytest.mark.parametrize(("megabytes", "least"), [(None, 2), (0.001, 2), (0.1, 20)])
def test_copies_have_memory_of_their_own(scheme: str, megabytes: float | None, least: int) -> None:
    original = weight(scheme)
    copies = Rotation(megabytes).copies(original)
    assert len(copies) >= least
    if megabytes and len(copies) > 2:
        assert (len(copies) - 1) * original.nbytes < megabytes * 1e6 <= len(copies) * original.nbytes
    spans = sorted((t.data_ptr(), t.nbytes) for copy in copies for _, t in copy.parts())  # type: ignore[attr-defined]
    assert all(start + size <= following for (start, size), (following, _) in itertools.pairwise(spans))
    assert all(torch.equal(copy.dequantize(), original.dequantize()) for copy in copies)  # type: ignore[attr-defined]


def test_in_cache_the_read_has_the_bytes_of_both_weights() -> None:
    original = weight("int4-g32")
    assert Rotation(None).bytes_to_read(original) == 2 * original.nbytes
    assert Rotation(0.1).bytes_to_read(original) == 100_000
    assert Rotation(0.000001).bytes_to_read(original) == 8


def test_a_turn_uses_every_copy_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(latency.F, "linear", lambda x, w: seen.append(id(w)))
    rounds = 3
    found = time_linears(contestants()[2:3], [1], Rotation(0.02), rounds)
    assert found[0].copies > 2 and len(set(seen)) == found[0].copies
    assert len(seen) == found[0].copies * (rounds + 1)  # one round does not count


def test_contestants_take_turns() -> None:
    calls: list[str] = []
    runs: dict[str, Callable[[], object]] = {name: lambda name=name: calls.append(name) for name in "ab"}
    done: list[int] = []
    take_turns(runs, 2, progress=done.append)
    assert calls == ["a", "b"] * 3 and done == [0, 1, 2]
    calls.clear()
    take_turns(runs, 1, warm=True)
    assert calls == ["a", "a", "b", "b"] * 2


def test_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 0.5, 1.0, 4.0, 5.0, 7.0, 8.0, 18.0])  # turns of 0.5, 3, 2 and 10 seconds
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(ticks))
    assert take_turns({"a": lambda: None}, 3) == {"a": Timing(minimum=2.0, median=3.0)}


def test_progress_reaches_its_total_and_names_m() -> None:
    reports: list[tuple[int, int, str]] = []
    time_linears(contestants()[:1], [1, 3], Rotation(None), 2, lambda *report: reports.append(report))
    assert reports[-1] == (4, 4, "M = 3") and [done for done, *_ in reports] == [0, 1, 2, 2, 3, 4]


def test_reading_falls_back_to_torch_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.ones(64, dtype=torch.uint8)
    monkeypatch.setattr(cpu, "missing", lambda: "not built")
    name, read = read_method()
    assert name == "torch sum" and read(data) == 8 * 0x0101010101010101
    monkeypatch.setattr(cpu, "missing", lambda: None)
    monkeypatch.setattr(cpu, "read_bytes", lambda tensor: 7, raising=False)
    name, read = read_method()
    assert name == "prefetching read" and read(data) == 7


def test_results_are_plain_values(results: list[Result]) -> None:
    for value in dataclasses.asdict(results[0]).values():
        assert isinstance(value, (int, float, str, bool, tuple, dict))
