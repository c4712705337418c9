"""The resolver against a brute-force oracle, its laws, and what its errors say."""

from __future__ import annotations

import copy
import pickle
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st

from llmquant.config.candidates import Candidate, Inventory, Role
from llmquant.config.fqn import RESERVED_KEYS, Config, FqnToConfig, resolve
from llmquant.errors import ConfigError, ConflictingConfigError, LlmQuantError, UnmatchedKeyError


def weight(*names: str, roles: tuple[Role, ...] = (Role.linear,)) -> Candidate:
    return Candidate(names, roles if len(roles) == len(names) else roles * len(names), (8, 8), False, torch.float32)


TIED = (Role.embedding, Role.head)
EMBED, HEAD, Q, K, W1, W2 = (
    "model.embed.weight",
    "lm_head.weight",
    "model.layers.0.attn.q.weight",
    "model.layers.0.attn.k.weight",
    "model.layers.0.experts.w1",
    "model.layers.0.experts.w2",
)
OTHERS = {
    "model.layers.0.attn.q.bias": "a bias",
    "model.layers.0.norm.weight": "a norm",
    "model.layers.0.norm.bias": "a bias",
    "model.vision.conv.weight": "Conv2d: not a linear, embedding or expert weight",
}
LAYER = (weight(Q), weight(K), weight(W1, roles=(Role.experts,)), weight(W2, roles=(Role.experts,)))
UNTIED_MODEL = Inventory(
    (weight(EMBED, roles=(Role.embedding,)), *LAYER, weight(HEAD, roles=(Role.head,))),
    OTHERS,
)
TIED_MODEL = Inventory((weight(EMBED, HEAD, roles=TIED), *LAYER), OTHERS)


# -------------------------------------------------------------------------------- the oracle


@dataclass(frozen=True)
class Scenario:
    """A config and a model, both at random."""

    keys: dict[str, Config | None]
    inventory: Inventory


POOL = {
    "layers.0.q.weight": Role.linear,
    "layers.0.up.weight": Role.linear,
    "layers.1.q.weight": Role.conv1d,
    "layers.0.experts.w1": Role.experts,
    "layers.0.experts.w2": Role.experts,
    "embed.weight": Role.embedding,
    "pos.weight": Role.embedding,
    "lm_head.weight": Role.head,
}
POOL_OTHERS = {"norm.weight": "a norm", "layers.0.q.bias": "a bias", "layers.1.gate.weight": "Router: not a linear"}
EXACT = [*POOL, *(name.rpartition(".")[0] for name in POOL), *POOL_OTHERS, "norm", "layers.0", "nonsense"]
PATTERNS = [
    "re:.*",
    r"re:layers\.\d\.q",
    r"re:layers\.0\..*",
    "re:.*weight",
    r"re:(embed|lm_head)\..*",
    "re:q",
    "re:.*w1",
]
PATTERNS += ["re:norm.*", "re:.*experts", "re:lm_.*|pos", r"re:layers\.0", "re:embed.w", "re:"]


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    names = draw(st.lists(st.sampled_from(sorted(POOL)), unique=True, min_size=1))
    groups: dict[int, list[str]] = {}
    for number, name in enumerate(names):
        groups.setdefault(draw(st.sampled_from([number, number, 0])), []).append(name)
    candidates = tuple(weight(*group, roles=tuple(POOL[name] for name in group)) for group in groups.values())
    present = st.sampled_from([key for name in names for key in (name, name.rpartition(".")[0])])
    key = st.one_of(present, st.sampled_from(PATTERNS), st.sampled_from(RESERVED_KEYS), st.sampled_from(sorted(EXACT)))
    bare = draw(st.lists(key, unique=True, max_size=6))
    return Scenario(
        {draw(st.sampled_from(["", "", "?"])) + key: draw(st.sampled_from(["int4", "int8", None])) for key in bare},
        Inventory(candidates, POOL_OTHERS),
    )


def tier(key: str, name: str, role: Role) -> int | None:
    """The tier at which a key without its '?' hits a name, `_default` apart."""
    module = name[: name.rindex(".")]
    if key.startswith("re:"):
        whole = f"(?:{key[3:]})\\Z"
        return 3 if re.match(whole, name) or re.match(whole, module) else None
    if key.startswith("_"):
        return 4 if key == "_" + role.value else None
    return 1 if key == name else 2 if key == module else None


