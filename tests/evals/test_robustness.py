"""What fuzzing found interesting is read as it was then: with a named error, or without; and mutations do damage."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "evals" / "robustness"
NAMES = sorted(path.name for path in (FOLDER / "corpus").iterdir())


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("readers")


@pytest.fixture
def mutations(readers: ModuleType) -> ModuleType:
    return importlib.import_module("mutations")


def test_every_reader_has_a_corpus_and_whole_files_to_begin_from(readers: ModuleType, tmp_path: Path) -> None:
    assert set(NAMES) == set(readers.READERS)
    for reader in readers.READERS.values():
        folder = tmp_path / reader.name
        folder.mkdir()
        reader.beside(folder)
        assert {readers.run(reader, content, folder) for content in reader.seeds()} == {"read"}


@pytest.mark.parametrize("name", NAMES)
def test_the_corpus_gives_answers_or_named_errors(name: str, readers: ModuleType, tmp_path: Path) -> None:
    """Anything else would be raised here."""
    reader = readers.READERS[name]
    reader.beside(tmp_path)
    outcomes = {readers.run(reader, path.read_bytes(), tmp_path) for path in readers.kept(reader)}
    assert outcomes - {"read"}, "nothing in the corpus is refused"


@pytest.mark.parametrize("name", NAMES)
def test_mutations(name: str, mutations: ModuleType, readers: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    found = mutations.attack(readers.READERS[name], 150, 1, tmp_path / "x")
    assert found["defects"] == [] and sum(found["outcomes"].values()) == 150
    assert sum(count for outcome, count in found["outcomes"].items() if outcome != "read") > 75


def test_a_defect_is_told(mutations: ModuleType, readers: ModuleType, tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        if (folder / "x").read_bytes() != b"whole":
            raise KeyError("x")

    (tmp_path / "x").mkdir()
    reader = readers.Reader("broken", "x", broken, lambda: [b"whole"])
    assert "KeyError" in str(mutations.attack(reader, 20, 0, tmp_path / "x")["defects"])


def test_a_reader_that_takes_too_much_is_told(mutations: ModuleType, readers: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    reader = readers.Reader("greedy", "x", lambda folder: bytearray(70 << 20), lambda: [b"whole"])
    assert mutations.attack(reader, 1, 0, tmp_path / "x")["defects"]
