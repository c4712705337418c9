"""What is read at a time: never more than one matrix of a stack of experts, where the files let it be had alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import FAMILIES, Folders, load, raw

from llmquant.checkpoint.shards import nbytes
from llmquant.checkpoint.source import open_source
from llmquant.checkpoint.steps import Step, pieces, plan_steps
from llmquant.config.recipe import to_config
from llmquant.quantize import make_plan

EXPERTS = ["mixtral", "gpt-oss", "qwen3-moe", "deepseek-v3", "glm4-moe", "llama4", "dbrx", "inkling", "longcat"]
EXPERTS += ["jetmoe", "qwen3-vl-moe"]


def steps_of(folder: Any, scheme: Any = "int8") -> list[Step]:
    source = open_source(folder)
    return plan_steps(source, make_plan(source.skeleton, to_config(scheme))).steps


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_read_one_by_one_and_are_those_of_the_loaded_model(family: str, folders: Folders) -> None:
    plain = load(folders(family)).state_dict()
    stacks = [s for s in steps_of(folders(family)) if s.chosen and len(s.chosen[0].shape) == 3]
    assert bool(stacks) == (family in EXPERTS)
    for step in stacks:
        assert step.chosen and step.parts == step.chosen[0].shape[0]
        parts = [step.group.read_part(i, step.parts) for i in range(step.parts)]
        assert raw(torch.cat(parts).view(plain[step.fqn].shape)) == raw(plain[step.fqn])


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "qwen3-vl-moe", "llama-tied"])
def test_experts_that_stay_in_float_are_read_one_by_one_where_they_are_gathered(family: str, folders: Folders) -> None:
    steps = {s.fqn: s for s in steps_of(folders(family), {"_experts": "none", "_default": "int8"})}
    plain = load(folders(family)).state_dict()
    for fqn, step in steps.items():
        if not step.chosen:
            assert b"".join(raw(piece[fqn])[2] for piece in pieces(step, None)) == raw(plain[fqn])[2]
            assert step.parts == (4 if len(step.group.inputs) > 1 else 1)


def test_what_is_known_beforehand_is_what_comes(folders: Folders) -> None:
    for step in steps_of(folders("gpt-oss")):
        written = dict.fromkeys(step.written, 0)
        for piece in pieces(step, None):
            for key, tensor in piece.items():
                assert tensor.dtype == step.written[key][0]
                written[key] += tensor.nbytes
        assert written == {key: nbytes(spec) for key, spec in step.written.items()}
        assert step.bytes_after == sum(written.values())
        assert step.bytes_held > (step.bytes_before + step.bytes_after) // step.parts
