"""Windows of a text, by seed and count; texts of the user's own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmquant.calibrate import data as module
from llmquant.calibrate.data import calibration_windows, tokenized
from llmquant.errors import CalibrationError, TextError
from llmquant.measure.text import load_text


class Bytes:
    """A tokenizer of bytes; with a BOS, it puts one before every text."""

    def __init__(self, bos: int | None = None) -> None:
        self.bos_token_id = bos

    def encode(self, text: str, add_special_tokens: bool = True, **_: Any) -> list[int]:
        front = [self.bos_token_id] if self.bos_token_id is not None and add_special_tokens else []
        return [*front, *text.encode()]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(1, 101)) * 3)
    return path


def test_windows_are_disjoint_pieces_of_the_text_in_its_order(text: Path) -> None:
    ids = torch.tensor(list(text.read_bytes()))
    found = calibration_windows(Bytes(), str(text), tokens=100, context=30)
    assert found.shape == (4, 30) and found.dtype == torch.int64
    pieces = ids[:300].view(10, 30).tolist()
    places = [pieces.index(window) for window in found.tolist()]
    assert places == sorted(set(places))


def test_the_seed_alone_decides_which(text: Path) -> None:
    def drawn(seed: int) -> list[Any]:
        return calibration_windows(Bytes(), str(text), tokens=90, context=30, seed=seed).tolist()

    assert drawn(3) == drawn(3)
    assert len({str(drawn(seed)) for seed in range(8)}) > 4


@pytest.mark.parametrize(("tokens", "windows"), [(1, 1), (30, 1), (31, 2), (300, 10), (10**6, 10)])
def test_as_many_windows_as_the_tokens_need_and_the_text_has(text: Path, tokens: int, windows: int) -> None:
    assert calibration_windows(Bytes(), str(text), tokens=tokens, context=30).shape == (windows, 30)


def test_a_short_text_is_one_window(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("abcde")
    assert calibration_windows(Bytes(), str(tmp_path / "t")).tolist() == [[97, 98, 99, 100, 101]]
    assert calibration_windows(Bytes(7), str(tmp_path / "t")).tolist() == [[7, 97, 98, 99, 100, 101]]
    (tmp_path / "t").write_text("a")
    with pytest.raises(TextError, match="1 tokens"):
        calibration_windows(Bytes(), str(tmp_path / "t"))


def test_every_window_begins_with_the_bos_of_the_tokenizer(text: Path) -> None:
    found = calibration_windows(Bytes(7), str(text), tokens=90, context=30)
    assert found.shape == (3, 30) and torch.all(found[:, 0] == 7)


def test_wikitext_is_not_the_split_that_models_are_measured_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def fake(name: str, split: str = "test") -> SimpleNamespace:
        asked.append((name, split))
        return SimpleNamespace(content="a b c d e f")

    monkeypatch.setattr(module, "load_text", fake)
    calibration_windows(Bytes(), "wikitext2", tokens=4, context=4)
    assert asked == [("wikitext2", "train")]
    assert load_text.__defaults__ is not None and load_text.__defaults__[-1] == "test"


@pytest.mark.parametrize("tokens", [0, -5])
def test_no_tokens_are_refused(tokens: int) -> None:
    with pytest.raises(CalibrationError, match="none to calibrate on"):
        calibration_windows(Bytes(), tokens=tokens)


def test_texts_of_ones_own_keep_their_lengths() -> None:
    found = tokenized(Bytes(7), ["ab", "abcdef"], context=4)
    assert [ids.tolist() for ids in found] == [[[7, 97, 98]], [[7, 97, 98, 99]]]
    with pytest.raises(CalibrationError, match="without tokens"):
        tokenized(Bytes(), ["ab", ""])