@dataclass(frozen=True)
class Answer:
    """What `resolve` must say; of an error, the keys or names that it must say it about."""

    kind: str
    about: frozenset[str] = frozenset()
    chosen: tuple[tuple[str, Config], ...] = ()
    deciding: tuple[tuple[str, str | None], ...] = ()


def oracle(scenario: Scenario) -> Answer:
    """Every (tier, position, key) of every name, then minima: no shared step with the code under test."""
    keys = list(scenario.keys)
    table: dict[str, list[tuple[int, int, str]]] = {}
    for candidate in scenario.inventory.candidates:
        for i in range(len(candidate.fqns)):
            rows = table[candidate.fqns[i]] = []
            for position in range(len(keys)):
                level = tier(keys[position].lstrip("?"), candidate.fqns[i], candidate.roles[i])
                if level is not None:
                    rows.append((level, position, keys[position]))

    seen = {row[2] for rows in table.values() for row in rows}
    unmatched = frozenset(key for key in keys if key not in seen and not key.startswith(("_", "?")))
    if unmatched:
        return Answer("unmatched", unmatched)

    chosen, deciding = [], []
    for candidate in scenario.inventory.candidates:
        best = [min(table[name])[2] for name in candidate.fqns if table[name]]
        if len({scenario.keys[key] for key in best}) > 1:
            return Answer("conflict", frozenset(name for name in candidate.fqns if table[name]))
        fallback = [key for key in keys if key in ("_default", "?_default")]
        if Role.embedding in candidate.roles or (Role.head in candidate.roles and len(candidate.fqns) > 1):
            fallback = []
        winner = [*best, *fallback, None][0]
        deciding.append((candidate.fqns[0], winner))
        if winner is not None and scenario.keys[winner] is not None:
            chosen.append((candidate.fqns[0], scenario.keys[winner]))
    winners = {min(rows)[2] for rows in table.values() if rows}
    shadowed = frozenset(key for key in seen - winners if key.lstrip("?") not in RESERVED_KEYS)
    return Answer("shadowed" if shadowed else "fine", shadowed, tuple(chosen), tuple(deciding))


def answer(scenario: Scenario) -> Answer:
    """What `resolve` says, in the oracle's terms."""
    try:
        resolution = resolve(FqnToConfig(scenario.keys), scenario.inventory)
    except UnmatchedKeyError as error:
        assert error.where is not None
        return Answer("unmatched", frozenset(re.findall(r"^\s*'([^']+)': ", error.where, re.MULTILINE)))
    except ConflictingConfigError as error:
        quoted = set(re.findall(r"'([^']+)'", error.what))
        tied = [set(c.fqns) for c in scenario.inventory.candidates if quoted <= set(c.fqns)]
        assert len(quoted) == 2 and len(tied) == 1
        return Answer("conflict", frozenset(quoted))
    shadowed = frozenset(warning.split("'")[1] for warning in resolution.warnings)
    names = [candidate.name for candidate in scenario.inventory.candidates]
    assert sorted([*resolution.chosen, *resolution.kept]) == sorted(names), "each weight has exactly one end"
    assert all(resolution.kept.values()), "each weight that is kept has a reason"
    return Answer(
        "shadowed" if shadowed else "fine",
        shadowed,
        tuple(resolution.chosen.items()),
        tuple(resolution.deciding_key.items()),
    )


@settings(deadline=None, max_examples=500)
@given(scenarios())
def test_resolve_is_what_the_oracle_says(scenario: Scenario) -> None:
    expected, actual = oracle(scenario), answer(scenario)
    if expected.kind == "conflict":  # the error names two of the names that are hit
        assert actual.kind == "conflict" and actual.about <= expected.about
    else:
        assert actual == expected


@pytest.mark.parametrize("kind", ["fine", "shadowed", "conflict", "unmatched"])
def test_scenarios_reach_every_kind_of_answer(kind: str) -> None:
    find(
        scenarios(),
        lambda scenario: oracle(scenario).kind == kind,
        settings=settings(max_examples=2000, derandomize=True),
    )


@settings(deadline=None)
@given(scenarios(), st.sampled_from(["?nonsense", "?re:nonsense.*", "?norm.weight", "?layers"]))
def test_optional_key_that_matches_nothing_changes_nothing(scenario: Scenario, key: str) -> None:
    if key[1:] in scenario.keys:
        return
    for keys in ({key: "int2", **scenario.keys}, {**scenario.keys, key: "int2"}):
        assert answer(Scenario(keys, scenario.inventory)) == answer(scenario)


