"""`quantize_dynamic` against torch.ao's function of that name, and against the float model."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import llmquant
from llmquant.errors import BadWeightError, ConfigError
from llmquant.primitives.metrics import compute_error
from llmquant.pt2e.lstm import DynamicLSTM
from llmquant.tensor import QuantizedTensor


class Words(nn.Module):
    """The word language model of the tutorials."""

    def __init__(self, tokens: int = 100, width: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Embedding(tokens, width)
        self.rnn = nn.LSTM(width, width, 2)
        self.decoder = nn.Linear(width, tokens)

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(self.rnn(self.encoder(ids))[0])


def saved(thing: Any) -> int:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.tell()


def test_the_published_snippet_with_only_its_import_changed() -> None:
    from llmquant import quantize_dynamic

    model = Words(width=256).eval()
    ids = torch.randint(0, 100, (5, 3))
    quantized_model = quantize_dynamic(model, {nn.LSTM, nn.Linear}, dtype=torch.qint8)
    assert "Embedding(100, 256)" in str(quantized_model) and "DynamicLSTM" in str(quantized_model)
    before, after = saved(model.state_dict()), saved(quantized_model.state_dict())
    plain = model.encoder.weight.nbytes
    assert 3.5 < (before - plain) / (after - plain) < 4.1
    assert saved(quantized_model) < before / 3
    with torch.no_grad():
        assert 25 < compute_error(model(ids), quantized_model(ids)) < 60


def test_no_worse_than_torchs_own_function() -> None:
    oracle = pytest.importorskip("torch.ao.quantization")
    torch.manual_seed(3)
    model, ids = Words().eval(), torch.randint(0, 100, (12, 4))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = oracle.quantize_dynamic(model, {nn.LSTM, nn.Linear}, dtype=torch.qint8)(ids)
        ours = llmquant.quantize_dynamic(model, {nn.LSTM, nn.Linear}, dtype=torch.qint8)(ids)
    wanted = model(ids).detach()
    assert compute_error(wanted, ours) > compute_error(wanted, theirs) - 1
    assert compute_error(theirs, ours) > 20


def test_a_copy_and_the_model_itself() -> None:
    model = Words()
    before = copy.deepcopy(model.state_dict())
    made = llmquant.quantize_dynamic(model)
    assert made is not model and type(model.decoder.weight) is nn.Parameter
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert made.encoder.weight.data_ptr() != model.encoder.weight.data_ptr()
    assert isinstance(made.decoder.weight, QuantizedTensor)
    assert llmquant.quantize_dynamic(model, inplace=True) is model and isinstance(model.rnn, DynamicLSTM)


def test_what_is_saved_loads_again() -> None:
    made = llmquant.quantize_dynamic(Words().eval())
    buffer = io.BytesIO()
    torch.save(made.state_dict(), buffer)
    buffer.seek(0)
    other = llmquant.quantize_dynamic(Words().eval())
    other.load_state_dict(torch.load(buffer))
    ids = torch.randint(0, 100, (5, 3))
    with torch.no_grad():
        assert torch.equal(made(ids), other(ids))


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ({nn.Linear}, {"a", "b.c"}),
        ({"b"}, {"b.c", "b.d"}),
        ({nn.Linear: object(), "b.c": None}, {"a"}),
        ({"": object(), "b": None}, {"a"}),
        ({nn.LSTM}, {"b.d"}),
        (None, {"a", "b.c", "b.d"}),
        (set(), set()),
    ],
)
def test_which_modules(spec: Any, wanted: set[str]) -> None:
    inner = nn.ModuleDict({"c": nn.Linear(8, 8), "d": nn.LSTM(8, 8)})
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": inner, "e": nn.Embedding(4, 8)})
    made = llmquant.quantize_dynamic(model, spec)
    found = {name.rpartition(".")[0] for name, p in made.named_parameters() if isinstance(p, QuantizedTensor)}
    assert found == wanted


def test_a_linear_alone_and_a_module_under_two_names() -> None:
    assert isinstance(llmquant.quantize_dynamic(nn.Linear(8, 4)).weight, QuantizedTensor)
    one = nn.Linear(8, 8)
    made = llmquant.quantize_dynamic(nn.ModuleList([one, one]))
    assert made[0] is made[1] and isinstance(made[1].weight, QuantizedTensor)


@pytest.mark.parametrize(
    "options", [{"dtype": torch.float16}, {"qconfig_spec": {nn.GRU}}, {"qconfig_spec": {"nothing"}}]
)
def test_what_is_not_there_is_said(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        llmquant.quantize_dynamic(Words(), **options)


def test_a_damaged_weight_leaves_the_model_as_it_is() -> None:
    model = Words()
    with torch.no_grad():
        model.decoder.weight[0, 0] = float("nan")
    with pytest.raises(BadWeightError, match="decoder"):
        llmquant.quantize_dynamic(model, inplace=True)
    assert type(model.rnn) is nn.LSTM


LSTMS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True, "bias": False},
    {"proj_size": 5, "num_layers": 2},
]


def almost_exact(lstm: nn.LSTM) -> DynamicLSTM:
    """The module under test with the float weights: what it computes is then what `nn.LSTM` computes."""
    made = DynamicLSTM.from_float(lstm)
    for name, parameter in lstm.named_parameters():
        made.register_parameter(name, parameter)
    return made


@pytest.mark.parametrize("options", LSTMS, ids=str)
@pytest.mark.parametrize("batched", [True, False])
def test_the_recurrence_is_that_of_torch(options: dict[str, Any], batched: bool) -> None:
    lstm = nn.LSTM(6, 9, **options)
    x = torch.randn(4, 3, 6) if batched else torch.randn(4, 6)
    wanted, state = lstm(x)
    found, found_state = almost_exact(lstm)(x)
    torch.testing.assert_close((found, found_state), (wanted, state))
    wanted, last = lstm(x, state)
    torch.testing.assert_close(almost_exact(lstm)(x, state), (wanted, last))


@pytest.mark.parametrize("options", LSTMS, ids=str)
def test_packed_sequences(options: dict[str, Any]) -> None:
    lstm = nn.LSTM(6, 9, **options)
    x = pack_sequence([torch.randn(length, 6) for length in (2, 5, 3)], enforce_sorted=False)
    wanted, state = lstm(x)
    found, found_state = almost_exact(lstm)(x)
    assert isinstance(found, PackedSequence)
    torch.testing.assert_close(pad_packed_sequence(found), pad_packed_sequence(wanted))
    torch.testing.assert_close(found_state, state)


@pytest.mark.parametrize("options", LSTMS, ids=str)
def test_an_lstm_in_int8_is_near_the_float_one(options: dict[str, Any]) -> None:
    lstm = nn.LSTM(32, 48, **{**options, "proj_size": 24 if "proj_size" in options else 0})
    x = torch.randn(7, 5, 32)
    with torch.no_grad():
        assert 28 < compute_error(lstm(x)[0], DynamicLSTM.from_float(lstm)(x)[0]) < 55


def test_an_lstm_of_sixteen_bits() -> None:
    lstm = nn.LSTM(32, 48).bfloat16()
    with torch.no_grad():
        y, _ = DynamicLSTM.from_float(lstm)(torch.randn(3, 2, 32).bfloat16())
    assert y.dtype == torch.bfloat16
