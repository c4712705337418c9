"""An optimized model is the same model: tokens, files, hooks, gradients, copies. Only plain decoding is another way."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from models import FAMILIES, VOCAB, assert_same, build, disk, rtn, state, tokens
from torch import Tensor, nn
from transformers import DynamicCache

from llmquant import QuantizedTensor, optimize, quantize_, restore
from llmquant.integrations import lean
from llmquant.kernels import cpu
from llmquant.kernels.cpu import chain

BF16, FP32 = torch.bfloat16, torch.float32
NEW = 21


class Case(NamedTuple):
    """A model, and how many groups of its layers can be merged (None: whatever the kernels here allow)."""

    prefix: str
    dtype: torch.dtype
    scheme: Any
    sizes: dict[str, Any]
    merged: int | None = 4 if cpu.missing() is None else 0


MIXED = {"re:.*v_proj": "int6-g16", "re:.*down_proj": "int8", "?re:.*up_proj": "none", "_default": "int4-g32"}
CASES = {
    "llama-int4-bf16": Case("Llama", BF16, "int4-g32", {}),
    "llama-int4-fp32": Case("Llama", FP32, "int4-g32", dict(num_key_value_heads=4)),
    "llama-asym-tied": Case("Llama", BF16, "int3-g16-asym", dict(tie_word_embeddings=True)),
    "llama-float8": Case("Llama", FP32, "float8", {}, merged=None),
    "llama-biases": Case("Llama", FP32, "int5-g32", dict(attention_bias=True, mlp_bias=True)),
    "llama-mixed": Case("Llama", BF16, MIXED, {}, merged=0),
    "llama-tensor": Case("Llama", FP32, "int8-tensor", {}, merged=0),
    "llama-plain": Case("Llama", BF16, None, {}, merged=0),
    "llama-fp16": Case("Llama", torch.float16, None, {}, merged=0),
    "llama-rope": Case(
        "Llama", FP32, "int8", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    ),
    "qwen2-int8-bf16": Case("Qwen2", BF16, "int8", {}),
    "qwen2-plain": Case("Qwen2", FP32, None, {}, merged=0),
    "qwen3-int4-bf16": Case("Qwen3", BF16, "int4-g32", dict(head_dim=32)),
    "qwen3-int4-fp32": Case("Qwen3", FP32, "int4-g32", dict(head_dim=8)),
    "mistral-int4-bf16": Case("Mistral", BF16, "int4-g32", dict(sliding_window=None)),
    "llama-a8": Case("Llama", BF16, "a8-int4-g32", {}),
    "llama-a8-asym": Case("Llama", FP32, "a8-token-asym-int8", dict(attention_bias=True)),
    "qwen2-a8-fp16": Case("Qwen2", torch.float16, "a8-int4-g32-asym", {}),
    "llama-heads": Case("Llama", BF16, "int4-g32", dict(head_dim=64)),
    "llama-heads-fp16": Case("Llama", torch.float16, "int5-g32-asym", dict(head_dim=32)),
    "mistral-window": Case("Mistral", FP32, "int4-g32", dict(sliding_window=50)),
}
cases = pytest.mark.parametrize("case", CASES)
ONE = "llama-int4-bf16"


def make(name: str, seed: int = 0, **sizes: Any) -> Any:
    """A random model of a case, the same one every time."""
    case = CASES[name]
    entry = (case.prefix, FAMILIES["llama"][1] | case.sizes | sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, name, entry)
        model = build(name, case.dtype, seed)
    if case.scheme is not None:
        quantize_(model, rtn(case.scheme if isinstance(case.scheme, dict) else {"_default": case.scheme}))
    return model


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch size of every call that took the short path."""
    calls: list[int] = []
    decode = lean._decode

    def count(plan: Any, stack: Any, x: Tensor, *rest: Any) -> Any:
        calls.append(len(x))
        return decode(plan, stack, x, *rest)

    monkeypatch.setattr(lean, "_decode", count)
    return calls


def generate(model: Any, ids: Tensor, **kwargs: Any) -> Any:
    kwargs = {"attention_mask": torch.ones_like(ids), "do_sample": False} | kwargs
    return model.generate(
        ids, max_new_tokens=NEW, min_new_tokens=NEW, return_dict_in_generate=True, output_logits=True, **kwargs
    )


