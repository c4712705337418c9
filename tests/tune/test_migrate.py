"""Scaled channels: the same function, whatever the scales; scales that AWQ and SmoothQuant would choose."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from extra_families import EXTRA, build
from torch import Tensor

from llmquant.errors import ConfigError, NothingToQuantizeError, UnknownArchitectureError
from llmquant.quantize import quantize_, quantize_weight
from llmquant.tune.awq import awq_, choose_scale
from llmquant.tune.channels import each_block
from llmquant.tune.sites import Site, find_sites, matrices
from llmquant.tune.smoothquant import smoothquant_
from llmquant.tune.structure import find_structure

REFUSED = {"openai-gpt", "opt", "inkling", "longcat", "t5", "qwen3-vl-moe"}
KNOWN = [family for family in [*models.FAMILIES, *EXTRA] if family not in REFUSED]
INT3 = models.rtn({"_default": "int3-g32", "?_experts": "int3-g32"})
SOURCES = {  # of the second block; all have norms before and in the middle of a block
    "llama": {"self_attn.v_proj", "mlp.up_proj"},
    "phi3": {"self_attn.qkv_proj", "mlp.gate_up_proj"},
    "glm4": {"self_attn.v_proj", "mlp.gate_up_proj"},
    "glm4-moe": {"self_attn.v_proj", "mlp.shared_experts.up_proj"},
    "qwen2-moe": {"self_attn.v_proj", "mlp.shared_expert.up_proj"},
    "llama4": {"self_attn.v_proj", "feed_forward.shared_expert.up_proj"},
    "opt-plain": {"self_attn.v_proj"},
    "deepseek-v3": {"mlp.shared_experts.up_proj", "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"},
    "gpt2": set(),
    "gpt-oss": {"self_attn.v_proj"},
}


def sites_of(model: Any) -> list[Site]:
    return find_sites(model, find_structure(model))[0]


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative, in the root mean square."""
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", KNOWN)
def test_any_scales_leave_the_function_alone(family: str) -> None:
    model = build(family, torch.float64)
    before = models.logits(model)
    for site in sites_of(model):
        old = model.get_parameter(site.readers[0].name).detach().clone()
        columns = torch.zeros(site.readers[0].inputs)
        site.apply(model, torch.randn(site.shared(columns).shape[1]).mul(0.7).exp())
        assert difference(model.get_parameter(site.readers[0].name).detach(), old) > 0.1
    assert difference(models.logits(model), before) < 1e-6  # transformers computes norms in float32


@pytest.mark.parametrize("family", SOURCES)
def test_every_source_is_found(family: str) -> None:
    model = build(family)
    last = max(site.block for site in sites_of(model))
    found = {site.source.removesuffix(".weight").removeprefix(last + ".") for site in sites_of(model)}
    norms = {name for name in found if "norm" in name or name.startswith("ln_")} - SOURCES[family]
    assert len(norms) >= 2
    assert {name for name in found - norms if not name.startswith(("model.", "transformer."))} == SOURCES[family]


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "deepseek-v3"])
def test_no_weight_is_left_out_of_the_report(family: str) -> None:
    model = build(family)
    sites, skipped = find_sites(model, find_structure(model))
    named = {weight.name for site in sites for weight in site.readers} | skipped.keys()
    wide = {n for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n and ".wte" not in n}
    assert wide - {"transformer.wpe.weight"} <= named


def test_what_cannot_be_scaled_says_why() -> None:
    skipped = find_sites(model := build("mixtral"), find_structure(model))[1]
    assert "each expert" in skipped["model.layers.0.mlp.experts.down_proj"] and "lm_head.weight" in skipped
    model = build("llama", head_dim=8)  # 4 heads of 8 read 2 of 8
    assert not [name for name in find_sites(model, find_structure(model))[1] if "o_proj" in name]


# --- smoothquant ------------------------------------------------------------------------------------------


def carried(model: Any) -> list[tuple[Tensor, Tensor]]:
    """Of every site, the largest input and the largest weight of each channel."""
    found = []
    for block in each_block(model, sites_of(model), [models.inputs(model)], gram=False, progress=None):
        for site, channels in block:
            columns = torch.cat([m.float() for w in site.readers for m in matrices(model, w)]).abs().amax(0)
            found.append((site.shared(channels.largest).amax(0), site.shared(columns).amax(0)))
    return found


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "deepseek-v3", "gemma2", "glm4-moe"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_difficulty_is_shared_as_alpha_says(family: str, alpha: float) -> None:
    """At 0 all columns of weights reach 1, at 1 all activations do, between them both reach the same."""
    model = build(family)
    before = models.logits(model)
    smoothquant_(model, [models.inputs(model)], alpha=alpha)
    assert difference(models.logits(model), before) < 1e-4
    for inputs, weights in carried(model):
        left = {0.0: weights, 0.5: inputs / weights, 1.0: inputs}[alpha]
        torch.testing.assert_close(left, torch.ones_like(left), rtol=2e-3, atol=0)


