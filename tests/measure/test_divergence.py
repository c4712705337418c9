import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from llmquant.measure.divergence import ROUNDING, Divergence, by_confidence, delta_p_rms, kl

seeds = st.integers(0, 2**31)
vocabularies = st.integers(2, 300)


def pair(seed: int, vocab: int, scale: float = 4.0, noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(12, vocab, generator=generator) * scale
    return p, p + noise * torch.randn(12, vocab, generator=generator)


@given(seed=seeds, vocab=vocabularies, noise=st.sampled_from([0.03, 1.0, 5.0]))
def test_kl_is_the_oracles(seed: int, vocab: int, noise: float) -> None:
    p, q = pair(seed, vocab, noise=noise)
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    close = dict(rtol=1e-5, atol=ROUNDING)
    torch.testing.assert_close(kl(p, q), F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1), **close)
    torch.testing.assert_close(
        kl(p, q), kl_divergence(Categorical(logits=p.double()), Categorical(logits=q.double())), **close
    )


def test_the_baseline_weighs_the_divergence() -> None:
    """KL((1, 0) || (1/2, 1/2)) is ln 2; the other way round it is about half the gap of 40."""
    sure, unsure = torch.tensor([[40.0, 0.0]]), torch.zeros(1, 2)
    assert float(kl(sure, unsure)) == pytest.approx(math.log(2), abs=1e-6)
    assert float(kl(unsure, sure)) == pytest.approx(20 - math.log(2), abs=1e-5)


@given(seed=seeds, vocab=vocabularies, scale=st.sampled_from([0.1, 4.0, 100.0]))
def test_kl_of_a_model_to_itself_is_zero(seed: int, vocab: int, scale: float) -> None:
    p, _ = pair(seed, vocab, scale)
    assert torch.equal(kl(p, p), torch.zeros(12, dtype=torch.float64))


@given(seed=seeds, vocab=vocabularies, shift=st.integers(-64, 64))
def test_a_constant_added_to_a_row_is_no_divergence(seed: int, vocab: int, shift: int) -> None:
    p, _ = pair(seed, vocab)
    divergence = kl(p, p + shift * torch.arange(12.0)[:, None] / 12)
    assert (divergence >= 0).all() and (divergence < ROUNDING).all()


@given(seed=seeds, vocab=vocabularies, noise=st.sampled_from([1e-6, 1e-4, 1e-2, 1.0, 30.0]))
def test_kl_is_never_negative(seed: int, vocab: int, noise: float) -> None:
    p, q = pair(seed, vocab, noise=noise)
    assert (kl(p, q) >= 0).all()


def test_rounding_at_a_real_vocabulary_is_within_what_is_clamped() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(32, 50_000, generator=generator) * 3
    for noise in (0.0, 1e-6, 1e-5):
        divergence = kl(p, p + noise * torch.randn(p.shape, generator=generator))
        assert (divergence >= 0).all() and divergence.max() < ROUNDING


def test_only_rounding_is_clamped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities that do not sum to one make KL negative: a tiny excess is forgiven, a bug is not."""
    monkeypatch.setattr(torch.Tensor, "log_softmax", lambda tensor, dim: tensor)
    assert float(kl(torch.zeros(1, 1), torch.full((1, 1), 1e-6))) == 0.0
    assert float(kl(torch.zeros(1, 1), torch.full((1, 1), 1e-3))) == pytest.approx(-1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_logits_are_widened_before_anything_is_computed(dtype: torch.dtype) -> None:
    p, q = (logits.to(dtype) for logits in pair(0, 2000))
    assert torch.equal(kl(p, q), kl(p.float(), q.float()))
    assert kl(p, q).dtype == torch.float64


@given(seed=seeds, rows=st.integers(1, 20))
def test_rows_at_a_time_change_nothing(seed: int, rows: int) -> None:
    p, q = pair(seed, 100)
    assert torch.equal(kl(p, q, rows=rows), kl(p, q))


def test_logits_of_two_vocabularies_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        kl(torch.zeros(2, 3), torch.zeros(2, 4))


@given(seed=seeds)
def test_delta_p_is_the_root_mean_square_of_probability_changes(seed: int) -> None:
    p, q = torch.rand(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).clamp(min=1e-9)
    expected = float(np.sqrt(np.mean((p.numpy() - q.numpy()) ** 2)))
    assert delta_p_rms(-p.log(), -q.log()) == pytest.approx(expected)
    assert delta_p_rms(p, p) == 0.0


@given(seed=seeds, count=st.integers(2, 500))
def test_the_summary_is_ordered_and_blind_to_order(seed: int, count: int) -> None:
    values = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).square()
    summary = Divergence.from_kl(values)
    assert 0 <= summary.median <= summary.p90 <= summary.p99 <= summary.max == float(values.max())
    assert summary.mean == pytest.approx(float(values.mean()))
    assert summary.stderr == pytest.approx(float(values.std()) / count**0.5)
    flipped = Divergence.from_kl(values.flip(0))
    assert (flipped.median, flipped.p90, flipped.p99, flipped.max) == (
        summary.median,
        summary.p90,
        summary.p99,
        summary.max,
    )


def test_percentiles_of_a_ramp() -> None:
    summary = Divergence.from_kl(torch.arange(101.0))
    assert (summary.median, summary.p90, summary.p99, summary.max) == (50, 90, 99, 100)


@given(seed=seeds, count=st.integers(1, 300), bins=st.integers(1, 12))
def test_every_token_is_in_the_bin_of_its_confidence(seed: int, count: int, bins: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values, confidence = torch.rand(2, count, dtype=torch.float64, generator=generator)
    found = by_confidence(values, confidence, bins)
    assert [(cell.low, cell.high) for cell in found] == [(i / bins, (i + 1) / bins) for i in range(bins)]
    assert sum(cell.tokens for cell in found) == count
    assert sum(cell.tokens * (cell.mean or 0.0) for cell in found) == pytest.approx(float(values.sum()))
    for index, cell in enumerate(found):
        inside = (confidence * bins).long() == index
        assert cell.tokens == int(inside.sum()) and (cell.mean is None) == (cell.tokens == 0)


def test_the_borders_of_confidence_belong_to_the_bin_above_and_one_to_the_last() -> None:
    found = by_confidence(torch.ones(4), torch.tensor([0.0, 0.5, 0.499, 1.0]), bins=2)
    assert [cell.tokens for cell in found] == [2, 2]


def test_an_infinite_divergence_is_not_averaged_away() -> None:
    values = torch.tensor([0.0, 1.0, 2.0, math.inf])
    summary = Divergence.from_kl(values, torch.tensor([0.1, 0.1, 0.1, 0.95]))
    assert (summary.mean, summary.max, summary.p99) == (math.inf, math.inf, math.inf) and math.isnan(summary.stderr)
    assert summary.median == 1.5 and [cell.mean for cell in summary.by_confidence if cell.tokens] == [1.0, math.inf]
    assert Divergence.from_kl(torch.full((3,), math.inf)).median == math.inf