def assert_same_output(a: Any, b: Any) -> None:
    assert torch.equal(a.sequences, b.sequences)
    for x, y in zip(a.logits or (), b.logits or (), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)
    assert len(a.sequences.unique()) > 4, "a model that repeats itself shows nothing"


# ---------------------------------------------------------------------------------- the same tokens


@cases
@pytest.mark.parametrize("rows", [1, 3])
def test_logits_and_tokens_are_the_same(case: str, rows: int, short: list[int]) -> None:
    model, ids = make(case), tokens(rows)
    want = generate(model, ids)
    report = optimize(model)
    assert not short
    assert_same_output(generate(model, ids), want)
    assert short == [rows] * NEW
    assert report.layers == 2 and CASES[case].merged in (None, len(report.merged)), str(report)
    assert len(report.merged) + len(report.left) == 4
    assert {name for group in report.merged for name in group} <= dict(model.named_modules()).keys()


@pytest.mark.skipif(not chain.attention_like_torch(64, BF16), reason="attention has other bits here")
def test_a_whole_token_is_one_chain_where_it_sees_everything() -> None:
    model, ids = make("llama-heads"), tokens(2)
    optimize(model)
    plan = model.base_model.forward.plan
    generate(model, ids)
    assert [key[2] for key in plan.chained] == [True]
    padded = torch.ones_like(ids)
    padded[0, :5] = 0
    generate(model, ids, attention_mask=padded)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        generate(model, tokens(1))
    assert {key[::2] for key in plan.chained} == {(2, True), (2, False), (1, False)}


def _padded(rows: int = 3) -> dict[str, Any]:
    mask = torch.ones(rows, 12, dtype=torch.long)
    mask[0, :5] = 0
    return {"attention_mask": mask}


