"""Calibration runs on whole models: what they see, what becomes of it, and that they leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import FAMILIES, VOCAB, Folders, assert_same, inputs, load, logits, manifest, quantize, state, tokens
from torch import Tensor, nn

import llmquant
from llmquant.calibrate.collect import collect_stats
from llmquant.checkpoint.inspect import inspect_checkpoint
from llmquant.checkpoint.stream import quantize_checkpoint
from llmquant.config.fqn import FqnToConfig
from llmquant.config.schemes import parse_scheme
from llmquant.errors import CalibrationError, ConfigError
from llmquant.primitives.stats import InputStats
from llmquant.quantize import quantize_, quantize_weight

SCHEMES = {"s8-int8": "a8-token-int8", "s8-asym-int8": "a8-token-asym-int8", "sf8-float8": "f8-float8"}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
WHOLE = ["llama-tied", "gpt2", "mixtral", "gpt-oss"]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# --- the range --------------------------------------------------------------------------------------------


def test_the_range_is_that_of_all_inputs_by_hooks(folders: Folders) -> None:
    """Against torch's own hooks, which linear layers allow."""
    model = load(folders("llama"))
    met: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, args, __, name=name: met.setdefault(name, []).append(args[0]))
    batches = list(torch.randint(VOCAB, (5, 2, 12), generator=torch.Generator().manual_seed(1)))
    found = collect_stats(model, "s8-int8", batches)
    assert found.tokens == 5 * 24 and set(found) == {f"{name}.weight" for name in met} and not found.warnings
    for name, seen in met.items():
        stats, x = found[f"{name}.weight"], torch.stack(seen)
        assert (stats.low, stats.high) == (x.min(), x.max())
    report = quantize_(model, "s8-int8", stats=found)
    for name in report.quantized:
        x = torch.stack(met[name.removesuffix(".weight")])
        assert torch.equal(model.get_parameter(name).act_scale, (x.abs().max() / 127).reshape(1, 1))


def test_observers_go_by_name_and_know_what_the_range_is_for(folders: Folders) -> None:
    """One model, two dtypes of activations: each weight's observer is told of its own."""
    model, ids = load(folders("mixtral")), [tokens(4)]
    config = {"re:.*q_proj": "sf8-float8", "_experts": "s8-int4-g16", "_default": "s8-asym-int8"}
    found = {
        name: collect_stats(model, config, ids, observer=name)
        for name in ("minmax", "channel", "histogram", "average", "percentile-90")
    }
    for name, whole in found["minmax"].items():
        assert torch.equal(found["channel"][name].high, whole.high) and torch.equal(
            found["average"][name].low, whole.low
        )
        for observer in ("histogram", "percentile-90"):
            narrow = found[observer][name]
            span = torch.maximum(whole.low.abs(), whole.high.abs())
            assert torch.all(torch.maximum(narrow.low.abs(), narrow.high.abs()) <= span)
    ranges = torch.stack([torch.stack([s.low, s.high]) for s in found["percentile-90"].values() if s.low.dim() == 0])
    assert not torch.equal(ranges[:, 0], -ranges[:, 1])
    query = found["histogram"]["model.layers.0.self_attn.q_proj.weight"]
    key = found["histogram"]["model.layers.0.self_attn.k_proj.weight"]
    assert query.low == -query.high and key.low != -key.high
    with pytest.raises(ConfigError, match="histogram"):
        collect_stats(model, config, ids, observer="histo-gram")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "jetmoe"])
def test_logits_are_as_close_as_with_dynamic_scales(family: str, folders: Folders) -> None:
    """JetMoE's routers choose others under the smallest noise, whatever makes it."""
    found = {}
    for scheme in ("s8-asym-int8", "a8-token-asym-int8"):
        model = load(folders(family))
        plain = logits(model)
        quantize(model, scheme)
        found[scheme] = distance(logits(model), plain)
    assert 1e-4 < found["s8-asym-int8"] < 3 * found["a8-token-asym-int8"] < 0.2


@every_scheme
def test_a_sequence_does_not_depend_on_the_others_of_its_batch(scheme: str, folders: Folders) -> None:
    model = load(folders("llama-tied"))
    quantize(model, scheme)
    ids = tokens(4, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[:1], model(ids[:1]).logits, rtol=1e-4, atol=1e-4)


def test_a_static_scale_of_another_text_costs_more(folders: Folders) -> None:
    """Two-sided: a range that is much too wide or too narrow shows in the logits, so the right one matters."""
    model = load(folders("llama"))
    plain, stats = logits(model), collect_stats(model, "s8-int8", [inputs(model)])
    found = []
    for factor in (0.2, 1.0, 10.0):
        model = load(folders("llama"))
        wrong = {name: InputStats(low=s.low * factor, high=s.high * factor) for name, s in stats.items()}
        quantize_(model, "s8-int8", stats=wrong)
        found.append(distance(logits(model), plain))
    assert found[1] < found[0] / 3 and found[1] < found[2] / 3


