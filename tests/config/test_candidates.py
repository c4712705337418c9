"""The inventory of a model: exact on tiny real models, the same for a skeleton as for the loaded model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from llmquant.config import candidates
from llmquant.config.candidates import Candidate, Inventory, Role, find_candidates

HIDDEN, INNER, VOCAB, LAYERS, EXPERTS = 32, 16, 64, 2, 4
COMMON = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**COMMON, tie_word_embeddings=False),
    "llama-tied": lambda: transformers.LlamaConfig(**COMMON, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=HIDDEN, n_layer=LAYERS, n_head=2, n_positions=24, vocab_size=VOCAB, bos_token_id=1, eos_token_id=2
    ),
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, num_local_experts=EXPERTS),
    "gpt-oss": lambda: transformers.GptOssConfig(**COMMON, num_local_experts=EXPERTS, head_dim=16),
}

ATTENTION = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
Expected = dict[tuple[str, ...], tuple[tuple[Role, ...], tuple[int, ...], bool]]


def build(name: str, device: str) -> nn.Module:
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())


def linears(prefix: str, shapes: dict[str, tuple[int, ...]], role: Role, transposed: bool = False) -> Expected:
    suffix = "" if role is Role.experts else ".weight"
    return {(f"{prefix}.{leaf}{suffix}",): ((role,), shape, transposed) for leaf, shape in shapes.items()}


def embedding_and_head(tied: bool) -> Expected:
    embedding, head, shape = "model.embed_tokens.weight", "lm_head.weight", (VOCAB, HIDDEN)
    if tied:
        return {(embedding, head): ((Role.embedding, Role.head), shape, False)}
    return {(embedding,): ((Role.embedding,), shape, False), (head,): ((Role.head,), shape, False)}


def expect_llama(tied: bool) -> Expected:
    mlp = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    expected = embedding_and_head(tied)
    for i in range(LAYERS):
        expected |= linears(f"model.layers.{i}.self_attn", ATTENTION, Role.linear)
        expected |= linears(f"model.layers.{i}.mlp", mlp, Role.linear)
    return expected


def expect_gpt2() -> Expected:
    shape = (VOCAB, HIDDEN)
    expected: Expected = {
        ("transformer.wte.weight", "lm_head.weight"): ((Role.embedding, Role.head), shape, False),
        ("transformer.wpe.weight",): ((Role.embedding,), (24, HIDDEN), False),
    }
    for i in range(LAYERS):
        attention = {"c_attn": (HIDDEN, 3 * HIDDEN), "c_proj": (HIDDEN, HIDDEN)}
        mlp = {"c_fc": (HIDDEN, 4 * HIDDEN), "c_proj": (4 * HIDDEN, HIDDEN)}
        expected |= linears(f"transformer.h.{i}.attn", attention, Role.conv1d, transposed=True)
        expected |= linears(f"transformer.h.{i}.mlp", mlp, Role.conv1d, transposed=True)
    return expected


def expect_moe(attention: dict[str, tuple[int, ...]], transposed: bool) -> Expected:
    shapes = {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    stacked = {leaf: (EXPERTS, *(shape[::-1] if transposed else shape)) for leaf, shape in shapes.items()}
    expected = embedding_and_head(tied=False)
    for i in range(LAYERS):
        expected |= linears(f"model.layers.{i}.self_attn", attention, Role.linear)
        expected |= linears(f"model.layers.{i}.mlp.experts", stacked, Role.experts, transposed)
    return expected


EXPECTED: dict[str, Expected] = {
    "llama": expect_llama(tied=False),
    "llama-tied": expect_llama(tied=True),
    "gpt2": expect_gpt2(),
    "mixtral": expect_moe(ATTENTION, transposed=False),
    "gpt-oss": expect_moe(ATTENTION, transposed=True),
}

NOT_A_WEIGHT = "not a linear, embedding or expert weight"
A_ROUTER = "a router, where a small error picks other experts"
REASONS = {  # all that a model's other parameters may be told
    "llama": {"a norm"},
    "llama-tied": {"a norm"},
    "gpt2": {"a norm", "a bias"},
    "mixtral": {"a norm", f"MixtralTopKRouter: {A_ROUTER}"},
    "gpt-oss": {"a norm", "a bias", "1-D", f"GptOssTopKRouter: {A_ROUTER}"},
}


def described(inventory: Inventory) -> Expected:
    return {c.fqns: (c.roles, c.shape, c.transposed) for c in inventory.candidates}


def assert_accounts_for_all(inventory: Inventory, model: nn.Module) -> None:
    """Every name of every parameter is in exactly one place, in model order."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    quantizable = [fqn for candidate in inventory.candidates for fqn in candidate.fqns]
    assert sorted([*quantizable, *inventory.others]) == sorted(names)
    assert list(inventory.others) == [name for name in names if name in inventory.others]
    canonical = [candidate.name for candidate in inventory.candidates]
    assert canonical == [name for name in names if name in canonical]


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("name", CONFIGS)
def test_real_model(name: str, device: str) -> None:
    model = build(name, device)
    inventory = find_candidates(model)
    assert described(inventory) == EXPECTED[name]
    assert set(inventory.others.values()) == REASONS[name]
    assert_accounts_for_all(inventory, model)