VARIANTS: dict[str, tuple[Callable[[], dict[str, Any]], int]] = {
    "padded": (_padded, NEW - 1),
    "padded beams": (lambda: _padded() | {"num_beams": 2}, NEW - 1),
    "beams": (lambda: {"num_beams": 3}, NEW),
    "sampled": (lambda: {"do_sample": True, "top_k": 5}, NEW),
    "static cache": (lambda: {"cache_implementation": "static"}, 0),
    "no cache": (lambda: {"use_cache": False}, 0),
    "chunked prefill": (lambda: {"prefill_chunk_size": 5}, NEW),
    "prompt lookup": (lambda: {"prompt_lookup_num_tokens": 3}, -1),
    "no mask": (lambda: {"attention_mask": None}, NEW),
    "hidden states": (lambda: {"output_hidden_states": True}, 0),
    "attentions": (lambda: {"output_attentions": True}, 0),
    "processor": (lambda: {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, NEW),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", [ONE, "qwen3-int4-fp32", "mistral-window"])
def test_every_way_to_generate_gives_the_same(case: str, variant: str, short: list[int]) -> None:
    arguments, calls = VARIANTS[variant]
    model, ids = make(case), tokens(1 if calls == -1 else 3)
    if variant == "attentions":
        model.set_attn_implementation("eager")
    torch.manual_seed(1)
    want = generate(model, ids, **arguments())
    optimize(model)
    torch.manual_seed(1)
    got = generate(model, ids, **arguments())
    assert_same_output(got, want)
    for name in ("hidden_states", "attentions"):
        for a, b in zip(getattr(got, name) or (), getattr(want, name) or (), strict=True):
            assert all(map(torch.equal, a, b))
    assert calls == -1 or len(short) == calls


def test_a_sliding_window_is_left_to_the_model_once_it_is_full(short: list[int]) -> None:
    model, ids = make("mistral-window", sliding_window=20), tokens(2)
    want = generate(model, ids)
    optimize(model)
    assert_same_output(generate(model, ids), want)
    assert len(short) == 8  # the prompt of 12, and tokens up to 19 in all


def test_a_conversation_goes_on_from_its_cache(short: list[int]) -> None:
    model, ids = make(ONE), tokens(1)
    more = torch.cat([ids, ids.flip(-1)], -1)

    def talk() -> Tensor:
        first = generate(model, ids)
        longer = torch.cat([first.sequences, more], -1)
        return generate(model, longer, past_key_values=first.past_key_values).sequences

    want = talk()
    optimize(model)
    assert torch.equal(talk(), want)
    assert len(short) == 2 * NEW - 1, "what is said second is a prompt on a filled cache"


@torch.no_grad()
def test_a_call_without_positions_or_as_embeddings(short: list[int]) -> None:
    model, ids = make(ONE), tokens(2)

    def step(**kwargs: Any) -> Any:
        cache = model(ids, use_cache=True).past_key_values
        return model(past_key_values=cache, **kwargs)

    last = ids[:, :1]
    ways = [{"input_ids": last}, {"inputs_embeds": model.get_input_embeddings()(last)}]
    want = [step(**way).logits for way in ways]
    optimize(model)
    for way, logits in zip(ways, want, strict=True):
        assert torch.equal(step(**way).logits, logits)
        assert torch.equal(step(**way, return_dict=False)[0], logits)
    assert len(short) == 4
    cache = model(ids, use_cache=True).past_key_values
    assert type(model.model(last, past_key_values=cache, return_dict=False)) is tuple
    assert len(short) == 4, "a tuple of the stack is the model's own business"


# ---------------------------------------------------------------------------------- prompts


def same(found: Tensor, wanted: Tensor) -> bool:
    """Bit for bit in 16 bits; in float32, where torch's fused norm divides at another place, but for the last ones."""
    if found.dtype == FP32:
        return torch.allclose(found, wanted, rtol=2e-5, atol=2e-5)
    return torch.equal(found, wanted)


@cases
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length", [2, 7, 40])
@torch.no_grad()
def test_prompts_and_what_follows_have_the_same_bits(case: str, rows: int, length: int, short: list[int]) -> None:
    model, ids = make(case), tokens(rows, length)
    last = ids[:, :1]

    def talk(**kwargs: Any) -> tuple[Tensor, ...]:
        cache = DynamicCache(config=model.config)
        first = model(ids, past_key_values=cache, **kwargs).logits
        return (
            first,
            cache.layers[1].keys,
            cache.layers[0].values,
            *(model(last + i, past_key_values=cache).logits for i in range(4)),
        )

    want = talk()
    optimize(model)
    positions = torch.arange(length)[None]
    for kwargs in (
        {},
        {"attention_mask": torch.ones_like(ids)},
        {"position_ids": positions},
        {"position_ids": positions.expand(rows, -1)},
    ):
        assert all(map(same, talk(**kwargs), want))
    assert short == [rows] * 5 * 4


def _row(*numbers: int) -> Tensor:
    return torch.tensor([numbers])


# Arguments of a call with 7 tokens, and how many tokens are in the cache before.
NOT_PLAIN: dict[str, tuple[dict[str, Tensor], int]] = {
    "positions from 5 on": (dict(position_ids=torch.arange(5, 12)[None]), 0),
    "positions with a gap": (dict(position_ids=_row(0, 1, 2, 10, 11, 12, 13)), 0),
    "packed sequences": (dict(position_ids=_row(0, 1, 2, 0, 1, 2, 3)), 0),
    "all at one position": (dict(position_ids=_row(*[0] * 7)), 0),
    "padding before": (dict(attention_mask=_row(0, 0, 1, 1, 1, 1, 1)), 0),
    "padding behind": (dict(attention_mask=_row(1, 1, 1, 1, 1, 0, 0)), 0),
    "a hole": (dict(attention_mask=_row(1, 1, 0, 1, 1, 1, 1)), 0),
    "a second chunk": ({}, 4),
    "a second chunk with a mask": (dict(attention_mask=_row(*[1] * 11)), 4),
    "a second chunk with positions": (dict(position_ids=torch.arange(4, 11)[None]), 4),
    "a second chunk from 0 on": (dict(position_ids=torch.arange(7)[None]), 4),
    "a mask of four dimensions": (dict(attention_mask=torch.ones(1, 1, 7, 7, dtype=torch.bool)), 0),
}


@pytest.mark.parametrize("case", [ONE, "llama-a8", "qwen3-int4-fp32", "mistral-window"])
@pytest.mark.parametrize("name", NOT_PLAIN)
@torch.no_grad()
def test_a_prompt_that_is_not_plain_is_left_to_the_model(case: str, name: str, short: list[int]) -> None:
    arguments, before = NOT_PLAIN[name]
    model, ids = make(case), tokens(1, 7)

    def call(**kwargs: Tensor) -> Tensor:
        cache = DynamicCache(config=model.config)
        if before:
            model(ids[:, :before].flip(-1), past_key_values=cache)
        short.clear()
        return model(ids, past_key_values=cache, **kwargs).logits

    want, plain = call(**arguments), call()
    optimize(model)
    got = call(**arguments)
    assert not short and torch.equal(got, want)
    assert same(call(), plain) and len(short) == (not before)
    changes = any(
        k == "position_ids" and not torch.equal(v - v[0, 0], torch.arange(7)[None]) for k, v in arguments.items()
    )
    assert not changes or not torch.equal(want, plain), "arguments that change nothing show nothing"


@torch.no_grad()
def test_products_do_not_forget_their_activation() -> None:
    """int8 activations move the logits, so an optimized model that lost them would show."""
    outputs = []
    for case in ("llama-a8", ONE):
        model, ids = make(case), tokens(2)
        cache, wanted = model(ids).past_key_values, model(ids).logits
        following = model(ids[:, :1], past_key_values=cache).logits
        optimize(model)
        got = model(ids)
        assert torch.equal(got.logits, wanted)
        assert torch.equal(model(ids[:, :1], past_key_values=got.past_key_values).logits, following)
        outputs.append((wanted, following))
    assert not any(map(torch.equal, *outputs))


@pytest.mark.parametrize("case", [ONE, "llama-a8"])
def test_threads_share_an_optimized_model(case: str) -> None:
    model, steps = make(case, hidden_size=256, intermediate_size=512), 30
    prompts = [(tokens(1, 6 + i) + i) % VOCAB for i in range(4)]

    @torch.no_grad()
    def talk(ids: Tensor) -> list[Tensor]:
        cache = DynamicCache(config=model.config)
        logits = [model(ids, past_key_values=cache).logits]
        for i in range(steps):
            logits.append(model((ids[:, :1] + i) % VOCAB, past_key_values=cache).logits)
        return logits

    want = [talk(ids) for ids in prompts]
    optimize(model)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(prompts)) as pool:
            got = list(pool.map(talk, prompts * 3))
    finally:
        sys.setswitchinterval(interval)
    for found, wanted in zip(got, want * 3, strict=True):
        assert all(map(torch.equal, found, wanted))


# ---------------------------------------------------------------------------------- the same model


@pytest.mark.parametrize(
    "case", [ONE, "llama-asym-tied", "qwen2-int8-bf16", "llama-mixed", "llama-plain", "qwen3-int4-fp32"]
)
def test_saved_files_and_memory_are_the_same(case: str, tmp_path: Path) -> None:
    model = make(case)
    before, memory = state(model), _memory(model)
    model.save_pretrained(tmp_path / "before")
    optimize(model)
    model.save_pretrained(tmp_path / "after")
    assert_same(state(model), before)
    assert_same(disk(tmp_path / "after"), disk(tmp_path / "before"))
    assert {p.name for p in (tmp_path / "after").iterdir()} == {p.name for p in (tmp_path / "before").iterdir()}
    assert _memory(model) == memory


def _memory(model: nn.Module) -> int:
    """Bytes of all storages, each counted once."""
    parts = [
        inner
        for p in model.parameters()
        for inner in ([t for _, t in p.parts()] if isinstance(p, QuantizedTensor) else [p])
    ]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in parts}.values())