def test_smoothing_helps_activations_of_eight_bits() -> None:
    """With one channel far above the others, int8 activations per token lose it or them."""

    def error(smooth: bool) -> float:
        model = build("llama")
        with torch.no_grad():
            for layer in model.model.layers:
                layer.input_layernorm.weight[7] *= 60
        plain = models.logits(model)
        if smooth:
            smoothquant_(model, [models.inputs(model)])
        quantize_(model, models.rtn("a8-token-int8"))
        return difference(models.logits(model), plain)

    assert 0.05 < error(True) / error(False) < 0.8


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_another_alpha_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        smoothquant_(build("llama"), [models.tokens()], alpha=alpha)


# --- awq --------------------------------------------------------------------------------------------------


def test_the_error_that_is_minimised_is_that_of_the_outputs() -> None:
    """Against products of the inputs themselves, seen by hooks."""
    model = build("llama")
    norm, up = model.model.layers[0].post_attention_layernorm, model.model.layers[0].mlp.up_proj
    seen: list[Tensor] = []
    with norm.register_forward_hook(lambda _m, _a, output: seen.append(output.flatten(0, 1))):
        models.logits(model)
    site = next(s for s in sites_of(model) if s.source == "model.layers.0.post_attention_layernorm.weight")
    config = dict(INT3.items())["_default"]
    blocks = each_block(model, [site], [models.inputs(model)], gram=True, progress=None)
    found = choose_scale(model, site, next(blocks)[0][1], {w.name: config for w in site.readers})

    def error(scale: Tensor) -> float:
        total = 0.0
        for weight in (model.model.layers[0].mlp.gate_proj.weight, up.weight):
            rounded = quantize_weight(weight * scale, config).dequantize() / scale
            total += float((seen[0] @ (rounded - weight).T).square().sum())
        return total

    assert 0 < found.alpha < 1 and 0.3 < found.error < 1
    assert error(found.scale) / error(torch.ones(models.HIDDEN)) == pytest.approx(found.error, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "gemma2"])
def test_awq_changes_weights_and_no_function(family: str) -> None:
    model = build(family)
    before, states = models.logits(model), models.state(model)
    report = awq_(model, INT3, [models.inputs(model)])
    assert difference(models.logits(model), before) < 1e-4 and models.state(model) != states
    assert report.scaled and "lm_head.weight" in report.skipped and report.tokens == models.tokens().numel()


def test_channels_that_carry_much_keep_their_precision() -> None:
    def error(awq: bool) -> float:
        model = build("llama")
        with torch.no_grad():
            for layer in model.model.layers:
                layer.post_attention_layernorm.weight[7] *= 40
                layer.input_layernorm.weight[9] *= 40
        plain = models.logits(model)
        if awq:
            awq_(model, INT3, [models.inputs(model)])
        quantize_(model, INT3)
        return difference(models.logits(model), plain)

    assert 0.1 < error(True) / error(False) < 0.8


def test_sites_without_a_quantized_reader_stay() -> None:
    model = build("llama")
    report = awq_(model, {"re:.*down_proj": "int3-g16"}, [models.inputs(model)])
    assert report.scaled.keys() == {f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)}
    assert report.skipped["model.layers.0.input_layernorm.weight"] == "no reader is quantized"
    with pytest.raises(NothingToQuantizeError):
        awq_(build("llama"), {"_head": "int8"}, [models.tokens()])


@pytest.mark.parametrize("change", [lambda m, **o: awq_(m, INT3, **o), smoothquant_])
def test_an_interrupted_run_leaves_the_function(change: Any) -> None:
    model = build("llama")
    before = models.logits(model)

    def stop(done: int, total: int, item: str) -> None:
        if done == total // 2 + 1:
            raise KeyboardInterrupt

    batches = [ids.unsqueeze(0) for ids in models.tokens(4)]
    with pytest.raises(KeyboardInterrupt):
        change(model, data=batches, progress=stop)
    assert difference(models.logits(model), before) < 1e-4
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("change", [lambda m, **o: awq_(m, INT3, **o), smoothquant_])
def test_unknown_models_stay_as_they_are(change: Any) -> None:
    model = build("inkling")
    before = models.state(model)
    with pytest.raises(UnknownArchitectureError, match="convolutions"):
        change(model, data=[models.tokens()])
    models.assert_same(models.state(model), before)
