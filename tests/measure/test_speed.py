from typing import Any

import pytest
import torch
from torch import nn

from llmquant.errors import LlmQuantError
from llmquant.measure import speed as module
from llmquant.measure.speed import Speed, time_model, turn

from .conftest import MakeModel


def test_a_turn_reads_the_prompt_and_generates_that_many(make_model: MakeModel) -> None:
    model, lengths = make_model(1), []
    model.generation_config.eos_token_id = list(range(128))  # every token would end it
    model.model.register_forward_pre_hook(
        lambda _, args, options: lengths.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    read, write = turn(model, 20, 5)
    assert lengths == [20, 1, 1, 1, 1] and 0 < read < 10 and 0 < write < 10


def test_models_take_turns_and_medians_of_all_but_the_first_count(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast, order = nn.Linear(1, 1), nn.Linear(1, 1), []
    seconds = {id(slow): iter([(99, 99), (4, 2), (1, 1), (2, 20)]), id(fast): iter([(99, 99), (1, 1), (1, 1), (9, 9)])}

    def fake(model: Any, prompt: int, new: int) -> tuple[float, float]:
        order.append(model)
        return next(seconds[id(model)])

    monkeypatch.setattr(module, "turn", fake)
    told: list[tuple[int, int]] = []
    found = time_model(slow, fast, prompt=8, new=5, rounds=3, progress=lambda *count: told.append(count))
    assert found == Speed(torch.get_num_threads(), 8, 5, 8 / 2, 8 / 1, 4 / 2, 4 / 1)
    assert order == [slow, fast] * 4 and told == [(done, 8) for done in range(1, 9)]


def test_a_model_alone_has_no_reference(make_model: MakeModel) -> None:
    found = time_model(make_model(1), prompt=4, new=2, rounds=1)
    assert found.prefill > 0 and found.decode > 0 and found.prefill_reference is found.decode_reference is None


def test_a_much_larger_reference_is_slower(make_model: MakeModel) -> None:
    large = make_model(1, hidden_size=256, intermediate_size=2048, num_hidden_layers=4)
    found = time_model(make_model(1), large, prompt=48, new=4, rounds=3)
    assert found.prefill_reference and found.decode_reference
    assert found.prefill > 2 * found.prefill_reference and found.decode > 1.2 * found.decode_reference


@pytest.mark.parametrize("options", [{"prompt": 0}, {"new": 1}, {"rounds": 0}])
def test_nothing_to_time_is_an_error(options: dict[str, int]) -> None:
    with pytest.raises(LlmQuantError, match="nothing to time"):
        time_model(nn.Linear(1, 1), **options)  # type: ignore[arg-type]
