import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from llmquant.errors import TextError
from llmquant.measure.windows import make_windows, tokenize, tokens_scored

BOS = 9_999

lengths = st.integers(2, 300)
contexts = st.integers(2, 40)
counts = st.none() | st.integers(1, 200)


@given(length=lengths, context=contexts, count=counts, bos=st.sampled_from([None, BOS]))
def test_windows_are_disjoint_in_order_and_cover(length: int, context: int, count: int | None, bos: int | None) -> None:
    stride = context - (bos is not None)
    if length < stride:
        return
    windows = make_windows(list(range(length)), context, count, bos)
    body = windows if bos is None else windows[:, 1:]
    assert torch.equal(body.flatten(), torch.arange(body.numel()))  # from the start, nothing twice, nothing missed
    assert len(windows) == min(length // stride, count or length)
    assert windows.dtype == torch.int64 and windows.shape[1] == context
    assert bos is None or (windows[:, 0] == bos).all()


@given(length=st.integers(40, 300), context=contexts, count=counts)
def test_lists_and_tensors_give_the_same_and_leave_the_ids_alone(length: int, context: int, count: int | None) -> None:
    ids = torch.arange(length)
    windows = make_windows(ids, context, count)
    assert torch.equal(windows, make_windows(ids.tolist(), context, count))
    windows.fill_(-1)
    assert torch.equal(ids, torch.arange(length))


@given(context=contexts, bos=st.sampled_from([None, BOS]))
def test_a_text_one_token_short_of_a_window_is_an_error(context: int, bos: int | None) -> None:
    stride = context - (bos is not None)
    assert len(make_windows(range(stride), context, None, bos)) == 1
    with pytest.raises(TextError, match=rf"has {stride - 1} tokens.*{context}") as caught:
        make_windows(range(stride - 1), context, None, bos)
    assert "--context" in str(caught.value.hint)


@pytest.mark.parametrize(("context", "count"), [(1, None), (0, None), (-3, 1), (8, 0), (8, -1)])
def test_nothing_to_score_is_an_error(context: int, count: int | None) -> None:
    with pytest.raises(TextError):
        make_windows(range(100), context, count)


@given(rows=st.integers(1, 9), context=contexts)
def test_all_but_the_first_token_of_each_window_are_scored(rows: int, context: int) -> None:
    windows = torch.zeros(rows, context)
    assert tokens_scored(windows) == windows[:, 1:].numel()


def word_tokenizer(adds_bos: bool, has_bos: bool = True) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"<s>": 0, "?": 1, "a": 2, "b": 3}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    if adds_bos:
        words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    named = {"bos_token": "<s>"} if has_bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", model_max_length=4, **named)


@pytest.mark.parametrize(
    ("adds_bos", "has_bos", "expected"),
    [(True, True, 0), (False, True, None), (False, False, None), (True, False, None)],
)
def test_bos_is_what_the_tokenizer_adds_and_never_among_the_ids(
    adds_bos: bool, has_bos: bool, expected: int | None
) -> None:
    assert tokenize(word_tokenizer(adds_bos, has_bos), "a b a") == ([2, 3, 2], expected)


def test_a_text_longer_than_the_model_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        ids, _ = tokenize(word_tokenizer(adds_bos=True), "a b " * 50)
    finally:
        logger.removeHandler(caplog.handler)
    assert len(ids) == 100 and not caplog.records
