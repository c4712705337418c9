"""The figures by an independent calculation in numpy, from the logits alone."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmquant.measure import forward
from llmquant.measure.evaluate import evaluate
from llmquant.measure.reference import Reference

from .conftest import VOCAB, Fixed, MakeModel


def oracle(p_logits: np.ndarray, q_logits: np.ndarray, ids: np.ndarray) -> dict[str, float]:
    """All figures from logits [W, T, V] of baseline and candidate and ids [W, T], in float64."""
    p, q = (a[:, :-1].reshape(-1, a.shape[-1]).astype(np.float64) for a in (p_logits, q_logits))
    p, q = (a - a.max(-1, keepdims=True) for a in (p, q))
    p, q = (a - np.log(np.exp(a).sum(-1, keepdims=True)) for a in (p, q))
    token, row = ids[:, 1:].ravel(), np.arange(len(p))
    p_nll, q_nll = -p[row, token], -q[row, token]
    kl = (np.exp(p) * (p - q)).sum(-1)
    change, n = q_nll - p_nll, len(kl)
    confident = np.exp(p.max(-1))
    bins = [kl[(confident >= i / 10) & ((confident < (i + 1) / 10) | (i == 9))] for i in range(10)]
    return {
        "perplexity": np.exp(q_nll.mean()),
        "stderr": np.exp(q_nll.mean()) * q_nll.std(ddof=1) / n**0.5,
        "baseline": np.exp(p_nll.mean()),
        "change": np.exp(change.mean()) - 1,
        "change_stderr": np.exp(change.mean()) * change.std(ddof=1) / n**0.5,
        "kl": kl.mean(),
        "kl_stderr": kl.std(ddof=1) / n**0.5,
        **{f"kl_p{q}": np.percentile(kl, q) for q in (50, 90, 99, 100)},
        **{f"kl_bin{i}": values.mean() for i, values in enumerate(bins) if len(values)},
        "top1": (p.argmax(-1) == q.argmax(-1)).mean(),
        "delta_p_rms": np.sqrt(((np.exp(-q_nll) - np.exp(-p_nll)) ** 2).mean()),
    }


def found(model: Any, baseline: Any, windows: Tensor) -> dict[str, float]:
    with Reference.compute(baseline, windows) as reference:
        result = evaluate(model, windows, reference)
    assert result.kl and result.change and result.baseline and result.top1 is not None and result.delta_p_rms
    bins = {f"kl_bin{i}": cell.mean for i, cell in enumerate(result.kl.by_confidence) if cell.mean is not None}
    return {
        "perplexity": result.perplexity.value,
        "stderr": result.perplexity.stderr,
        "baseline": result.baseline.value,
        "change": result.change.value,
        "change_stderr": result.change.stderr,
        "kl": result.kl.mean,
        "kl_stderr": result.kl.stderr,
        "kl_p50": result.kl.median,
        "kl_p90": result.kl.p90,
        "kl_p99": result.kl.p99,
        "kl_p100": result.kl.max,
        **bins,
        "top1": result.top1,
        "delta_p_rms": result.delta_p_rms,
    }


def logits(model: Any, windows: Tensor) -> np.ndarray:
    with torch.inference_mode():
        return torch.cat([model(window[None], use_cache=False).logits for window in windows]).float().numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_figure_is_the_oracles(make_model: MakeModel, windows: Tensor, dtype: torch.dtype) -> None:
    """1e-6 of each figure where the reference is exact, and of the means where it is in codes.

    A single token's KL, which percentiles and the maximum are, may be off by 5e-5 of it in codes.
    """
    baseline, model = make_model(1, dtype).eval(), make_model(1, dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    windows = windows.repeat(4, 1).flatten().roll(3).view(-1, windows.shape[1])
    expected = oracle(logits(baseline, windows), logits(model, windows), windows.numpy())
    got = found(model, baseline, windows)
    assert got.keys() == expected.keys() and len(got) > 15 and 0.005 < got["kl"] < 1
    for name, value in got.items():
        loose = dtype == torch.float32 and name.startswith(("kl_p", "kl_bin"))
        assert value == pytest.approx(expected[name], rel=5e-5 if loose else 1e-6, abs=1e-6), name


def test_a_large_vocabulary_in_several_blocks_is_the_oracles(monkeypatch: pytest.MonkeyPatch) -> None:
    """50,000 logits with long tails, float32 in codes."""
    monkeypatch.setattr(forward, "BLOCK", 1 << 23)
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(50_000, generator=generator) * 3
    other = row + 0.2 * torch.randn(50_000, generator=generator)
    windows = torch.randint(50_000, (2, 60), generator=generator)
    expected = oracle(*(logits(Fixed(x), windows) for x in (row, other)), windows.numpy())
    got = found(Fixed(other), Fixed(row), windows)
    for name, value in got.items():
        assert value == pytest.approx(expected[name], rel=1e-6, abs=2e-6), name


def test_the_oracle_is_not_blind(make_model: MakeModel, windows: Tensor) -> None:
    """Logits one position late, as a wrong shift would have them, are another set of figures."""
    p, q = (logits(make_model(seed).eval(), windows) for seed in (1, 2))
    right, wrong = oracle(p, q, windows.numpy()), oracle(np.roll(p, 1, 1), np.roll(q, 1, 1), windows.numpy())
    assert abs(right["perplexity"] / wrong["perplexity"] - 1) > 1e-3 and p.shape[-1] == VOCAB