@pytest.mark.parametrize("name", CONFIGS)
def test_skeleton_equals_loaded_model(name: str) -> None:
    assert find_candidates(build(name, "meta")) == find_candidates(build(name, "cpu"))


def test_llama4_experts_are_transposed_though_they_do_not_say_so() -> None:
    config = transformers.Llama4TextConfig(**COMMON, num_local_experts=2, intermediate_size_mlp=48, head_dim=16)
    config.moe_layers = [1]
    with torch.device("meta"):
        model = transformers.Llama4ForCausalLM(config)
    experts = {c.name: c for c in find_candidates(model).candidates if c.roles == (Role.experts,)}
    prefix = "model.layers.1.feed_forward.experts"
    assert {name: (c.shape, c.transposed) for name, c in experts.items()} == {
        f"{prefix}.gate_up_proj": ((2, HIDDEN, 2 * INNER), True),
        f"{prefix}.down_proj": ((2, INNER, HIDDEN), True),
    }


MIXTURE = {"num_experts": EXPERTS, "moe_intermediate_size": INNER}
# A model of every way to write a router with a linear, and what its linears that route are told.
ROUTED: dict[str, tuple[Callable[[], transformers.PretrainedConfig], dict[str, str]]] = {
    "llama4": (
        lambda: transformers.Llama4TextConfig(
            **COMMON, num_local_experts=2, intermediate_size_mlp=48, head_dim=16, moe_layers=[1]
        ),
        {"model.layers.1.feed_forward.router.weight": f"Llama4Router: {A_ROUTER}"},
    ),
    "phimoe": (
        lambda: transformers.PhimoeConfig(**COMMON, num_local_experts=EXPERTS),
        {f"model.layers.{i}.mlp.router.weight": f"PhimoeTopKRouter: {A_ROUTER}" for i in range(LAYERS)},
    ),
    "afmoe": (
        lambda: transformers.AfmoeConfig(**COMMON, **MIXTURE, head_dim=16, num_dense_layers=1),
        {"model.layers.1.mlp.router.gate.weight": f"AfmoeTokenChoiceRouter: {A_ROUTER}"},
    ),
    "hunyuan": (
        lambda: transformers.HunYuanMoEV1Config(**COMMON, num_experts=EXPERTS, moe_topk=2, head_dim=16),
        {f"model.layers.{i}.mlp.gate.wg.weight": f"HunYuanMoEV1Gate: {A_ROUTER}" for i in range(LAYERS)},
    ),
    "qwen2-moe": (
        lambda: transformers.Qwen2MoeConfig(**COMMON, **MIXTURE, shared_expert_intermediate_size=INNER),
        {f"model.layers.{i}.mlp.shared_expert_gate.weight": "the gate of a shared expert" for i in range(LAYERS)},
    ),
}


@pytest.mark.parametrize("name", ROUTED)
def test_linears_that_choose_among_experts_stay_as_they_are(name: str) -> None:
    config, expected = ROUTED[name]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config())
    inventory = find_candidates(model)
    linears = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {fqn: why for fqn, why in inventory.others.items() if fqn in linears} == expected
    assert_accounts_for_all(inventory, model)


def test_what_is_only_called_a_gate_is_no_router() -> None:
    class RouterTraining(nn.Module):  # the name of no router, though it has the word
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.gate, self.router_proj = (nn.Linear(4, 4, bias=False) for _ in range(3))

    names = {"part.gate_proj.weight", "part.gate.weight", "part.router_proj.weight"}
    assert {c.name for c in find_candidates(nn.ModuleDict({"part": RouterTraining()})).candidates} == names


# -------------------------------------------------------------------------------- ties


