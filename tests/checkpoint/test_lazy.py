"""A model that is read as it runs says what the loaded one says, and holds no more than it needs."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, Folders, inputs, load, logits, raw

from llmquant.checkpoint.lazy import LazyModel
from llmquant.checkpoint.source import open_source


def present(lazy: LazyModel) -> set[str]:
    return {name for name, p in lazy.model.named_parameters() if not p.is_meta}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_says_what_the_loaded_model_says(family: str, dtype: torch.dtype, folders: Folders) -> None:
    if family in ("t5", "mamba") and dtype is torch.bfloat16:
        pytest.skip("once is enough")
    folder = folders(family, dtype)
    loaded, lazy = load(folder), LazyModel(open_source(folder))
    assert present(lazy) == set()
    assert torch.equal(logits(lazy.model), logits(loaded))
    lazy.drop()
    buffers = dict(loaded.named_buffers())
    assert {n: raw(b) for n, b in lazy.model.named_buffers()} == {n: raw(b) for n, b in buffers.items()}


def test_a_block_is_gone_behind_it_and_the_rest_stays(folders: Folders) -> None:
    lazy = LazyModel(open_source(folders("llama")))
    most: list[set[str]] = []
    for layer in lazy.model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: most.append(present(lazy)))
    lazy.model(**inputs(lazy.model))
    for number, seen in enumerate(most):
        assert {n.split(".")[2] for n in seen if ".layers." in n} == {str(number)}
    assert present(lazy) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    lazy.drop()
    assert present(lazy) == set()


def test_what_is_held_stays_until_it_is_let_go_and_is_then_over(folders: Folders) -> None:
    lazy, loaded = LazyModel(open_source(folders("llama-tied"))), load(folders("llama-tied"))
    block = lazy.model.model.layers[1]
    with lazy.held("model.layers.1"):
        lazy.model(**inputs(lazy.model))
        lazy.drop()
        assert present(lazy) == {n for n, _ in loaded.named_parameters() if ".layers.1." in n}
        assert torch.equal(block.mlp.up_proj.weight, loaded.model.layers[1].mlp.up_proj.weight)
    assert present(lazy) == set()
    block.forward = lambda x, **_: x
    lazy.model(**inputs(lazy.model))
    assert not [n for n in present(lazy) if ".layers.1." in n]
    with lazy.held("", ["lm_head.weight"]):
        assert lazy.model.lm_head.weight is lazy.model.model.embed_tokens.weight
        assert raw(lazy.model.lm_head.weight) == raw(loaded.lm_head.weight)


def test_it_costs_no_memory_of_its_own(folders: Folders) -> None:
    """Modules are made without values: a parameter registered meanwhile is on the meta device, others are not."""
    LazyModel(open_source(folders("llama")))
    assert not torch.nn.Linear(2, 2).weight.is_meta
