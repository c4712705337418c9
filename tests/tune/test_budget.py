"""A choice under a budget: its size is real, it is measured, kept, an ordinary recipe, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, rtn, tokens
from torch import Tensor

from llmquant import choose_mixture, load_recipe, mixed_precision, quantize_
from llmquant.config.candidates import Candidate
from llmquant.errors import BudgetError, CalibrationError, ConfigError
from llmquant.measure.evaluate import evaluate
from llmquant.measure.memory import weight_counts
from llmquant.measure.reference import Reference
from llmquant.quantize import make_plan, quantize_weight
from llmquant.tune import budget
from llmquant.tune.bank import Bank, bytes_under, plain_quantize
from llmquant.tune.scope import make_scope, parse_schemes
from llmquant.tune.scores import Store
from llmquant.tune.sensitivity import sensitivity


def rtn_of(*schemes: str) -> list[Any]:
    return [dict(rtn(scheme).items())["_default"] for scheme in schemes]


SCHEMES = rtn_of("int2-g16", "int3-g24", "int4-g16", "int6-g32", "int8")
IDS = torch.randint(3, 128, (3, 24), generator=torch.Generator().manual_seed(1))


def choose(model: Any, bits: float, **options: Any) -> Any:
    return choose_mixture(model, bits, options.pop("schemes", SCHEMES), IDS, **{"cache": False} | options)


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gpt-oss"])
def test_bits_are_those_of_the_evaluation_and_within_the_budget(family: str, embeddings: bool) -> None:
    model = build(family)
    found = choose(model, 4.6, embeddings=embeddings)
    quantize_(model, found.config)
    counts = weight_counts(model)
    assert counts.bits_per_quantized_weight == found.chosen.bits <= 4.6
    assert counts.quantized_bytes == found.chosen.bytes
    assert found.chosen.bits > 4.2  # the budget is used
    assert hasattr(model.get_input_embeddings().weight, "qdata") is embeddings


@pytest.mark.parametrize("scheme", ["int3-g24-asym", "int8", "float8-b16", "nvfp4", "nf4", "float8-2x4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-oss", "dbrx"])
def test_bytes_are_told_without_quantizing(family: str, scheme: str) -> None:
    model = build(family)
    for candidate, config in make_plan(model, rtn(scheme)).chosen[:8]:
        assert bytes_under(candidate, config) == Bank(model).get(candidate, config).nbytes


def test_the_answer_beats_every_uniform_recipe_of_no_larger_size() -> None:
    model = build("llama", hidden_size=128)
    found = choose(model, 4.6)
    names = {other.name for other in found.compared}
    assert names == {"mixed", "int2-g16", "int3-g24"}
    assert found.chosen.kl == min(other.kl for other in found.compared) and not found.is_uniform
    quantize_(model, found.config)
    with Reference.compute(build("llama", hidden_size=128), IDS) as reference:
        assert evaluate(model, IDS, reference).kl.mean == pytest.approx(found.chosen.kl, rel=1e-3)


def test_a_mixture_that_is_worse_is_not_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores upside down make a bad mixture; measuring finds it out."""
    monkeypatch.setattr(budget, "knapsack", lambda sizes, costs, room: [0] * len(sizes))
    found = choose(build("llama"), 4.6)
    assert found.is_uniform and found.chosen.name == "int3-g24"
    assert "uniform recipe" in str(found) and "# Made by llmquant" in found.to_yaml()
    quantize_(model := build("llama"), found.config)
    assert weight_counts(model).bits_per_quantized_weight == found.chosen.bits


def test_the_recipe_is_an_ordinary_one(tmp_path: Path) -> None:
    found = choose(build("llama"), 4.6, fixed={"re:.*o_proj": "int5-g20-asym", "lm_head": None})
    (tmp_path / "r.yaml").write_text(found.to_yaml("toy"))
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.config == found.config
    text = found.to_yaml("toy")
    assert "for toy" in text and f"{found.chosen.bytes:,} bytes" in text and "fisher on 72 tokens" in text


def test_what_is_fixed_is_not_open_but_counts() -> None:
    model = build("llama")
    found = choose(model, 5.0, fixed={"re:.*o_proj": rtn_of("int8")[0], "lm_head": None})
    assert not any("o_proj" in name or "lm_head" in name for name in found.chosen.schemes)
    report = quantize_(model, found.config)
    assert {w.scheme for n, w in report.quantized.items() if "o_proj" in n} == {
        "int8"
    } and "lm_head.weight" in report.skipped
    assert weight_counts(model).bits_per_quantized_weight == found.chosen.bits <= 5.0


