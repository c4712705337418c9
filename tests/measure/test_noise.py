import copy

import pytest
import torch
from torch import Tensor, nn

from llmquant.measure.evaluate import evaluate, score
from llmquant.measure.noise import _noise, bfloat16_noise, noise_floor
from llmquant.measure.reference import Reference

from .conftest import MakeModel


def test_the_noise_has_the_size_of_bfloat16s_rounding() -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 100_000)
    step = torch.ldexp(torch.ones_like(values), torch.frexp(values).exponent - 8)
    rounding, noise = (values.bfloat16() - values) / step, _noise(values, torch.Generator().manual_seed(1)) / step
    assert rounding.abs().max() <= 0.5
    assert float(noise.std()) == pytest.approx(float(rounding.std()), rel=0.02) == pytest.approx(12**-0.5, rel=0.02)
    kept = values.bfloat16()
    moved = ((kept.float() + _noise(kept, torch.Generator().manual_seed(2))).bfloat16() != kept).double().mean()
    assert 0.07 < float(moved) < 0.11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_floor_is_as_far_as_bfloat16_is_from_float32(
    make_model: MakeModel, windows: Tensor, dtype: torch.dtype
) -> None:
    exact, rounded = make_model(1).bfloat16().float(), make_model(1, torch.bfloat16)
    with Reference.compute(exact, windows) as reference:
        apart = evaluate(rounded, windows, reference).kl
    model = exact if dtype == torch.float32 else rounded
    with Reference.compute(model, windows) as reference:
        floor = noise_floor(model, windows, reference)
    assert apart and floor.kl and apart.mean / 5 < floor.kl.mean < apart.mean * 5
    assert floor.top1 is not None and 0.9 < floor.top1 <= 1 and floor.baseline is not None


def test_windows_are_met_by_the_same_noise_wherever_they_run(make_model: MakeModel, windows: Tensor) -> None:
    model = make_model(1)
    with Reference.compute(model, windows) as reference, bfloat16_noise(model):
        every, _ = score(model, windows, reference)
    with Reference.compute(model, windows[3:]) as reference, bfloat16_noise(model):
        last, _ = score(model, windows[3:], reference)
        assert last.kl is not None and every.kl is not None and torch.equal(last.kl, every.kl[-len(last.kl) :])
    with Reference.compute(model, windows) as reference, bfloat16_noise(model, seed=1):
        other, _ = score(model, windows, reference)
    assert other.kl is not None and not torch.equal(other.kl, every.kl)


def test_the_model_is_itself_again_afterwards(make_model: MakeModel, windows: Tensor) -> None:
    model = make_model(1).eval()
    untouched = copy.deepcopy(model)
    with torch.inference_mode():
        with pytest.raises(KeyError), bfloat16_noise(model):
            assert not torch.equal(model(windows).logits, untouched(windows).logits)
            raise KeyError
        assert torch.equal(model(windows).logits, untouched(windows).logits)


def test_what_is_no_float_carries_no_noise() -> None:
    model = nn.Sequential(nn.Identity())
    with bfloat16_noise(model):
        assert torch.equal(model(torch.arange(5)), torch.arange(5)) and model("text") == "text"
