import copy
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from llmquant.errors import LlmQuantError
from llmquant.measure.divergence import kl
from llmquant.measure.evaluate import Evaluation, NonFinite, Protocol, evaluate, score, summarize
from llmquant.measure.perplexity import Change
from llmquant.measure.reference import Reference
from llmquant.measure.text import Text
from llmquant.measure.tokens import Tokens

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


class Breaking(Fixed):
    """Three logits of the last four positions of one window are `bad`."""

    def __init__(self, bad: float, window: Tensor) -> None:
        super().__init__(torch.linspace(0, 1, VOCAB))
        self.bad, self.window = bad, window

    def forward(self, ids: Tensor, **options: object) -> SimpleNamespace:
        logits = super().forward(ids).logits.detach().clone()
        if torch.equal(ids[0], self.window):
            logits[:, -4:, :3] = self.bad
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_counted_and_never_averaged_away(windows: Tensor, bad: float) -> None:
    """The last of the four positions is not scored."""
    windows = windows[:2]
    with Reference.compute(Fixed(torch.linspace(0, 1, VOCAB)), windows) as reference:
        result = evaluate(Breaking(bad, windows[1]), windows, reference)
        alone = evaluate(Breaking(bad, windows[1]), windows)
    assert result.nonfinite == alone.nonfinite == NonFinite(9, 3)
    assert result.perplexity.value == alone.perplexity.value == math.inf and math.isnan(result.perplexity.stderr)
    assert result.kl and result.kl.mean == result.kl.max == math.inf and result.kl.median < 1e-6
    assert result.change and result.change.value == math.inf and result.baseline and result.baseline.value < 200
    assert result.top1 == pytest.approx(1 - 3 / (2 * (CONTEXT - 1)))
    assert sum(cell.mean == math.inf for cell in result.kl.by_confidence) == 1


def test_the_change_is_paired(make_model: MakeModel, windows: Tensor) -> None:
    """Its error is far below those of the two perplexities, which the same hard tokens raise."""
    result = compared(make_model(1, torch.bfloat16), make_model(1).bfloat16().float(), windows)
    assert result.change and result.baseline
    assert result.change.value == pytest.approx(result.perplexity.value / result.baseline.value - 1, abs=1e-9)
    assert 0 < result.change.stderr < result.perplexity.stderr / result.perplexity.value / 10


def test_parts_scored_apart_join_to_the_whole(make_model: MakeModel, windows: Tensor) -> None:
    model, baseline, parts = make_model(1), make_model(2), []
    for part in windows.tensor_split(2):
        with Reference.compute(baseline, part) as reference:
            parts.append(score(model, part, reference)[0])
    whole = numbers(compared(model, baseline, windows))
    assert summarize(Tokens.join(parts), whole.rows, 0.0) == whole


LARGE = """
import json, sys, torch
sys.path[:0] = [{tests!r}]
from models import build
from llmquant.measure.evaluate import evaluate
from llmquant.measure.memory import peak_rss, reset_peak_rss
from llmquant.measure.reference import Reference

torch.set_num_threads(1)
model = build({family!r}, torch.{dtype}, vocab_size=262_144, max_position_embeddings=2048)
windows = torch.randint(3, 262_144, ({windows}, 2048), generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    model(windows[:, :16], use_cache=False)
assert reset_peak_rss()
before = peak_rss()
with Reference.compute(model, windows, folder={folder!r}) as reference:
    after = peak_rss()
    assert reset_peak_rss()
    found = evaluate(model, windows, reference)
    print(json.dumps([after - before, peak_rss() - before, reference.nbytes, found.rows, found.kl.mean]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("family", "dtype", "windows"), [("llama", "float32", 1), ("gemma2", "bfloat16", 2)])
def test_memory_stays_below_the_model_and_1_gb(family: str, dtype: str, windows: int, tmp_path: Path) -> None:
    """A window's logits alone are 2 GB in float32. gemma2 has a soft cap behind its head."""
    tests = str(Path(__file__).parents[1])
    script = LARGE.format(tests=tests, family=family, dtype=dtype, windows=windows, folder=str(tmp_path))
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    computing, evaluating, kept, rows, kl = json.loads(told.stdout.splitlines()[-1])
    assert kept == windows * 2048 * 262_144 * 2 and rows == 64 and kl < 1e-7
    assert 50e6 < computing < 1e9 and 50e6 < evaluating < 1e9
