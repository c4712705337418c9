"""Quantizing block by block: what it gains, that it can be interrupted, that nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCAB, Folders, load
from torch import Tensor, nn

from llmquant.calibrate.collect import collect_stats
from llmquant.calibrate.watch import weighed
from llmquant.config.fqn import FqnToConfig
from llmquant.config.recipe import to_config, with_algorithm
from llmquant.errors import CalibrationError, ConfigError, UnfinishedRunError
from llmquant.quantize import QuantizationReport, quantize_, quantize_weight
from llmquant.tensor import QuantizedTensor
from llmquant.tune.sequential import quantize_with_data_

GPTQ, SIGNROUND = (with_algorithm(to_config("int3-g32"), name) for name in ("gptq", "signround"))
FAMILIES = ["llama-tied", "gpt2", "mixtral", "gpt-oss", "qwen3", "mamba", "dbrx"]


def some_tokens(count: int = 12, length: int = 24) -> Tensor:
    return torch.randint(VOCAB, (count, length), generator=torch.Generator().manual_seed(3))


def run(model: nn.Module, config: Any = GPTQ, **options: Any) -> QuantizationReport:
    return quantize_with_data_(model, config, some_tokens(), **options)


def forward(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(some_tokens(), use_cache=False).logits  # type: ignore[no-any-return]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def assert_equal_weights(model: nn.Module, other: nn.Module) -> None:
    one, two = weights(model), weights(other)
    assert one.keys() == two.keys() and one
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", [GPTQ, SIGNROUND], ids=["gptq", "signround"])
def test_outputs_are_nearer_than_those_of_search(config: FqnToConfig, family: str, folders: Folders) -> None:
    wanted = forward(load(folders(family)))
    plain, model = load(folders(family)), load(folders(family))
    quantize_(plain, "int3-g32")
    report = run(model, config, steps=20)
    blocks = {w.algorithm for name, w in report.quantized.items() if "head" not in name}
    assert blocks == {config.fqn_to_config["_default"].algorithm}
    error, plain_error = (float((forward(m) - wanted).square().mean()) for m in (model, plain))
    assert error < 0.8 * plain_error


def test_what_lies_outside_of_blocks_is_not_learned(folders: Folders) -> None:
    report = run(load(folders("llama")), SIGNROUND, steps=1)
    assert report.quantized["lm_head.weight"].algorithm == "search"
    assert {w.algorithm for w in report.quantized.values()} == {"search", "signround"}


def test_algorithms_mix(folders: Folders) -> None:
    """Each weight gets what its own config says; the plain ones as without tokens."""
    schemes = {r"re:.*self_attn.*": SIGNROUND.fqn_to_config["_default"], "_default": GPTQ.fqn_to_config["_default"]}
    model, plain = load(folders("llama")), load(folders("llama"))
    keys = {"model.layers.0.mlp.up_proj": "int8", **schemes}
    report = run(model, keys, steps=2)
    quantize_(plain, "int8")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(weights(model)[name], weights(plain)[name])
    assert {w.algorithm for w in report.quantized.values()} == {"gptq", "signround", "search"}


def test_every_weight_but_the_embedding_is_corrected(folders: Folders) -> None:
    model = load(folders("llama"))
    report = run(model, with_algorithm(to_config({"_embedding": "int4-g32", "_default": "int4-g32"}), "gptq"))
    embedding = report.quantized.pop("model.embed_tokens.weight")
    assert embedding.algorithm == "search"
    assert len(report.quantized) == 15 and {w.algorithm for w in report.quantized.values()} == {"gptq"}


def test_a_block_meets_what_the_quantized_blocks_before_it_give(folders: Folders) -> None:
    """The first block as in one run over the plain model, the second not."""
    model, at_once = load(folders("llama")), load(folders("llama"))
    run(model)
    quantize_(at_once, GPTQ, stats=collect_stats(at_once, GPTQ, some_tokens()))
    own, other = weights(model), weights(at_once)
    same = {name: torch.equal(own[name], other[name]) for name in own}
    assert all(equal for name, equal in same.items() if ".layers.0." in name)
    assert not any(equal for name, equal in same.items() if ".layers.1." in name)


@pytest.mark.parametrize("scheme", ["int3-g32", "int4-g32", "mxfp4"])
def test_every_layer_errs_less_at_its_output_and_more_in_its_weight_than_by_plain_rounding(
    scheme: str, folders: Folders
) -> None:
    model = load(folders("llama"))
    config = with_algorithm(to_config(scheme), "gptq")
    stats = collect_stats(model, config, some_tokens(40))
    assert len(stats) == 15
    for name, own in stats.items():
        weight = model.get_parameter(name).detach()
        errors = {}
        for algorithm in ("rtn", "gptq"):
            chosen = config.fqn_to_config["_default"].with_algorithm(algorithm)
            error = (quantize_weight(weight, chosen, own).dequantize() - weight).double()
            errors[algorithm] = float((error @ own.hessian.double() * error).sum()), float(error.square().sum())
        assert errors["gptq"][0] < errors["rtn"][0] and errors["gptq"][1] > errors["rtn"][1], name


def test_experts_that_saw_few_tokens_are_named(folders: Folders) -> None:
    report = quantize_with_data_(load(folders("mixtral")), GPTQ, some_tokens(1, 24))
    assert any("too few tokens chose" in w and "experts" in w for w in report.warnings)


def test_the_importance_of_columns_counts(folders: Folders) -> None:
    plain, own, given = (load(folders("llama")) for _ in range(3))
    quantize_(plain, "int3-g32")
    run(own, "int3-g32", imatrix=True)
    stats = collect_stats(load(folders("llama")), "int3-g32", some_tokens(), imatrix=True)
    run(given, "int3-g32", imatrix=stats)
    assert_equal_weights(own, given)
    changed = weights(plain)
    assert not any(torch.equal(w, changed[name]) for name, w in weights(own).items())


def test_importance_from_elsewhere_takes_the_place_of_the_own(folders: Folders) -> None:
    stats = collect_stats(load(folders("llama")), GPTQ, some_tokens())
    name = next(iter(stats))
    twice = weighed({name: stats[name]}, {name: stats["model.layers.1.mlp.up_proj.weight"]})[name]
    assert twice.hessian is stats[name].hessian
    assert twice.mean_square is stats["model.layers.1.mlp.up_proj.weight"].mean_square


# --- interruptions ------------------------------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    pass


class StopAt:
    """A progress that interrupts the run at a step, and counts those that were shown."""

    def __init__(self, step: int) -> None:
        self.step, self.shown = step, 0

    def __call__(self, done: int, total: int, item: str) -> None:
        assert 0 <= done <= total
        self.shown += 1
        if done >= self.step:
            raise Interrupted


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("config", [GPTQ, SIGNROUND], ids=["gptq", "signround"])
@pytest.mark.parametrize("step", [0, 13, 25, 40, 55])
def test_an_interrupted_run_goes_on_and_ends_with_equal_bits(
    family: str, config: FqnToConfig, step: int, folders: Folders, tmp_path: Path
) -> None:
    straight, model = load(folders(family)), load(folders(family))
    report = run(straight, config, steps=3)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(Interrupted):
        run(model, config, steps=3, journal=tmp_path / "journal", progress=StopAt(step))
    assert not weights(model)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    again = run(model, config, steps=3, journal=tmp_path / "journal")
    assert_equal_weights(model, straight)
    assert again.warnings == report.warnings and list(again.quantized) == list(report.quantized)
    assert not (tmp_path / "journal").exists()


def test_what_is_finished_is_not_done_again(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, done = load(folders("llama")), []
    with pytest.raises(Interrupted):
        run(model, journal=tmp_path / "journal", progress=StopAt(30))  # in the second block
    monkeypatch.setattr("llmquant.quantize.model.quantize_weight", _noting(done))
    run(model, journal=tmp_path / "journal")
    assert len(done) == 8  # the second block and the head


def _noting(done: list[Any]) -> Any:
    def noting(*args: Any, **kwargs: Any) -> QuantizedTensor:
        done.append(args)
        return quantize_weight(*args, **kwargs)

    return noting


@pytest.mark.parametrize("change", ["tokens", "config", "weight"])
def test_another_run_does_not_go_on_where_this_one_ended(change: str, folders: Folders, tmp_path: Path) -> None:
    model, straight = load(folders("llama")), load(folders("llama"))
    run(straight)
    with pytest.raises(Interrupted):
        run(model, journal=tmp_path / "journal", progress=StopAt(40))
    other = load(folders("llama"))
    ids = some_tokens().flip(0) if change == "tokens" else some_tokens()
    config = with_algorithm(to_config("int4-g32"), "gptq") if change == "config" else GPTQ
    if change == "weight":
        other.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(UnfinishedRunError, match="another"):
        quantize_with_data_(other, config, ids, journal=tmp_path / "journal")
    assert not weights(other)
    run(model, journal=tmp_path / "journal")  # nothing of it was lost
    assert_equal_weights(model, straight)


def test_a_part_that_was_damaged_is_done_again(folders: Folders, tmp_path: Path) -> None:
    model, straight = load(folders("llama")), load(folders("llama"))
    run(straight)
    with pytest.raises(Interrupted):
        run(model, journal=tmp_path / "journal", progress=StopAt(40))
    part, *_ = (tmp_path / "journal").glob("*.safetensors")
    part.write_bytes(part.read_bytes()[:-100])
    run(model, journal=tmp_path / "journal")
    assert_equal_weights(model, straight)


# --- what is refused ----------------------------------------------------------------------------------------


def test_it_cannot_be_had_without_tokens(folders: Folders) -> None:
    model = load(folders("llama"))
    with pytest.raises(CalibrationError, match="need a calibration run"):
        quantize_(model, GPTQ)
    with pytest.raises(CalibrationError, match="tokenizer"):
        quantize_with_data_(model, GPTQ, "builtin")
    with pytest.raises(CalibrationError, match="nothing that needs"):
        run(model, "int4-g32")
    assert not weights(model)


def test_it_needs_scales_within_rows() -> None:
    with pytest.raises(ConfigError, match="gptq"):
        with_algorithm(to_config("int8-tensor"), "gptq")
