import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmquant.measure.codes import PLAIN, ROOT8, coding_of, decode, encode


def divergence(p: Tensor, q: Tensor) -> Tensor:
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def rows(seed: int, vocabulary: int, scale: float) -> Tensor:
    return torch.randn(8, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_kept(dtype: torch.dtype) -> None:
    logits = rows(0, 50, 9).to(dtype)
    assert coding_of(dtype) == PLAIN and torch.equal(decode(encode(logits)), logits)


@pytest.mark.parametrize(("vocabulary", "scale"), [(128, 1.0), (1000, 3.0), (50_000, 3.0), (50_000, 6.0)])
def test_codes_are_a_thousandth_of_bfloat16s_noise(vocabulary: int, scale: float) -> None:
    """KL of stored against exact is 1e-11 to 1e-8 nats, and what bfloat16 loses a thousand times that."""
    logits = rows(1, vocabulary, scale)
    own = float(divergence(logits, decode(encode(logits))).mean())
    noise = float(divergence(logits, logits.bfloat16()).mean())
    assert encode(logits).dtype == torch.uint16 and coding_of(logits.dtype) == ROOT8
    assert 1e-11 < own < 1e-8 and own < noise / 500


def test_another_root_or_fewer_steps_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound above is not so wide that anything passes: a linear code of probabilities does not."""
    monkeypatch.setattr("llmquant.measure.codes._ROOT", 1.0)
    logits = rows(1, 50_000, 3.0)
    assert float(divergence(logits, decode(encode(logits))).mean()) > 1e-6


@given(
    seed=st.integers(0, 2**31), shift=st.integers(-1000, 1000), dtype=st.sampled_from([torch.float32, torch.float64])
)
def test_a_row_comes_back_up_to_a_constant(seed: int, shift: int, dtype: torch.dtype) -> None:
    logits = (rows(seed, 300, 4.0) + shift).to(dtype)
    back = decode(encode(logits))
    distance = logits - logits.amax(-1, keepdim=True)
    assert back.dtype == torch.float32 and torch.equal(back.argmax(-1), logits.argmax(-1))
    error = (back - distance).abs() / torch.exp(-distance / 8)
    assert error.max() < 1.05 * 8 / 65535 / 2 + 1e-5  # half a step where it is widest, and float32


def test_the_least_likely_are_not_lost() -> None:
    """Nothing becomes minus infinity; 88 nats below the top is where codes end."""
    back = decode(encode(torch.tensor([[0.0, -50.0, -1e4, torch.finfo(torch.float32).min]])))
    assert back[0, 1] == pytest.approx(-50, abs=0.05)
    assert back[0, 2:].tolist() == pytest.approx([-88.72, -88.72], abs=0.01)
