"""Every family of models goes all the way: quantize, say, generate, save, load, save again, and nothing gets lost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, Folders, assert_same, disk, inputs, load, logits, manifest, rtn, state, weights
from torch import Tensor, nn

from llmquant import LlmQuantConfig, quantize_
from llmquant.checkpoint.stream import quantize_checkpoint
from llmquant.config.schemes import parse_scheme
from llmquant.quantize import quantize_weight

families = pytest.mark.parametrize("family", FAMILIES)

# Scheme -> how far from the plain model's it may move the logits, in parts of their norm.
# An error that makes tokens choose other experts moves them far.
SCHEMES = {
    "int4-g32": (0.02, 0.6),
    "int3-g32": (0.05, 0.8),
    "float8": (0.005, 0.3),
    "nvfp4": (0.02, 0.6),
    "a8-token-int8": (0.001, 0.3),
    "mxfp8-mxfp8": (0.005, 0.4),
}


def everything(scheme: str) -> Any:
    """One scheme for all that can be quantized; by `_default` alone embeddings and tied heads would stay."""
    return rtn({"_default": scheme, "_embedding": scheme})


@families
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_family_goes_all_the_way(family: str, scheme: str, folders: Folders, tmp_path: Path) -> None:
    model = load(folders(family))
    plain = logits(model)
    report = quantize_(model, everything(scheme))
    said = logits(model)
    low, high = SCHEMES[scheme]
    assert low < (said - plain).norm() / plain.norm() < high
    generated = generate(model)

    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert_same(state(again), state(model))
    assert torch.equal(logits(again), said) and torch.equal(generate(again), generated)

    again.save_pretrained(tmp_path / "again")
    assert_same(disk(tmp_path / "again"), disk(tmp_path / "saved"))
    assert manifest(tmp_path / "again")["weights"] == manifest(tmp_path / "saved")["weights"]

    while_loading = load(folders(family), quantization_config=LlmQuantConfig(everything(scheme)))
    assert_same(state(while_loading), state(model))
    assert torch.equal(logits(while_loading), said)
    found = while_loading.hf_quantizer.report
    assert found.quantized == report.quantized and found.skipped == report.skipped

    assert ways_of_experts(model) == ways_of_experts(again) == ways_of_experts(while_loading) <= {"eager"}

    quantize_checkpoint(folders(family), tmp_path / "streamed", everything(scheme))
    assert_same(disk(tmp_path / "streamed"), disk(tmp_path / "saved"))


def ways_of_experts(model: nn.Module) -> set[str]:
    """How transformers is told to run experts, where it can be told."""
    return {module.config._experts_implementation for module in model.modules() if hasattr(module, "is_concatenated")}


@torch.no_grad()
def generate(model: Any) -> Tensor:
    return model.generate(**inputs(model), max_new_tokens=3, min_new_tokens=3, do_sample=False)


@families
def test_a_family_can_leave(family: str, folders: Folders, tmp_path: Path) -> None:
    """A dequantized model is a plain one, of the shapes and under the names of the first."""
    model = load(folders(family))
    shapes = {fqn: parameter.shape for fqn, parameter in model.named_parameters()}
    quantize_(model, everything("int8"))
    said = logits(model)
    model.dequantize()
    assert {fqn: parameter.shape for fqn, parameter in model.named_parameters()} == shapes
    torch.testing.assert_close(logits(model), said, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path)
    assert {key: shape for key, (_, shape, _) in disk(tmp_path).items()} == {
        key: shape for key, (_, shape, _) in disk(folders(family)).items()
    }
    assert_same(state(load(tmp_path)), state(model))


# ---------------------------------------------------------------------------------- what is quantized, and what is not

CONV1D = "Conv1D"
NO_WEIGHT = "not a linear, embedding or expert weight"
USUAL = (  # reasons to stay as it is that any model may give; tied weights and embeddings, because no key names them
    r"an embedding; name it or _embedding to quantize it",
    r"tied to .*; name it to quantize (both|all)",
    r"\w+: a router, where a small error picks other experts",
    r"a bias",
)
UNUSUAL: dict[str, set[str]] = {  # and those that only some families give
    "inkling": {f"Conv1d: {NO_WEIGHT}", f"InklingRelativeLogits: {NO_WEIGHT}"},
    "mamba": {f"Conv1d: {NO_WEIGHT}", f"MambaMixer: {NO_WEIGHT}"},
    "qwen2-vl": {f"Conv3d: {NO_WEIGHT}"},
    "qwen3-vl-moe": {f"Conv3d: {NO_WEIGHT}"},
}


def linears_and_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """What ought to be quantized, found by names: matrices of linears and of what lies in a module of experts, without
    routers and what is an embedding too."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found = {}
    for fqn, parameter in model.named_parameters():
        path, _, attribute = fqn.rpartition(".")
        owner, parts = model.get_submodule(path), path.split(".")
        linear = isinstance(owner, nn.Linear) or type(owner).__name__ == CONV1D
        expert = type(owner).__name__.endswith("Experts") or any(part.endswith("experts") for part in parts)
        routes = "router" in parts or parts[-1] == "gate"
        matrix = parameter.dim() >= 2 and not attribute.endswith("bias") and id(parameter) not in tables
        if matrix and (linear or expert) and not routes:
            found[fqn] = parameter
    return found