# -------------------------------------------------------------------------------- what is kept, and why

KEPT: list[tuple[str, Inventory, Mapping[str, Config | None], str, str]] = [
    ("tied", TIED_MODEL, {"_default": 1}, EMBED, "tied to lm_head.weight; name it to quantize both"),
    ("embedding", UNTIED_MODEL, {"_default": 1}, EMBED, "an embedding; name it or _embedding to quantize it"),
    ("none", UNTIED_MODEL, {"?lm_head": None, "_default": 1}, HEAD, "key '?lm_head' says none"),
    ("none by default", UNTIED_MODEL, {"_default": None}, Q, "key '_default' says none"),
    ("none ends the search", UNTIED_MODEL, {Q: None, "re:.*": 1}, Q, f"key '{Q}' says none"),
    ("uncovered", UNTIED_MODEL, {}, HEAD, "no key covers it"),
    (
        "three embeddings",
        Inventory((weight("a.weight", "b.weight", "c.weight", roles=(Role.embedding,)),), {}),
        {"_default": 1},
        "a.weight",
        "tied to b.weight, c.weight; name it to quantize all",
    ),
    (
        "tied heads",
        Inventory((weight("a.weight", "b.weight", roles=(Role.head,)),), {}),
        {"_default": 1},
        "a.weight",
        "tied to b.weight; name it to quantize both",
    ),
]


@pytest.mark.parametrize(("inventory", "keys", "name", "why"), [case[1:] for case in KEPT], ids=[c[0] for c in KEPT])
def test_kept(inventory: Inventory, keys: Mapping[str, Config | None], name: str, why: str) -> None:
    assert resolve(FqnToConfig(keys), inventory).kept[name] == why


def test_default_covers_weights_tied_among_linears() -> None:
    inventory = Inventory((weight("a.weight", "b.weight"),), {})
    assert resolve(FqnToConfig.of(1), inventory).chosen == {"a.weight": 1}


@pytest.mark.parametrize("key", ["lm_head", HEAD, "model.embed", EMBED, "re:lm.*", "_head", "_embedding", "re:.*"])
def test_any_name_of_a_tied_weight_decides_it(key: str) -> None:
    resolution = resolve(FqnToConfig({key: 8, "_default": 4}), TIED_MODEL)
    assert resolution.chosen[EMBED] == 8
    assert resolution.deciding_key[EMBED] == key
    assert HEAD not in resolution.chosen


def test_equal_configs_for_both_names_of_a_tied_weight_agree() -> None:
    resolution = resolve(FqnToConfig({"lm_head": [8], "_embedding": [8]}), TIED_MODEL)
    assert (resolution.chosen, resolution.warnings) == ({EMBED: [8]}, ())


def test_shadowed_key_names_what_shadows_it() -> None:
    keys = {Q: 1, "re:.*k": 2, r"re:.*attn\..": 3, "_default": 4, "_experts": 5, "re:.*experts": 6}
    (warning,) = resolve(FqnToConfig(keys), UNTIED_MODEL).warnings
    assert warning == rf"key 're:.*attn\..' decides nothing: every weight it names is decided by '{Q}', 're:.*k'"


# -------------------------------------------------------------------------------- errors

