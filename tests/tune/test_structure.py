"""What feeds what: every family is known or refused by name; variants that the table does not know are refused."""

from __future__ import annotations

import models
import pytest
import torch
from extra_families import EXTRA, build

from llmquant.errors import AlreadyQuantizedError, BadWeightError, UnknownArchitectureError
from llmquant.quantize import quantize_
from llmquant.tune.families import FAMILIES, REFUSED
from llmquant.tune.structure import find_structure

REFUSALS = {
    "openai-gpt": "behind the addition",
    "opt": "project_out",
    "inkling": "convolutions",
    "longcat": "give their input back",
    "t5": "second residual stream",
    "qwen3-vl-moe": "several depths",
}


@pytest.mark.parametrize("family", [*models.FAMILIES, *EXTRA])
def test_every_family_is_known_or_refused(family: str) -> None:
    model = build(family)
    if family in REFUSALS:
        with pytest.raises(UnknownArchitectureError, match=REFUSALS[family]):
            find_structure(model)
        return
    found = find_structure(model)
    assert len(found.feeds) >= 3 and found.feeds[-1].readers[0].name == found.head
    assert all(reader.inputs == found.hidden for feed in found.feeds for reader in feed.readers)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (found.tied_to is not None) == tied


def test_no_family_is_both_known_and_refused() -> None:
    assert not FAMILIES.keys() & REFUSED.keys()


def test_an_unknown_architecture_says_what_is_known() -> None:
    model = build("llama")
    model.config.model_type = "made_up"
    with pytest.raises(UnknownArchitectureError, match="made_up") as caught:
        find_structure(model)
    assert "mixtral" in str(caught.value)
    with pytest.raises(UnknownArchitectureError, match="Linear"):
        find_structure(torch.nn.Linear(4, 4))


def test_a_parameter_without_a_place_is_refused() -> None:
    model = build("llama")
    model.model.layers[1].mlp.extra = torch.nn.Linear(64, 64)
    with pytest.raises(UnknownArchitectureError, match=r"layers\.1\.mlp\.extra\.weight"):
        find_structure(model)


def test_a_norm_that_is_missing_is_refused() -> None:
    model = build("llama")
    model.model.layers[1].post_attention_layernorm = torch.nn.Identity()
    with pytest.raises(UnknownArchitectureError, match=r"layers\.1\.post_attention_layernorm"):
        find_structure(model)


def test_only_plain_weights_with_values() -> None:
    model = build("llama")
    model.model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(BadWeightError, match="meta"):
        find_structure(model)
    model = build("llama")
    quantize_(model, "int8")
    with pytest.raises(AlreadyQuantizedError):
        find_structure(model)