class Two(nn.Module):
    """A head registered before the embedding, so that model order and a declared tie can disagree."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(4, 8, bias=False)
        self.embed = nn.Embedding(8, 4)


TIE = {"lm_head.weight": "embed.weight"}


def tied_names(model: nn.Module) -> list[tuple[str, ...]]:
    return [candidate.fqns for candidate in find_candidates(model).candidates]


def test_tie_by_identity_is_named_after_the_first_name() -> None:
    model = Two()
    model.embed.weight = model.lm_head.weight
    assert tied_names(model) == [("lm_head.weight", "embed.weight")]


def test_declared_source_is_canonical() -> None:
    model = Two()
    model.embed.weight = model.lm_head.weight
    model.all_tied_weights_keys = TIE
    assert tied_names(model) == [("embed.weight", "lm_head.weight")]


def test_declared_tie_joins_a_skeleton_that_is_not_tied_yet() -> None:
    model = Two().to("meta")
    assert model.embed.weight is not model.lm_head.weight
    model.all_tied_weights_keys = TIE
    assert tied_names(model) == [("embed.weight", "lm_head.weight")]


def test_loaded_model_that_was_untied_stays_untied() -> None:
    model = Two()
    model.all_tied_weights_keys = TIE
    assert tied_names(model) == [("lm_head.weight",), ("embed.weight",)]


def test_declared_ties_of_no_parameter_are_ignored() -> None:
    model = Two().to("meta")
    model.all_tied_weights_keys = {"lm_head.bias": "embed.bias", "lm_head.weight": "gone"}
    assert tied_names(model) == [("lm_head.weight",), ("embed.weight",)]


@pytest.mark.parametrize("order", [("b", "c"), ("c", "b")])
def test_chain_of_declared_ties_ends_at_its_source(order: tuple[str, str]) -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in "abc"}).to("meta")
    chain = {"b": "a", "c": "b"}
    model.all_tied_weights_keys = {f"{name}.weight": f"{chain[name]}.weight" for name in order}
    assert [(names[0], set(names)) for names in tied_names(model)] == [
        ("a.weight", {"a.weight", "b.weight", "c.weight"})
    ]


def test_module_under_two_names_is_one_weight() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": shared, "norm": nn.LayerNorm(4), "two": shared})
    inventory = find_candidates(model)
    assert [(c.fqns, c.roles) for c in inventory.candidates] == [(("one.weight", "two.weight"), (Role.linear,) * 2)]
    assert [fqn for fqn, why in inventory.others.items() if why == "a bias"] == ["one.bias", "norm.bias", "two.bias"]
    assert_accounts_for_all(inventory, model)
    assert inventory.candidates[0].tied


def test_weight_that_one_owner_cannot_bear_is_no_candidate_under_any_name() -> None:
    model = Two()
    model.embed = nn.Embedding(8, 4, max_norm=1.0)
    model.lm_head.weight = model.embed.weight
    why = "Embedding: max_norm renormalises the weight in place"
    assert find_candidates(model) == Inventory(
        (), {"lm_head.weight": f"tied to embed.weight ({why})", "embed.weight": why}
    )


# -------------------------------------------------------------------------------- modules


class Head(Two):
    """A model whose output embedding is whatever the test says, under a name that is not lm_head."""

    def __init__(self, answer: Callable[[nn.Module], object]) -> None:
        super().__init__()
        self.out = nn.Linear(4, 8, bias=False)
        self.answer = answer

    def get_output_embeddings(self) -> object:
        return self.answer(self)


def no_head(model: nn.Module) -> object:
    raise NotImplementedError("a backbone")


@pytest.mark.parametrize(
    ("answer", "head"),
    [
        pytest.param(lambda model: model.out, "out.weight", id="declared"),
        pytest.param(lambda model: None, "lm_head.weight", id="none"),
        pytest.param(no_head, "lm_head.weight", id="raises"),
        pytest.param(lambda model: nn.Identity(), "lm_head.weight", id="not a linear"),
    ],
)
def test_head_is_declared_or_else_named_lm_head(answer: Callable[[nn.Module], object], head: str) -> None:
    inventory = find_candidates(Head(answer))
    assert [c.name for c in inventory.candidates if c.roles == (Role.head,)] == [head]
    assert len(inventory.candidates) == 3


class TinyExperts(nn.Module):
    """Undecorated fused experts."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 3
        self.w1 = nn.Parameter(torch.zeros(3, 8, 4))
        self.w1_bias = nn.Parameter(torch.zeros(3, 1, 8))
        self.scale = nn.Parameter(torch.zeros(3, 4))


class SharedExperts(nn.Module):
    """Undecorated fused experts that count themselves by another name, beside a stack of something else."""

    def __init__(self) -> None:
        super().__init__()
        self.n_shared_experts = 2
        self.up_proj = nn.Parameter(torch.zeros(2, 8, 4))
        self.filters = nn.Parameter(torch.zeros(5, 8, 4))


class TinyExpertGLU(nn.Module):
    """Experts that lie one under another."""

    def __init__(self) -> None:
        super().__init__()
        self.moe_num_experts = 3
        self.w1, self.v1, self.w2 = (nn.Parameter(torch.zeros(3 * 8, 4)) for _ in range(3))
        self.b1 = nn.Parameter(torch.zeros(4))


