"""Which weights go together, in all families."""

from __future__ import annotations

import pytest
from models import FAMILIES, build, rtn

from llmquant.quantize import make_plan
from llmquant.tune.groups import group_weights

EVERYTHING = {"_embedding": "int8", "_head": "int8", "_default": "int8"}


def groups_of(family: str, together: bool = True) -> dict[str, list[str]]:
    plan = make_plan(build(family), rtn(EVERYTHING))
    return {g.name: [m.name for m in g.members] for g in group_weights((c for c, _ in plan.chosen), together)}


def test_siblings_and_experts_are_groups_and_a_tied_weight_is_one() -> None:
    llama = groups_of("llama-tied")
    assert list(llama)[:5] == [
        "model.embed_tokens",
        "model.layers.0.self_attn.{q_proj,k_proj,v_proj}",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.{gate_proj,up_proj}",
        "model.layers.0.mlp.down_proj",
    ]
    assert not any("lm_head" in name for name in llama)
    experts = groups_of("mixtral")["model.layers.1.mlp.experts"]
    assert sorted(name.rpartition(".")[2] for name in experts) == ["down_proj", "gate_up_proj"]
    assert all(len(members) == 1 for members in groups_of("gpt2").values())  # fused already


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_in_one_group_and_names_differ(family: str, together: bool) -> None:
    plan = make_plan(build(family), rtn(EVERYTHING))
    candidates = [c for c, _ in plan.chosen]
    groups = group_weights(candidates, together)
    assert sorted(m.name for g in groups for m in g.members) == sorted(c.name for c in candidates)
    assert len({g.name for g in groups}) == len(groups)
    assert sum(g.elements for g in groups) == sum(p.numel() for p in plan_weights(family, candidates))
    assert together or all(len(g.members) == 1 for g in groups)


def plan_weights(family: str, candidates: list) -> list:  # type: ignore[type-arg]
    model = build(family)
    return [model.get_parameter(c.name) for c in candidates]
