import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmquant.measure.perplexity import Perplexity, standard_error, token_nll

seeds = st.integers(0, 2**31)


def draw(seed: int, *shape: int, scale: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * scale, torch.randint(shape[-1], shape[:-1], generator=generator)


@given(seed=seeds, length=st.integers(2, 30), vocab=st.integers(2, 200))
def test_nll_is_cross_entropy_in_float64(seed: int, length: int, vocab: int) -> None:
    logits, ids = draw(seed, length, vocab)
    oracle = F.cross_entropy(logits[:-1].double(), ids[1:], reduction="none")
    nll = token_nll(logits, ids)
    assert nll.dtype == torch.float64
    torch.testing.assert_close(nll, oracle, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_widened_before_anything_is_computed(dtype: torch.dtype) -> None:
    logits, ids = draw(0, 50, 3000)
    logits = logits.to(dtype)
    oracle = F.cross_entropy(logits[:-1].double(), ids[1:], reduction="none")
    assert (token_nll(logits, ids) - oracle).abs().max() < 1e-5


@given(seed=seeds, length=st.integers(2, 30), rows=st.integers(1, 40))
def test_rows_at_a_time_change_nothing(seed: int, length: int, rows: int) -> None:
    logits, ids = draw(seed, length, 50)
    assert torch.equal(token_nll(logits, ids, rows=rows), token_nll(logits, ids, rows=length))


def test_windows_are_scored_one_by_one() -> None:
    logits, ids = draw(1, 3, 10, 20)
    batched = token_nll(logits, ids)
    assert batched.shape == (3, 9)
    assert all(torch.equal(batched[window], token_nll(logits[window], ids[window])) for window in range(3))


@given(seed=seeds, length=st.integers(2, 20), vocab=st.integers(2, 5000))
def test_uniform_logits_have_the_perplexity_of_the_vocabulary(seed: int, length: int, vocab: int) -> None:
    _, ids = draw(seed, length, vocab)
    result = Perplexity.from_nll(token_nll(torch.full((length, vocab), 3.25), ids))
    assert result.value == pytest.approx(vocab, rel=1e-5)
    assert result.tokens == length - 1
    assert math.isnan(result.stderr) if length == 2 else result.stderr < 1e-3 * vocab


def test_certain_and_right_has_perplexity_one_certain_and_wrong_is_infinite() -> None:
    ids = torch.arange(10)
    logits = 1e5 * F.one_hot(ids.roll(-1), 10).float()
    assert Perplexity.from_nll(token_nll(logits, ids)).value == 1.0
    assert Perplexity.from_nll(token_nll(-logits, ids)).value == math.inf


def test_pooling_weighs_every_token_alike() -> None:
    nll = torch.rand(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    result = Perplexity.from_nll(nll)
    assert result == Perplexity.from_nll(nll.flatten())
    assert result.value == pytest.approx(math.exp(sum(nll.flatten().tolist()) / 28))


@settings(max_examples=5)
@given(seed=seeds)
def test_the_standard_error_is_the_spread_of_repeated_measurements(seed: int) -> None:
    nll = torch.rand(2000, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
    observed = float(nll.mean(1).exp().std())
    assert 0.75 < Perplexity.from_nll(nll[0]).stderr / observed < 1.3


def test_the_standard_error_shrinks_by_the_root_of_the_count() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    assert standard_error(values.repeat(4)) / standard_error(values) == pytest.approx(0.5, rel=1e-3)
    assert math.isnan(standard_error(values[:1])) and standard_error(torch.ones(5)) == 0
