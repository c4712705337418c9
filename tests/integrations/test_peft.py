"""LoRA on a frozen quantized base, through peft (the extra `peft`): it trains, saves, and loads to the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCAB, Folders, assert_same, inputs, load, logits, state
from torch import nn

from llmquant import QuantizedTensor
from llmquant.errors import UnsupportedOpError

peft = pytest.importorskip("peft")
SCHEMES = ("int4-g32", "int3-g16-asym", "a8-int4-g32", "float8", "nf4", "mxfp4")


def adapted(base: Any, **options: Any) -> Any:
    settings: dict[str, Any] = dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM") | options
    return peft.get_peft_model(base, peft.LoraConfig(**settings))


def train(model: Any, steps: int = 6) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        given = inputs(model)
        loss = model(**given, labels=given["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_adapter_trains_and_comes_back(scheme: str, folders: Folders, tmp_path: Path) -> None:
    base = load(folders.quantized("llama", scheme))
    assert base.hf_quantizer.is_trainable
    before = state(base)
    model = adapted(base)
    plain = logits(model)
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0]
    trained = logits(model)
    assert not torch.equal(trained, plain)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("model*.safetensors"))
    again = peft.PeftModel.from_pretrained(load(folders.quantized("llama", scheme)), tmp_path).eval()
    assert torch.equal(logits(again), trained)
    assert_same(state(again.unload()), before)  # the base never moved


@pytest.mark.parametrize("family", ["gpt2", "llama-tied", "mixtral"])
def test_conv1d_tied_weights_and_experts(family: str, folders: Folders) -> None:
    base = load(folders.quantized(family))
    targets: Any = {"gpt2": ["c_attn", "c_fc"], "mixtral": ["q_proj", "o_proj"]}.get(family, "all-linear")
    losses = train(adapted(base, target_modules=targets, fan_in_fan_out=family == "gpt2"))
    assert losses[-1] < losses[0] - 0.1


def test_quantized_embeddings_take_adapters_too(folders: Folders) -> None:
    model = adapted(load(folders.quantized("llama")), target_modules=["q_proj", "embed_tokens"])
    losses = train(model)
    assert losses[-1] < 0.95 * losses[0]


def test_gradients_are_those_of_the_plain_base(folders: Folders) -> None:
    """Against the same adapters on the dequantized model."""
    found = []
    for plain in (False, True):
        base = load(folders.quantized("llama", "int4-g32"))
        if plain:
            base.dequantize()
        torch.manual_seed(0)
        model = adapted(base, init_lora_weights=False)
        given = inputs(model)
        model(**given, labels=given["input_ids"]).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0] and set(found[0]) == set(found[1])
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-3, atol=1e-5), name


def test_the_preparation_for_quantized_bases_and_checkpointing(folders: Folders) -> None:
    base = load(folders.quantized("llama", "int4-g32"), dtype=torch.bfloat16)
    prepared = peft.prepare_model_for_kbit_training(base)
    weight = prepared.model.layers[0].mlp.up_proj.weight
    assert isinstance(weight, QuantizedTensor) and isinstance(weight, nn.Parameter) and not weight.requires_grad
    assert {p.dtype for p in prepared.parameters()} == {torch.float32}
    losses = train(adapted(prepared))
    assert losses[-1] < 0.9 * losses[0]


def test_a_trainer_runs(folders: Folders, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    folder = folders.quantized("llama", "int4-g32")
    model = adapted(load(folder))
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, VOCAB, (2, 12)).repeat(16, 1)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=10, save_steps=10, per_device_train_batch_size=4, learning_rate=3e-3,
        report_to=[], disable_tqdm=True, use_cpu=True, logging_steps=1, seed=0,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)  # type: ignore[arg-type]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(losses[-1]) < 0.95 * float(losses[0])
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "checkpoint-10").eval()
    assert torch.equal(logits(again), logits(model.eval()))


def test_merging_is_refused_by_name_until_the_base_is_plain(folders: Folders) -> None:
    model = adapted(load(folders.quantized("llama", "int4-g32")))
    train(model)
    expected = logits(model)
    with pytest.raises(UnsupportedOpError, match="dequantize"):
        model.merge_and_unload()
    model.get_base_model().dequantize()
    merged = model.merge_and_unload()
    assert not [p for p in merged.parameters() if isinstance(p, QuantizedTensor)]
    assert torch.allclose(logits(merged), expected, atol=1e-4)