RESOLVE_ERRORS: list[tuple[str, Inventory, dict[str, Config | None], type[LlmQuantError], list[str]]] = [
    (
        "typo",
        UNTIED_MODEL,
        {"model.layers.0.atn.q": 1},
        UnmatchedKeyError,
        ["1 key names no quantizable weight", "did you mean 'model.layers.0.attn.q'", "start it with '?'"],
    ),
    (
        "typo in a layer that is not there",
        UNTIED_MODEL,
        {"model.layers.7.attn.q": 1},
        UnmatchedKeyError,
        [".0.attn.q'"],
    ),
    ("nothing like it", UNTIED_MODEL, {"zzz": 1}, UnmatchedKeyError, ["no such name; names look like", EMBED]),
    ("empty model", Inventory((), {}), {"zzz": 1}, UnmatchedKeyError, ["the model has no quantizable weight"]),
    (
        "bias",
        UNTIED_MODEL,
        {"model.layers.0.attn.q.bias": 1},
        UnmatchedKeyError,
        ["a parameter that cannot be quantized (a bias)"],
    ),
    (
        "norm",
        UNTIED_MODEL,
        {"model.layers.0.norm": None},
        UnmatchedKeyError,
        ["a module without a quantizable weight", "'model.layers.0.norm.weight' (a norm)"],
    ),
    (
        "container",
        UNTIED_MODEL,
        {"model.layers.0": 1},
        UnmatchedKeyError,
        ["a module that holds modules", r"'re:model\.layers\.0\..*'"],
    ),
    (
        "container of others",
        UNTIED_MODEL,
        {"model.vision": 1},
        UnmatchedKeyError,
        ["a module without a quantizable weight", "'model.vision.conv.weight' (Conv2d: not a linear"],
    ),
    (
        "pattern of others",
        UNTIED_MODEL,
        {"re:.*bias": 1},
        UnmatchedKeyError,
        ["it hits only what cannot be quantized", "'model.layers.0.attn.q.bias' (a bias)"],
    ),
    (
        "part of a name",
        UNTIED_MODEL,
        {r"re:attn\.q": 1},
        UnmatchedKeyError,
        [f"a part of '{Q}'", "must match the whole name", "'.*'"],
    ),
    ("pattern of nothing", UNTIED_MODEL, {"re:zzz": 1}, UnmatchedKeyError, ["it matches no name", EMBED]),
    (
        "all at once",
        UNTIED_MODEL,
        {"zzz": 1, Q: 1, r"re:y\.z": 1, "?x": 1, "lm_hed": 1},
        UnmatchedKeyError,
        ["3 keys name no quantizable weight", "'zzz': ", r"'re:y\.z': ", "'lm_hed': did you mean 'lm_head'"],
    ),
    (
        "conflict",
        TIED_MODEL,
        {"_embedding": "int8", "lm_head": "int4"},
        ConflictingConfigError,
        [EMBED, HEAD, "key '_embedding' says int8", "key 'lm_head' says int4", "give both keys the same config"],
    ),
    (
        "conflict with none",
        TIED_MODEL,
        {"re:.*embed.*": None, "_head": "int4"},
        ConflictingConfigError,
        ["key 're:.*embed.*' says none (keep in float)", "key '_head' says int4"],
    ),
    (
        "unmatched before conflict",
        TIED_MODEL,
        {"_embedding": 1, "_head": 2, "lm_hed": 3},
        UnmatchedKeyError,
        ["lm_hed"],
    ),
]


@pytest.mark.parametrize(
    ("inventory", "keys", "kind", "texts"), [case[1:] for case in RESOLVE_ERRORS], ids=[c[0] for c in RESOLVE_ERRORS]
)
def test_resolve_error(
    inventory: Inventory, keys: dict[str, Config | None], kind: type[LlmQuantError], texts: list[str]
) -> None:
    with pytest.raises(kind) as raised:
        resolve(FqnToConfig(keys), inventory)
    assert type(raised.value) is kind
    for text in texts:
        assert text in str(raised.value)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        pytest.param("layers.1.mpl.up.weight", "'layers.1.mlp.up.weight'", id="its own layer"),
        pytest.param("layers.9.mlp.up", "'layers.2.mlp.up'", id="the last layer, which tells how many there are"),
    ],
)
def test_near_match_in_many_layers(key: str, near: str) -> None:
    inventory = Inventory(
        tuple(weight(f"layers.{i}.mlp.{leaf}.weight") for i in range(3) for leaf in ("up", "down")), {}
    )
    with pytest.raises(UnmatchedKeyError, match=f"did you mean {re.escape(near)}"):
        resolve(FqnToConfig({key: 1}), inventory)


@pytest.mark.parametrize("key", ["model.layers.0", "model.vision"])
def test_suggestion_for_a_container_is_a_pattern_that_works(key: str) -> None:
    with pytest.raises(UnmatchedKeyError) as raised:
        resolve(FqnToConfig({key: 1}), UNTIED_MODEL)
    suggested = re.findall(r"'(re:[^']+)'", str(raised.value))
    below = {c.name for c in UNTIED_MODEL.candidates if c.name.startswith(f"{key}.")}
    assert bool(suggested) == bool(below)
    for pattern in suggested:
        assert set(resolve(FqnToConfig({pattern: 1}), UNTIED_MODEL).chosen) == below


