"""Importance matrices on disk, and the moments that they are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import VOCAB, Folders, load
from torch import Tensor, nn

from llmquant.calibrate.collect import collect_stats
from llmquant.calibrate.imatrix import load_imatrix, save_imatrix
from llmquant.calibrate.moments import Gram, HessianObserver, MeanSquareObserver
from llmquant.config.recipe import to_config, with_algorithm
from llmquant.errors import CalibrationError
from llmquant.quantize import make_plan

IDS = torch.randint(VOCAB, (6, 20), generator=torch.Generator().manual_seed(5))


def inputs_by_hook(model: nn.Module) -> dict[str, Tensor]:
    """What each linear layer met, [tokens, in]."""
    met: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, args, __, name=name: met.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        for ids in IDS.split(1):
            model(ids)
    return {f"{name}.weight": torch.cat([x.flatten(0, -2) for x in seen]) for name, seen in met.items()}


def test_moments_are_those_of_all_inputs(folders: Folders) -> None:
    config = with_algorithm(to_config("int4-g32"), "gptq")
    seen, found = inputs_by_hook(load(folders("llama"))), collect_stats(load(folders("llama")), config, IDS)
    assert set(found) == set(seen)
    for name, x in seen.items():
        stats = found[name]
        assert int(stats.tokens) == len(x) == IDS.numel()
        torch.testing.assert_close(stats.hessian, x.T @ x / len(x))
        torch.testing.assert_close(stats.mean_square, x.square().mean(0))


def test_the_mean_squares_alone_are_the_same(folders: Folders) -> None:
    seen = inputs_by_hook(load(folders("llama")))
    found = collect_stats(load(folders("llama")), "int4-g32", IDS, imatrix=True)
    for name, x in seen.items():
        torch.testing.assert_close(found[name].mean_square, x.square().mean(0))
        assert found[name].hessian is None and found[name].low is None


@pytest.mark.parametrize("fields", [("hessian",), ("hessian", "mean_square")])
def test_an_expert_that_saw_few_tokens_borrows_from_the_others(fields: tuple[str, ...], folders: Folders) -> None:
    """Below as many tokens as columns, those of all experts stand in for the rest."""
    model = load(folders("mixtral"))
    config = with_algorithm(to_config({"_experts": "int4-g32"}), "gptq")
    found = collect_stats(model, config, IDS[:2], imatrix="mean_square" in fields)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stats, columns = found[name], model.get_parameter(name).shape[-1]
    assert stats.hessian is not None and stats.tokens is not None and int(stats.tokens.min()) < columns
    everyone = (stats.hessian * 0).sum(0)
    own = []
    for index, tokens in enumerate(stats.tokens.tolist()):
        share = min(tokens / columns, 1)
        own.append((stats.hessian[index], share, tokens))
    # The mean over all tokens is a fixed point: it solves everyone = sum_i n_i h_i / n with h_i from the blend.
    total = sum(tokens for _, _, tokens in own)
    unknown = sum(tokens / total / share * (1 - share) for _, share, tokens in own if share)
    blended = sum(tokens / total / share * h for h, share, tokens in own if share)
    everyone = blended / (1 + unknown)  # type: ignore[operator]
    for h, share, tokens in own:
        if not tokens:
            torch.testing.assert_close(h, everyone)
        assert torch.linalg.eigvalsh(h - (1 - share) * everyone).min() > -1e-3 * float(h.diagonal().max())


def test_equal_inputs_are_multiplied_once() -> None:
    gram, x = Gram(), torch.randn(7, 5)
    observers = [HessianObserver(gram) for _ in range(2)]
    product = gram(x)
    for observer in observers:
        observer.update(x)
    assert gram(x) is product
    x[0] = 0
    assert gram(x) is not product
    torch.testing.assert_close(gram(x), x.T @ x)
    with torch.inference_mode():
        y = torch.randn(7, 5)
        assert gram(y) is not gram(y)  # nobody could tell that it was changed in between
    other = torch.randn(3, 5)
    for observer in observers:
        observer.update(other)
        assert observer.tokens == 10
    torch.testing.assert_close(observers[0].mean(), observers[1].mean())


def test_before_the_first_token_there_is_no_mean() -> None:
    assert MeanSquareObserver().mean() is None and HessianObserver(Gram()).mean() is None


def test_a_file_gives_back_what_was_written(folders: Folders, tmp_path: Path) -> None:
    model = load(folders("mixtral"))
    found = collect_stats(model, "int4-g32", IDS, imatrix=True)
    save_imatrix(found, tmp_path / "made" / "m.safetensors", {"text": "ids"})
    again = load_imatrix(tmp_path / "made" / "m.safetensors", make_plan(model, to_config("int4-g32")))
    assert again.keys() == set(found)
    assert all(torch.equal(again[name].mean_square, found[name].mean_square) for name in found)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["m.safetensors"]


def test_a_file_of_another_model_is_refused(folders: Folders, tmp_path: Path) -> None:
    path, config = tmp_path / "m.safetensors", to_config("int4-g32")
    save_imatrix(collect_stats(load(folders("llama")), config, IDS, imatrix=True), path)
    with pytest.raises(CalibrationError, match=r"lacks .*experts|another width"):
        load_imatrix(path, make_plan(load(folders("mixtral")), config))
    path.write_bytes(b"no tensors")
    with pytest.raises(CalibrationError, match="cannot read"):
        load_imatrix(path)
    with pytest.raises(CalibrationError, match="cannot read"):
        load_imatrix(tmp_path / "nowhere")