# --- experts ----------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """As transformers has them: stacked weights, and one product an expert that a token chose."""

    def __init__(self, chosen: tuple[int, ...]) -> None:
        super().__init__()
        self.num_experts, self.chosen = 4, chosen
        self.up_proj = nn.Parameter(torch.randn(4, 6, 8) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return sum(F.linear(x * (i + 1), self.up_proj[i]) for i in self.chosen)


def test_experts_without_tokens_get_the_widest_range_of_the_others_and_a_warning() -> None:
    model, x = Experts((0, 2)), torch.randn(5, 8)
    found = collect_stats(model, {"_experts": "s8-int8"}, [x])
    low, high = x.min(), x.max()
    assert torch.equal(found["up_proj"].low, low * torch.tensor([1.0, 3, 3, 3]))
    assert torch.equal(found["up_proj"].high, high * torch.tensor([1.0, 3, 3, 3]))
    (warning,) = found.warnings
    assert "up_proj" in warning and "2 of 4 experts (1 (0), 3 (0))" in warning and "widest" in warning
    assert warning in str(found)
    assert not collect_stats(Experts((0, 1, 2, 3)), {"_experts": "s8-int8"}, [x]).warnings


def test_experts_that_no_token_chose_at_all_are_refused_by_name() -> None:
    with pytest.raises(CalibrationError, match=r"never multiplied(.|\n)*up_proj"):
        collect_stats(Experts(()), {"_experts": "s8-int8"}, [torch.randn(5, 8)])


# --- nothing is left behind -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_model_is_as_it_was(family: str, folders: Folders) -> None:
    model = load(folders(family)).train()
    model.model.layers[0].eval()
    before, modes = state(model), [m.training for m in model.modules()]
    experts = model.get_experts_implementation()

    def interrupted() -> Iterator[dict[str, Any]]:
        yield inputs(model)
        raise KeyboardInterrupt

    class Batch(dict[str, Any]):
        def items(self) -> Any:
            raise KeyboardInterrupt

    collect_stats(model, "s8-int8", [inputs(model)])
    with pytest.raises(KeyboardInterrupt):
        collect_stats(model, "s8-int8", interrupted())
    with pytest.raises(KeyboardInterrupt):
        collect_stats(model, "s8-int8", [inputs(model), Batch()])
    assert_same(state(model), before)
    assert [m.training for m in model.modules()] == modes and model.get_experts_implementation() == experts
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_progress_counts_batches(folders: Folders) -> None:
    calls: list[tuple[int, int, str]] = []
    collect_stats(load(folders("llama")), "s8-int8", tokens(3, 12), progress=lambda *args: calls.append(args))
    assert calls == [(0, 3, ""), (1, 3, ""), (2, 3, ""), (3, 3, "")]


# --- what may be given ------------------------------------------------------------------------------------


def test_texts_windows_and_batches_are_the_same_run(folders: Folders, tmp_path: Path) -> None:
    def encode(text: str, **_: Any) -> list[int]:
        return [3 + ord(char) % 100 for char in text]

    tokenizer = SimpleNamespace(encode=encode, bos_token_id=None)
    (tmp_path / "t").write_text("the quick brown fox")
    ids = torch.tensor([encode("the quick brown fox")])
    model = load(folders("llama"))
    found = [
        collect_stats(model, "s8-int8", str(tmp_path / "t"), tokenizer=tokenizer, seed=3),
        collect_stats(model, "s8-int8", ["the quick brown fox"], tokenizer=tokenizer),
        collect_stats(model, "s8-int8", ids),
        collect_stats(model, "s8-int8", [{"input_ids": ids}]),
    ]
    for one in found:
        assert one.tokens == ids.numel()
        assert all((s.low, s.high) == (found[0][name].low, found[0][name].high) for name, s in one.items())


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.idle = nn.Embedding(20, 8), nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.up(self.embed(ids) * self.factor)

    factor = 1.0


IDS = torch.arange(6)[None]
REFUSED: dict[str, tuple[Any, Any, str]] = {
    "nothing static": ("a8-int8", IDS, "nothing that needs"),
    "an embedding": ({"_embedding": "s8-int8"}, IDS, "embedding meets no activations"),
    "a layer that is not used": ("s8-int8", IDS, r"never multiplied(.|\n)*idle.weight"),
    "no batches": ({"up": "s8-int8"}, [], "nothing to calibrate on"),
    "texts without a tokenizer": ({"up": "s8-int8"}, ["a", "b"], "tokenizer"),
    "a text without a tokenizer": ({"up": "s8-int8"}, "builtin", "tokenizer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_run_can_be_made_of_is_refused(name: str) -> None:
    config, data, message = REFUSED[name]
    with pytest.raises(CalibrationError, match=message):
        collect_stats(Toy(), config, data)


def test_inputs_that_are_not_finite_are_refused_by_name() -> None:
    model = Toy()
    model.factor = torch.inf
    with pytest.raises(CalibrationError, match=r"not finite(.|\n)*up.weight"):
        collect_stats(model, {"up": "s8-int8"}, IDS)


def test_the_filter_says_what_is_watched() -> None:
    found = collect_stats(Toy(), "s8-int8", IDS, filter_fn=lambda _, name: name != "idle")
    assert list(found) == ["up.weight"] and len(found) == 1


@pytest.mark.parametrize("stats", [None, {}, {"up.weight": InputStats(mean_square=torch.ones(8))}], ids=str)
def test_quantizing_without_a_run_is_refused_before_anything_changes(stats: Any) -> None:
    model = Toy()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(CalibrationError, match=r"calibration run(.|\n)*up.weight(.|\n)*collect_stats"):
        quantize_(model, {"up": "s8-int8", "idle": "int8"}, stats=stats)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# --- to disk and back -------------------------------------------------------------------------------------


@every_scheme
@pytest.mark.parametrize("family", WHOLE)
def test_what_is_saved_comes_back_bit_for_bit(family: str, scheme: str, folders: Folders, tmp_path: Path) -> None:
    model = load(folders(family))
    stats = collect_stats(model, scheme, [inputs(model)])
    quantize_(model, scheme, stats=stats)
    model.save_pretrained(tmp_path / "memory")
    back = load(tmp_path / "memory")
    assert_same(state(back), state(model))
    assert torch.equal(logits(back), logits(model))
    back.save_pretrained(tmp_path / "again")
    assert_same(state(load(tmp_path / "again")), state(model))
    quantize_checkpoint(folders(family), tmp_path / "stream", scheme, stats=stats)
    assert_same(state(load(tmp_path / "stream")), state(model))
    assert manifest(tmp_path / "stream")["weights"] == manifest(tmp_path / "memory")["weights"]


@every_scheme
def test_a_checkpoint_says_what_its_activations_are(scheme: str, folders: Folders, tmp_path: Path) -> None:
    model = load(folders("mixtral"))
    quantize(model, scheme)
    model.save_pretrained(tmp_path / "q")
    rows = [row for row in inspect_checkpoint(tmp_path / "q").rows if row.quantized]
    assert {row.activation for row in rows} == {scheme.rpartition("-")[0]}
    assert all(row.bytes == model.get_parameter(row.fqn).nbytes for row in rows)


def test_quantizing_on_the_way_from_disk_wants_a_run_first(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="calibration run"):
        quantize_checkpoint(folders("llama"), tmp_path / "q", "s8-int8")
    assert not (tmp_path / "q").exists()
    with pytest.raises(CalibrationError, match="calibration run"):
        load(folders("llama"), quantization_config=llmquant.LlmQuantConfig("s8-int8"))


def test_a_plain_model_comes_back(folders: Folders) -> None:
    model = load(folders("llama"))
    quantize(model, "s8-int8")
    expected = {name: p.dequantize() for name, p in model.named_parameters() if hasattr(p, "act_scale")}
    model.dequantize()
    assert expected and all(torch.equal(model.get_parameter(name), p) for name, p in expected.items())


@every_scheme
def test_a_run_takes_no_part_in_how_weights_are_rounded(scheme: str) -> None:
    weight, stats = torch.randn(6, 70), InputStats(low=torch.tensor(-1.0), high=torch.tensor(2.0))
    static, dynamic = (parse_scheme(s) for s in (scheme, SCHEMES[scheme]))
    assert torch.equal(
        quantize_weight(weight, static, stats).dequantize(), quantize_weight(weight, dynamic).dequantize()
    )


def test_optimized_models_say_the_same(folders: Folders) -> None:
    model = load(folders("llama"), dtype=torch.bfloat16)
    quantize(model, "s8-int8")
    ids = tokens(1, 8)
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    report = llmquant.optimize(model)
    assert report.merged and torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), plain)


def test_configs_in_a_mapping_are_found_too(folders: Folders) -> None:
    config = FqnToConfig({"re:.*up_proj": llmquant.Int8StaticActivationInt8WeightConfig(), "_default": None})
    found = collect_stats(load(folders("llama")), config, tokens())
    assert len(found) == 2 and all("up_proj" in name for name in found)
    with pytest.raises(ConfigError):
        collect_stats(load(folders("llama")), "s9-int8", tokens())