BAD_CONFIGS: list[tuple[str, object, list[str]]] = [
    ("not a mapping", [("a", 1)], ["takes a mapping", "list"]),
    ("empty key", {"": 1}, ["non-empty string", "''"]),
    ("only a question mark", {"?": 1}, ["non-empty string", "'?'"]),
    ("two question marks", {"??a": 1}, ["one '?' is enough", "'??a'"]),
    ("number", {3: 1}, ["non-empty string", "3"]),
    ("bad pattern", {r"re:ab(c": 1}, ["'re:ab(c' is not a valid regular expression", "at position 2 of the pattern"]),
    ("bad optional pattern", {"?re:*": 1}, ["'?re:*' is not a valid", "at position 0", "nothing to repeat"]),
    ("huge repeat", {"re:a{99999999999999999999}": 1}, ["too large a regular expression"]),
    ("unknown role", {"_heads": 1}, ["'_heads' is unknown", "_embedding, _head, _experts, _default", "mean '_head'"]),
    ("unknown optional role", {"?_defualt": 1}, ["'?_defualt' is unknown", "did you mean '_default'"]),
    ("private name", {"_orig_mod.q.weight": 1}, [r"write 're:_orig_mod\.q\.weight'"]),
    ("with and without", {"?a": 1, "a": 1}, ["'a' is given with and without '?'"]),
    ("nested", {"a": FqnToConfig({})}, ["cannot hold another", "key 'a'"]),
]


@pytest.mark.parametrize(("keys", "texts"), [case[1:] for case in BAD_CONFIGS], ids=[case[0] for case in BAD_CONFIGS])
def test_bad_config(keys: Mapping[str, Config | None], texts: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        FqnToConfig(keys)
    assert type(raised.value) is ConfigError
    for text in texts:
        assert text in str(raised.value)


# -------------------------------------------------------------------------------- FqnToConfig as a value


def test_of() -> None:
    config = FqnToConfig({"a": 1})
    assert FqnToConfig.of(config) is config
    assert FqnToConfig.of(1) == FqnToConfig({"_default": 1})
    assert FqnToConfig.of(None) == FqnToConfig({"_default": None})


def test_equality_knows_the_order_of_keys() -> None:
    assert FqnToConfig({"a": 1, "b": 2}) == FqnToConfig({"a": 1, "b": 2})
    assert FqnToConfig({"a": 1, "b": 2}) != FqnToConfig({"b": 2, "a": 1})
    assert FqnToConfig({"a": 1}) != FqnToConfig({"a": None})
    assert FqnToConfig({"a": 1}) != {"a": 1}


def test_config_is_a_value_of_its_own() -> None:
    keys: dict[str, Config | None] = {"re:b": 1, "a": None}
    config = FqnToConfig(keys)
    keys["c"] = 3
    assert list(config.items()) == [("re:b", 1), ("a", None)]
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


ITEMS = st.dictionaries(st.sampled_from(["a", "b", "re:c", "_default"]), st.integers(0, 3))


@given(ITEMS, ITEMS)
def test_overridden_by(own: dict[str, int], other: dict[str, int]) -> None:
    merged = FqnToConfig(own).overridden_by(other)
    assert list(merged.items())[: len(other)] == list(other.items())
    assert dict(merged.items()) == own | other
    rest = [key for key in merged.fqn_to_config if key not in other]
    assert rest == [key for key in own if key not in other]
    assert merged.overridden_by(other) == merged


def test_override_replaces_a_key_whether_optional_or_not() -> None:
    config = FqnToConfig({"re:c": 0, "?a": 1, "b": 2})
    assert config.overridden_by({"a": 3, "?b": 4}) == FqnToConfig({"a": 3, "?b": 4, "re:c": 0})


def test_override_by_a_pattern_wins_over_a_pattern() -> None:
    config = FqnToConfig({r"re:.*attn\.q": 1, "_default": 2}).overridden_by({"re:.*attn.*": 3})
    assert resolve(config, UNTIED_MODEL).chosen[Q] == 3


# -------------------------------------------------------------------------------- size


@pytest.mark.parametrize("layer_key", [r"re:model\.layers\.{}\.mlp\..*", "model.layers.{}.mlp.upp"])
def test_thousand_weights_and_fifty_keys_take_no_time(layer_key: str) -> None:
    """Both ways out, a resolution and an error with suggestions; the bound is far above what they take."""
    names = [f"model.layers.{i}.mlp.{leaf}.weight" for i in range(250) for leaf in ("gate", "up", "down", "out")]
    inventory = Inventory(tuple(weight(name) for name in names), {})
    config = FqnToConfig({layer_key.format(i): i for i in range(50)})
    start = time.perf_counter()
    try:
        assert len(resolve(config, inventory).chosen) == 200
    except UnmatchedKeyError as error:
        assert "50 keys" in str(error)
    assert time.perf_counter() - start < 4
