"""Converted graphs: what they hold, what they compute, how they are kept."""

from __future__ import annotations

import io

import pytest
import torch
from flow import attention, converted, exported, images, prepared, sqnr, targets
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llmquant.errors import CalibrationError
from llmquant.pt2e import (
    X86Quantizer,
    allow_exported_model_train_eval,
    convert_pt2e,
    get_default_x86_inductor_quantization_config,
    lower,
    move_exported_model_to_eval,
    move_exported_model_to_train,
    prepare_pt2e,
    prepare_qat_pt2e,
)
from llmquant.pt2e.fold import fold_batch_norms

aten, ops = torch.ops.aten, torch.ops.quantized_decomposed


@pytest.mark.parametrize("make", [attention, images])
def test_weights_become_bytes_and_outputs_stay_near(make):
    model, x = make()
    graph = converted(model, x)
    kept = {name: value for name, value in graph.state_dict().items() if value.dim() > 1}
    assert kept and all(value.dtype == torch.int8 for value in kept.values())
    with torch.no_grad():
        assert 28 < sqnr(model(x), graph(x)) < 65


def test_every_reader_has_a_dequantize_node_of_its_own():
    model, x = attention()
    graph = converted(model, x)
    for node in graph.graph.nodes:
        if node.target is ops.dequantize_per_tensor.default:
            assert len(node.users) == 1


def test_what_was_not_calibrated_is_named():
    model, x = attention()
    graph = prepare_pt2e(exported(model, x), X86Quantizer())
    before = targets(graph)
    with pytest.raises(CalibrationError, match="x -> linear"):
        convert_pt2e(graph)
    assert targets(graph) == before  # nothing was changed
    graph(x)
    assert ops.quantize_per_tensor.default in targets(convert_pt2e(graph))


def test_tied_weights_have_one_set_of_codes():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.arange(12).reshape(2, 6)
    graph = converted(model, ids)
    assert [value.dtype for value in graph.state_dict().values()].count(torch.int8) == 1
    assert 30 < sqnr(model(ids), graph(ids)) < 60


@pytest.mark.parametrize("mode", ["static", "dynamic", "token"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_whole_language_models(family, mode):
    torch.manual_seed(0)
    if family == "llama":
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32))
    ids = torch.randint(0, 64, (1, 8))

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model.eval()

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    config = get_default_x86_inductor_quantization_config(is_dynamic=mode != "static", per_token=mode == "token")
    with torch.no_grad():
        graph = converted(Logits(), ids, X86Quantizer().set_global(config))
        products = 7 * 2 + 1 if family == "llama" else 4 * 2 + 1  # and embeddings, for lookups
        lowered, report = lower(graph)
        assert len(report.int8) >= products and not report.refused
        assert 15 < sqnr(Logits()(ids), lowered(ids)) < 60


def test_saved_and_loaded_it_is_the_same():
    model, x = images()
    with torch.no_grad():
        graph = converted(model, x)
        kept = io.BytesIO()
        torch.export.save(torch.export.export(graph, (x,)), kept)
        kept.seek(0)
        loaded = torch.export.load(kept).module()
        assert torch.equal(loaded(x), graph(x))
        (ours, report), (theirs, again) = lower(graph), lower(loaded)
        assert torch.equal(ours(x), theirs(x)) and report.int8.keys() == again.int8.keys()


def test_batch_norms_are_folded():
    model, x = images()
    graph = exported(model, x)
    with torch.no_grad():
        wanted = graph(x)
        assert fold_batch_norms(graph) == 2
        assert aten.batch_norm.default not in targets(graph)
        torch.testing.assert_close(graph(x), wanted, rtol=1e-4, atol=1e-5)


def test_batch_norms_that_others_read_through_stay():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x):
            y = self.conv(x)
            return y + self.norm(y)

    graph = exported(Both().eval(), torch.randn(1, 2, 3, 3))
    assert fold_batch_norms(graph) == 0


def test_modes_of_exported_models():
    torch.manual_seed(0)
    model, x = images(dropout=0.5)
    graph = torch.export.export(model.train(), (x,)).module()
    allow_exported_model_train_eval(graph)
    assert not torch.equal(graph(x), graph(x))
    graph.eval()
    assert torch.equal(graph(x), graph(x)) and not graph.training
    reference = model.eval()(x)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), reference)
    move_exported_model_to_train(graph)
    assert not torch.equal(graph(x), graph(x)) and graph.training
    move_exported_model_to_eval(graph)
    assert torch.equal(graph(x), graph(x))


def test_training_learns_and_converts_to_what_it_computed():
    torch.manual_seed(0)
    model, x = images()
    wanted = torch.tensor([1, 3])
    config = get_default_x86_inductor_quantization_config(is_qat=True)
    graph = prepare_qat_pt2e(torch.export.export(model.train(), (x,)).module(), X86Quantizer().set_global(config))
    optimizer, losses = torch.optim.SGD(graph.parameters(), lr=0.1), []
    for _ in range(12):
        loss = nn.functional.cross_entropy(graph(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    graph.eval()
    with torch.no_grad():
        seen = graph(x)
        graph = convert_pt2e(graph)
        torch.testing.assert_close(graph(x), seen, rtol=0, atol=1e-6)
        assert len(lower(graph)[1].int8) == 3


def test_importing_graph_mode_imports_no_torchao():
    import subprocess
    import sys

    code = "import sys, llmquant.pt2e as p; p.prepare_pt2e, p.lower, p.compile; print('torchao' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_prepared_graphs_compute_the_same():
    model, x = attention()
    with torch.no_grad():
        assert torch.equal(prepared(model, x)(x), exported(model, x)(x))