def test_the_head_gets_six_bits_unless_it_was_measured() -> None:
    model = build("llama")
    for method in ("fisher", "data-free"):
        found = choose(model, 4.0, method=method, validate=False).chosen.schemes
        assert found["lm_head"] in ("int6-g32", "int8") and "int2-g16" in found.values()
    few = rtn_of("int2-g16", "int4-g16")
    assert choose(model, 4.6, schemes=few).chosen.schemes["lm_head"] == "int4-g16"  # the widest there is
    monotone = choose(model, 3.1, method="measured", validate=False).chosen.schemes
    assert monotone["lm_head"] in {"int2-g16", "int3-g24"}


@pytest.mark.parametrize("bits", [2.0, 0.0, float("nan")])
def test_a_budget_out_of_reach_names_what_is_in_reach(bits: float) -> None:
    with pytest.raises(BudgetError, match=r"out of reach: these schemes take \[3\.\d+, 8\.\d+\]"):
        choose(build("llama"), bits)


class Counting:
    """Quantizes plainly and counts; scores with a quantizer of one's own are not kept."""

    calls = 0

    def __call__(self, candidate: Candidate, weight: Tensor, config: Any) -> Any:
        self.calls += 1
        return plain_quantize(candidate, weight, config)


def test_a_second_budget_costs_no_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    first = choose(model, 4.6, cache=tmp_path)
    monkeypatch.setattr("llmquant.tune.sensitivity.fisher_scores", None)  # would fail if it were called
    assert choose(model, 4.6, cache=tmp_path) == first
    assert choose(model, 5.5, cache=tmp_path).scores.groups == first.scores.groups
    monkeypatch.setattr("llmquant.tune.bank.quantize_weight", None)
    assert choose(model, 6.5, cache=tmp_path, validate=False).chosen.bits > first.chosen.bits
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] += 1e-3
    with pytest.raises(TypeError):
        choose(model, 4.6, cache=tmp_path)  # another model has other scores


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": "x"}', '{"key": "k", "scores": {"method": 1}}'])
def test_a_damaged_file_of_scores_is_as_none(tmp_path: Path, content: str) -> None:
    store = Store(tmp_path, "k")
    assert store.path is not None
    store.path.write_text(content)
    assert store.read() is None


def test_kept_scores_come_back_as_they_were(tmp_path: Path) -> None:
    scores = sensitivity(build("llama"), SCHEMES, IDS, cache=tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    assert sensitivity(build("llama"), SCHEMES, IDS, cache=tmp_path) == scores


def test_another_quantizer_takes_the_scores() -> None:
    mine = Counting()
    found = sensitivity(build("llama"), SCHEMES[:2], IDS, quantize=mine)
    assert mine.calls == 2 * 15
    assert found == sensitivity(build("llama"), SCHEMES[:2], IDS, cache=False)


def test_schemes_that_need_a_run_are_scored_by_the_formats_own_algorithm() -> None:
    model = build("llama")
    gptq = [config.with_algorithm("gptq") for config in SCHEMES]
    config = mixed_precision(model, 4.6, gptq, data=IDS, cache=False)
    assert {value.algorithm for _, value in config.items()} == {"gptq"}
    weight = Bank(model).get(make_plan(model, config).chosen[0][0], gptq[2])
    plain = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    searched = quantize_weight(plain.detach(), parse_schemes("int4-g16")["int4-g16"])
    assert torch.equal(weight.dequantize(), searched.dequantize())


REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no scheme": (lambda: make_scope(build("llama"), []), ConfigError, "no scheme to choose"),
    "none": (lambda: make_scope(build("llama"), "int4-g32,none"), ConfigError, "'none' is no scheme"),
    "twice": (lambda: make_scope(build("llama"), "int8,int8-row"), ConfigError, "twice"),
    "all fixed": (lambda: make_scope(build("llama"), "int8", fixed="int4-g32"), ConfigError, "no weight is open"),
    "method": (lambda: sensitivity(build("llama"), "int8", IDS, method="guess"), ConfigError, "fisher, measured"),
    "no tokenizer": (lambda: sensitivity(build("llama"), "int8", "builtin"), CalibrationError, "tokenizer"),
    "no windows": (lambda: sensitivity(build("llama"), "int8", tokens()[0]), CalibrationError, "token ids"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(case: str) -> None:
    call, kind, message = REFUSED[case]
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)