@pytest.mark.parametrize("case", [ONE, "llama-plain", "llama-mixed"])
def test_restore_undoes_everything(case: str, short: list[int]) -> None:
    model, ids = make(case), tokens(1)
    want, before = generate(model, ids), state(model)
    optimize(model)
    restore(model)
    assert "forward" not in model.model.__dict__
    assert_same(state(model), before)
    attention = model.model.layers[0].self_attn
    q, k = attention.q_proj.weight, attention.k_proj.weight
    storages = [(t.qdata if isinstance(t, QuantizedTensor) else t).untyped_storage().data_ptr() for t in (q, k)]
    assert storages[0] != storages[1]
    assert_same_output(generate(model, ids), want)
    restore(model)
    assert not short


def test_optimizing_twice_changes_nothing() -> None:
    model = make(ONE)
    first = optimize(model)
    plan, q = model.model.forward.plan, model.model.layers[0].self_attn.q_proj.weight
    assert optimize(model) == first
    assert model.model.forward.plan is plan and model.model.layers[0].self_attn.q_proj.weight is q


@pytest.mark.parametrize("case", [ONE, "llama-plain", "qwen2-int8-bf16"])
def test_a_change_of_dtype_is_followed(case: str, short: list[int]) -> None:
    model, ids = make(case), tokens(2)
    reference = copy.deepcopy(model).to(FP32)
    optimize(model)
    generate(model, ids)
    model.to(FP32)
    assert_same_output(generate(model, ids), generate(reference, ids))
    assert len(short) == 2 * NEW
    plan, q = model.model.forward.plan, model.model.layers[0].self_attn.q_proj.weight
    assert len(plan.merged) == CASES[case].merged
    if plan.merged:
        assert plan.layers[0].qkv[0].weight.qdata.data_ptr() == q.data_ptr(), "the old copy is not kept"
    assert _memory(model) == _memory(reference), "merged again, without a second copy"


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: _through_file(model),
}