class Loose(nn.Module):
    """3-D and 2-D parameters in a module that is nothing known."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 3
        self.stack = nn.Parameter(torch.zeros(3, 8, 4))
        self.weight = nn.Parameter(torch.zeros(8, 4))


def linear_with(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(4, 8, bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class SubLinear(nn.Linear):
    """A subclass that adds a matrix of its own."""

    def __init__(self) -> None:
        super().__init__(4, 8, bias=False)
        self.extra = nn.Parameter(torch.zeros(2, 4))


MODULES: dict[str, tuple[Callable[[], nn.Module], dict[str, Role], dict[str, str]]] = {
    "linear": (lambda: nn.Linear(4, 8), {"weight": Role.linear}, {"bias": "a bias"}),
    "linear subclass": (SubLinear, {"weight": Role.linear}, {"extra": f"SubLinear: {NOT_A_WEIGHT}"}),
    "embedding": (lambda: nn.Embedding(8, 4), {"weight": Role.embedding}, {}),
    "embedding with max_norm": (
        lambda: nn.Embedding(8, 4, max_norm=2.0),
        {},
        {"weight": "Embedding: max_norm renormalises the weight in place"},
    ),
    "experts": (
        TinyExperts,
        {"w1": Role.experts},
        {"w1_bias": "a bias", "scale": f"TinyExperts: {NOT_A_WEIGHT}"},
    ),
    "shared experts": (
        SharedExperts,
        {"up_proj": Role.experts},
        {"filters": f"SharedExperts: {NOT_A_WEIGHT}"},
    ),
    "flat experts": (
        TinyExpertGLU,
        dict.fromkeys(("w1", "v1", "w2"), Role.experts),
        {"b1": "1-D"},
    ),
    "3-D but no experts": (
        Loose,
        {},
        {"stack": f"Loose: {NOT_A_WEIGHT}", "weight": f"Loose: {NOT_A_WEIGHT}"},
    ),
    "conv2d": (lambda: nn.Conv2d(2, 2, 3, bias=False), {}, {"weight": f"Conv2d: {NOT_A_WEIGHT}"}),
    "layer norm": (lambda: nn.LayerNorm((2, 4)), {}, {"weight": "a norm", "bias": "a bias"}),
    "linear of 3-D weight": (
        lambda: linear_with(torch.zeros(3, 8, 4)),
        {},
        {"weight": f"Linear: {NOT_A_WEIGHT}"},
    ),
    "bfloat16": (lambda: nn.Linear(4, 8, bias=False, dtype=torch.bfloat16), {"weight": Role.linear}, {}),
    "int8": (
        lambda: linear_with(torch.zeros(8, 4, dtype=torch.int8)),
        {},
        {"weight": "stored as int8, not as a plain float"},
    ),
    "float8": (
        lambda: linear_with(torch.zeros(8, 4).to(torch.float8_e4m3fn)),
        {},
        {"weight": "stored as float8_e4m3fn, not as a plain float"},
    ),
}


@pytest.mark.parametrize("case", MODULES)
def test_module(case: str) -> None:
    make, roles, others = MODULES[case]
    model = nn.ModuleDict({"it": make()})
    inventory = find_candidates(model)
    assert {c.name: c.roles for c in inventory.candidates} == {f"it.{name}": (role,) for name, role in roles.items()}
    assert inventory.others == {f"it.{name}": why for name, why in others.items()}
    assert_accounts_for_all(inventory, model)


def test_quantized_weight_is_no_candidate() -> None:
    model = nn.ModuleDict({"it": linear_with(torch.zeros(8, 4))})
    assert find_candidates(model).candidates
    model["it"].weight.qdata = torch.zeros(1)
    assert find_candidates(model) == Inventory((), {"it.weight": "already quantized"})


def test_candidate_describes_the_parameter_as_it_stands() -> None:
    model = nn.ModuleDict({"it": nn.Linear(4, 8, bias=False, dtype=torch.float16)})
    expected = Candidate(("it.weight",), (Role.linear,), (8, 4), False, torch.float16)
    assert find_candidates(model).candidates == (expected,)
    assert (expected.name, expected.tied) == ("it.weight", False)


def test_experts_one_under_another_are_described_as_a_stack() -> None:
    found = find_candidates(nn.ModuleDict({"it": TinyExpertGLU()})).candidates
    assert {c.name: (c.shape, c.transposed) for c in found} == {
        "it.w1": ((3, 8, 4), False),
        "it.v1": ((3, 8, 4), False),
        "it.w2": ((3, 8, 4), True),
    }


def test_model_that_is_one_linear() -> None:
    assert [c.name for c in find_candidates(nn.Linear(4, 8)).candidates] == ["weight"]


def test_import_does_not_pull_in_transformers() -> None:
    root = Path(candidates.__file__).parents[2]
    code = "import sys, llmquant.config.fqn, llmquant.config.candidates as c; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
