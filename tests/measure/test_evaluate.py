import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from llmquant.errors import LlmQuantError
from llmquant.measure.divergence import kl
from llmquant.measure.evaluate import Evaluation, Protocol, evaluate
from llmquant.measure.perplexity import Change
from llmquant.measure.reference import Reference
from llmquant.measure.text import Text

from .conftest import CONTEXT, VOCAB, Fixed, MakeModel

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def numbers(evaluation: Evaluation) -> Evaluation:
    return replace(evaluation, seconds=0.0)


def compared(model: nn.Module, baseline: nn.Module, windows: Tensor) -> Evaluation:
    """The model against a reference of the baseline."""
    with Reference.compute(baseline, windows) as reference:
        return evaluate(model, windows, reference)


def test_perplexity_is_exp_of_the_loss_transformers_computes(make_model: MakeModel, windows: Tensor) -> None:
    model = make_model(1).eval()
    with torch.no_grad():
        losses = [float(model(window[None], labels=window[None]).loss) for window in windows]
    result = evaluate(model, windows).perplexity
    assert result.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert result.tokens == len(windows) * (CONTEXT - 1)
    assert abs(result.value / VOCAB - 1) > 0.02, "a model this close to uniform would hide a shift by one token"


def test_without_a_baseline_there_is_nothing_to_compare(make_model: MakeModel, windows: Tensor) -> None:
    result = evaluate(make_model(1), windows)
    assert (result.baseline, result.kl, result.top1, result.delta_p_rms) == (None,) * 4
    assert 0 < result.seconds < 60


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_against_itself_has_not_moved(make_model: MakeModel, windows: Tensor, dtype: torch.dtype) -> None:
    model = make_model(1, dtype)
    result = compared(model, model, windows)
    assert result.kl is not None and (result.kl.max == 0.0 if dtype.itemsize == 2 else result.kl.max < 1e-6)
    assert (result.top1, result.delta_p_rms, result.change) == (1.0, 0.0, Change(0.0, 0.0))
    assert result.baseline == result.perplexity == evaluate(model, windows).perplexity


def test_the_figures_are_those_of_the_scored_positions(make_model: MakeModel, windows: Tensor) -> None:
    model, baseline = make_model(1), make_model(2)
    result = compared(model, baseline, windows)
    with torch.inference_mode():
        p, q = (torch.cat([m(window[None]).logits[0, :-1] for window in windows]) for m in (baseline, model))
    target = windows[:, 1:].flatten()[:, None]
    change = (q.double().softmax(-1) - p.double().softmax(-1)).gather(1, target)
    assert result.kl is not None and result.kl.mean == pytest.approx(float(kl(p, q).mean()), rel=1e-6)
    assert result.kl.max == pytest.approx(float(kl(p, q).max()), rel=1e-5)
    assert result.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert result.delta_p_rms == pytest.approx(float(change.square().mean().sqrt()), rel=1e-5)
    assert result.baseline == evaluate(baseline, windows).perplexity


def test_more_noise_in_the_weights_is_more_divergence(make_model: MakeModel, windows: Tensor) -> None:
    baseline, divergences, agreements = make_model(1), [], []
    for noise in (0.001, 0.01, 0.1):
        model = copy.deepcopy(baseline)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn_like(parameter))
        result = compared(model, baseline, windows)
        assert result.kl is not None and result.top1 is not None
        divergences.append(result.kl.mean)
        agreements.append(result.top1)
    assert 0 < divergences[0] < divergences[1] / 10 < divergences[2] / 100
    assert 1 >= agreements[0] >= agreements[1] >= agreements[2]


def test_one_reference_serves_many_candidates(make_model: MakeModel, windows: Tensor) -> None:
    models = [make_model(seed) for seed in (1, 2)]
    with Reference.compute(make_model(3), windows) as reference:
        first = [numbers(evaluate(model, windows, reference)) for model in models]
        again = [numbers(evaluate(model, windows, reference)) for model in reversed(models)]
    assert first == again[::-1] and first[0] != first[1]


def test_a_reference_for_other_windows_is_refused(make_model: MakeModel, windows: Tensor) -> None:
    model = make_model(1)
    with Reference.compute(model, windows) as reference:
        for other in (windows[:-1], windows[:, :-1], windows.flip(0)):
            with pytest.raises(LlmQuantError, match="other windows"):
                evaluate(model, other, reference)


def test_a_reference_does_not_follow_its_callers_windows(make_model: MakeModel, windows: Tensor) -> None:
    with Reference.compute(make_model(1), windows) as reference:
        windows.zero_()
        with pytest.raises(LlmQuantError, match="other windows"):
            evaluate(make_model(1), windows, reference)


def test_another_vocabulary_is_refused(windows: Tensor) -> None:
    with pytest.raises(LlmQuantError, match="differ in shape") as caught:
        compared(Fixed(torch.zeros(VOCAB)), Fixed(torch.zeros(VOCAB + 1)), windows)
    assert str(VOCAB) in str(caught.value.where) and str(VOCAB + 1) in str(caught.value.where)


def test_every_pass_is_lean(windows: Tensor) -> None:
    """One call per window, no cache, eval mode, no autograd; the model is left as it was."""
    model = Fixed(torch.zeros(VOCAB)).train()
    evaluate(model, windows)
    assert model.calls == [{"use_cache": False, "training": False, "inference": True}] * len(windows)
    assert model.training and not torch.is_inference_mode_enabled()


def test_progress_counts_windows(make_model: MakeModel, windows: Tensor) -> None:
    expected = [(done, len(windows)) for done in range(1, len(windows) + 1)]
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))

    model = make_model(1)
    with Reference.compute(model, windows, progress) as reference:
        assert seen == expected
        evaluate(model, windows, reference, progress)
    assert seen == expected * 2


def test_the_protocol_tells_the_true_numbers(windows: Tensor) -> None:
    protocol = Protocol.describe(Text("name", "content", "digest"), windows, 7, "bfloat16", "reference")
    assert protocol == Protocol("name", "digest", CONTEXT, 5, 7, 5 * (CONTEXT - 1), "bfloat16", "reference")