def _through_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_optimized_and_independent(how: str, short: list[int]) -> None:
    model, ids = make("llama-plain"), tokens(1)
    optimize(model)
    want = generate(model, ids)
    twin = COPIES[how](model)
    short.clear()
    assert_same_output(generate(twin, ids), want)
    assert len(short) == NEW
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(generate(twin, ids).sequences, want.sequences)
    assert_same_output(generate(model, ids), want)


def test_a_dropped_model_is_freed_at_once() -> None:
    import gc
    import weakref

    model = make(ONE)
    optimize(model)
    stack = weakref.ref(model.model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert stack() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------------------------- changes from outside


def _scaled(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(3)


def _loaded(model: Any) -> None:
    model.load_state_dict({key: t * 1.25 if t.dim() == 2 else t for key, t in model.state_dict().items()})


def _replaced(model: Any) -> None:
    model.model.layers[0].self_attn.k_proj.weight = nn.Parameter(model.model.layers[0].self_attn.k_proj.weight * -2)


def _moved(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj.weight.data = model.model.layers[0].self_attn.v_proj.weight.data * 3


def _new_norm(model: Any) -> None:
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.flip(0))


def _new_layer(model: Any) -> None:
    model.model.layers[0] = copy.deepcopy(model.model.layers[1])
    model.model.layers[0].self_attn.layer_idx = 0


@pytest.mark.parametrize("change", [_scaled, _loaded, _replaced, _moved, _new_norm, _new_layer])
def test_changed_weights_are_used(change: Callable[[Any], None], short: list[int]) -> None:
    model, ids = make("llama-plain"), tokens(1)
    reference = copy.deepcopy(model)
    optimize(model)
    before = generate(model, ids)
    change(model), change(reference)
    want = generate(reference, ids)
    assert not torch.equal(want.sequences, before.sequences)
    assert_same_output(generate(model, ids), want)
    assert len(short) == 2 * NEW


def _copied(weight: Tensor, other: Tensor) -> None:
    with torch.no_grad():
        weight.copy_(other)


@pytest.mark.parametrize("case", [ONE, "llama-biases"])
@pytest.mark.parametrize("put", [_copied, torch.utils.swap_tensors])
def test_quantized_weights_changed_in_place_are_used(case: str, put: Callable[[Tensor, Tensor], None]) -> None:
    model, other, ids = make(case), make(case, seed=1), tokens(1)
    optimize(model)
    before = generate(model, ids)
    for name, weight in model.named_parameters():
        put(weight, copy.deepcopy(other.get_parameter(name)))
    assert_same_output(generate(model, ids), generate(other, ids))
    assert not torch.equal(generate(model, ids).sequences, before.sequences)


def _stepped(weight: QuantizedTensor) -> None:
    """What an optimizer does."""
    with torch.no_grad():
        weight.scale.requires_grad_().mul_(1.5)


def _new_scale(weight: QuantizedTensor) -> None:
    weight.scale = nn.Parameter(weight.scale * 1.5)


@pytest.mark.parametrize("case", [ONE, "llama-biases"])
@pytest.mark.parametrize("train", [_stepped, _new_scale])
@pytest.mark.parametrize("when", ["before", "after"])
def test_trained_scales_are_used_and_stay_those_that_are_trained(
    case: str, train: Callable[[Any], None], when: str, short: list[int]
) -> None:
    model, other, ids = make(case), make(case), tokens(1)
    untrained = generate(model, ids).sequences
    if when == "after":
        optimize(model)
        generate(model, ids)
    trained = {}
    for one in (other, model):
        for name, weight in one.named_parameters():
            if isinstance(weight, QuantizedTensor):
                train(weight)
                trained[name] = weight.scale
    if when == "before":
        report = optimize(model)
        assert "a scale is being trained" in report.left.values() or cpu.missing()
    assert_same_output(generate(model, ids), generate(other, ids))
    assert short and not torch.equal(generate(model, ids).sequences, untrained)
    assert all(model.get_parameter(name).scale is scale for name, scale in trained.items())


def test_a_replaced_layer_class_is_respected(short: list[int]) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model, ids = make(ONE), tokens(1)
    optimize(model)
    old = model.model.layers[0].self_attn.o_proj
    new = Doubled(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    model.model.layers[0].self_attn.o_proj = new
    got = generate(model, ids)
    assert not short
    restore(model)
    assert_same_output(got, generate(model, ids))
    assert "o_proj is a Doubled" in str(optimize(model))


def test_hooks_fire_and_then_the_short_path_returns(short: list[int]) -> None:
    model, ids = make(ONE), tokens(1)
    optimize(model)
    want, seen = generate(model, ids), []
    short.clear()
    for module in (model.model.layers[1].mlp.up_proj, model.model.layers[0], model.model.norm):
        handle = module.register_forward_hook(lambda *_: seen.append(1))
        assert_same_output(generate(model, ids), want)
        handle.remove()
    assert len(seen) == 3 * NEW and not short
    generate(model, ids, output_hidden_states=True)  # leaves hooks of transformers' own behind
    assert not short
    assert_same_output(generate(model, ids), want)
    assert len(short) == NEW


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", [ONE, "llama-plain"])
def test_training_and_gradients_go_through_the_model(case: str, training: bool, short: list[int]) -> None:
    model, ids = make(case), tokens(2)
    reference = copy.deepcopy(model)
    optimize(model)
    grads = []
    for one in (model, reference):
        with torch.no_grad():
            cache = one(ids, use_cache=True).past_key_values
        inputs = one.get_input_embeddings()(ids[:, :1]).detach().requires_grad_()
        one.train(training)(inputs_embeds=inputs, past_key_values=cache).logits.float().square().sum().backward()
        grads.append([inputs.grad, *(p.grad for p in one.parameters() if p.grad is not None)])
    assert len(grads[0]) == len(grads[1]) > (10 if case == "llama-plain" else 3)
    assert all(map(torch.equal, *grads)) and grads[0][0].abs().max() > 0
    with torch.no_grad():
        model.train()(ids[:, :1], past_key_values=model(ids).past_key_values)
    assert not short


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_other_models_are_left_alone_and_the_report_says_so(family: str) -> None:
    model = build(family)
    before = state(model)
    report = optimize(model)
    assert not report.layers and not report.merged and "is none of" in str(report)
    assert_same(state(model), before)
    assert "forward" not in getattr(model, model.base_model_prefix).__dict__


def test_a_base_model_without_a_head_can_be_optimized(short: list[int]) -> None:
    model, ids = make(ONE).model, tokens(2)
    assert {name for group in optimize(model).merged for name in group} <= dict(model.named_modules()).keys()
    with torch.no_grad():
        cache = model(ids).past_key_values
        model(ids[:, :1], past_key_values=cache)
    assert short == [2]


def test_other_attention_is_reported_and_left_to_the_model(short: list[int]) -> None:
    model, ids = make(ONE), tokens(1)
    model.set_attn_implementation("eager")
    want = generate(model, ids)
    assert "attention is eager" in str(optimize(model))
    assert_same_output(generate(model, ids), want)
    assert not short


def test_a_cache_of_another_class_is_left_to_the_model(short: list[int]) -> None:
    seen: list[int] = []

    class Watched(DynamicCache):
        def update(self, keys: Tensor, values: Tensor, layer: int, *rest: Any, **kwargs: Any) -> Any:
            seen.append(layer)
            return super().update(keys, values, layer, *rest, **kwargs)

    model, ids = make(ONE), tokens(1)
    optimize(model)
    generate(model, ids, past_key_values=Watched(config=model.config))
    assert not short and seen == [0, 1] * NEW


def test_the_call_that_merges_may_be_in_inference_mode(short: list[int]) -> None:
    model, ids = make("llama-biases"), tokens(1)
    optimize(model)
    model.to(BF16)  # so that the next call merges anew
    with torch.inference_mode():
        generate(model, ids)
    assert short and not any(p.is_inference() for p in model.parameters())
    model(ids).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.bias.grad is not None