@families
def test_nearly_all_bytes_are_quantized_and_the_rest_has_reasons(family: str, folders: Folders) -> None:
    model = load(folders(family))
    wide = {fqn for fqn, parameter in model.named_parameters() if parameter.dim() >= 2}
    sizes = {fqn: parameter.nbytes for fqn, parameter in linears_and_experts(model).items()}
    report = quantize_(model, rtn("int4-g32"))
    share = sum(size for fqn, size in sizes.items() if fqn in report.quantized) / sum(sizes.values())
    reasons = sorted(set(report.skipped.values()))
    print(f"{family:12} {share:7.1%}  {'; '.join(reasons)}")  # the table of `pytest -s`
    assert share >= 0.95
    assert set(report.quantized) | set(report.skipped) >= wide and not set(report.quantized) & set(report.skipped)
    assert {why for why in reasons if not any(re.fullmatch(usual, why) for usual in USUAL)} == UNUSUAL.get(
        family, set()
    )


# ---------------------------------------------------------------------------------- what a weight is quantized along

EXPERTS = {  # family -> how many experts a weight holds, by the end of its name
    "mixtral": {"experts.gate_up_proj": 4, "experts.down_proj": 4},
    "gpt-oss": {"experts.gate_up_proj": 4, "experts.down_proj": 4},
    "qwen3-moe": {"experts.gate_up_proj": 4, "experts.down_proj": 4},
    "deepseek-v3": {"experts.gate_up_proj": 4, "experts.down_proj": 4},
    "glm4-moe": {"experts.gate_up_proj": 4, "experts.down_proj": 4},
    "qwen3-vl-moe": {"experts.gate_up_proj": 4, "experts.down_proj": 4},
    "llama4": {"experts.gate_up_proj": 4, "experts.down_proj": 4},
    "dbrx": {f"experts.mlp.{name}": 4 for name in ("w1", "v1", "w2")},
    "longcat": {"experts.gate_up_proj": 6, "experts.down_proj": 4},
    "jetmoe": {"input_linear.weight": 4, "output_linear.weight": 4},
    "inkling": {
        **{"experts.gate_up_proj": 4, "experts.down_proj": 4},
        **{f"shared_experts.{name}_proj": 2 for name in ("gate", "up", "down")},
    },
}
IN_OUT = {  # family -> names of weights that stand as [in, out]
    **dict.fromkeys(("gpt2", "openai-gpt"), r".*\.c_\w+\.weight"),
    **dict.fromkeys(("gpt-oss", "llama4"), r".*experts\.\w+"),
    "dbrx": r".*experts\.mlp\.w2",
}


@families
@pytest.mark.parametrize("scheme", ["int4-g32", "int8-tensor"])
def test_scales_run_along_the_inputs_of_each_matrix(family: str, scheme: str, folders: Folders) -> None:
    """Every matrix is quantized as it would be alone and as [out, in], and stands as its module expects it."""
    model, config = load(folders(family)), parse_scheme(scheme).with_algorithm("rtn")
    plain = {fqn: parameter.detach() for fqn, parameter in model.named_parameters()}
    quantize_(model, everything(scheme))
    stacks = {}
    for fqn, weight in dict(weights(model)).items():
        if fqn not in plain:
            continue  # another name of a tied weight
        whole = plain[fqn]
        if family == "dbrx" and ".experts." in fqn:
            whole = whole.view(4, -1, whole.shape[1])  # as its module views them, which lie one under another
        assert weight.shape == whole.shape
        swap = re.fullmatch(IN_OUT.get(family, "-"), fqn) is not None
        matrices = whole if whole.dim() == 3 else [whole]
        alone = [quantize_weight(m.t() if swap else m, config) for m in matrices]
        for found, wanted in zip(weight if whole.dim() == 3 else [weight], alone, strict=True):
            assert torch.equal(found.t() if swap else found, wanted), fqn
        if whole.dim() == 3:
            stacks[next(end for end in EXPERTS[family] if fqn.endswith(f".{end}"))] = len(weight.scale)
    assert stacks == EXPERTS.get(family, {})
