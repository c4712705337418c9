"""The paragraph in words: its figures are the rows', and what the errors leave open is said to be open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from results import failed, make, noise, parse, reference, usual

from llmquant.report import numbers
from llmquant.report.reading import headline, listed, read, smallest_within, steps
from llmquant.report.sections import Section, split


def section(folder: Path, rows: list[dict[str, Any]]) -> Section:
    (only,) = split(parse(folder, rows))
    return only


def errors(change: float, stderr: float | None) -> dict[str, Any]:
    return {"perplexity": make("x", change=change)["perplexity"] | {"change_stderr": stderr}}


def test_the_figures_are_the_rows(tmp_path: Path) -> None:
    said = read(section(tmp_path, usual()))
    whole = 100_000_000
    top1, size, change = 0.9934, 53_000_000, 0.004
    assert said[0] == (
        f"int8 keeps {100 * top1:.2f} % of the top-1 choices at {100 * size / whole:.0f} % of the bytes "
        f"({size / 1e6:.1f} MB on disk); its perplexity changes by {100 * change:+.2f} % ± 0.10 %."
    )
    assert said[1] == "The 16-bit model has a perplexity of 20.00 ± 0.60 over 2,044 tokens, 100.0 MB."
    assert "within 1 % of its perplexity is int8 (53.0 MB, +0.40 % ± 0.10 %)" in said[2]
    assert "within 5 % of its perplexity is int4-g64 (31.0 MB, +3.00 % ± 0.10 %)" in said[3]
    assert said[5] == "The best of their size by KL, the smallest first: int2, int4-g64 and int8."
    assert said[6] == "1 cell has failed, for the reasons below: broken."


def test_an_error_that_leaves_a_limit_open_is_told(tmp_path: Path) -> None:
    rows = [
        reference(),
        make("near", 0.1, 10**7, **errors(0.009, 0.001)),
        make("sure", 0.1, 2 * 10**7, **errors(0.005, 0.001)),
    ]
    found = section(tmp_path, rows)
    within = smallest_within(found, 0.01)
    assert within.measured and within.sure and (within.measured.label, within.sure.label) == ("near", "sure")
    said = next(sentence for sentence in read(found) if "within 1 %" in sentence)
    assert "near (10.0 MB, +0.90 % ± 0.10 %), which two standard errors more would take beyond" in said
    assert "beyond its error is sure (20.0 MB" in said
    assert headline(found) is within.sure


def test_two_standard_errors_are_the_border(tmp_path: Path) -> None:
    inside = section(tmp_path / "a", [reference(), make("x", **errors(0.0079, 0.001))])
    outside = section(tmp_path / "b", [reference(), make("x", **errors(0.0081, 0.001))])
    assert smallest_within(inside, 0.01).sure is not None
    assert smallest_within(outside, 0.01).sure is None and smallest_within(outside, 0.01).measured is not None


def test_a_change_without_error_is_never_sure(tmp_path: Path) -> None:
    found = section(tmp_path, [reference(), make("x", **errors(0.001, None))])
    assert smallest_within(found, 0.01).sure is None
    assert any("whose error was not measured" in sentence for sentence in read(found))


def test_none_within_is_told(tmp_path: Path) -> None:
    said = " ".join(read(section(tmp_path, [reference(), make("bad", change=0.3)])))
    assert "None stays within 1 %" in said and "None stays within 5 %" in said and said.startswith("bad keeps")


@pytest.mark.parametrize(
    ("kl", "stderr", "hidden"), [(0.0005, 1e-6, True), (0.0012, 0.00011, True), (0.0012, 0.00005, False)]
)
def test_the_noise_floor(tmp_path: Path, kl: float, stderr: float, hidden: bool) -> None:
    row = make("x", kl)
    row["kl"]["stderr"] = stderr
    found = section(tmp_path, [reference(), noise(0.001), row])  # whose own error is 0.00002
    said = " ".join(read(found))
    assert found.in_noise(found.candidates[0]) is hidden
    assert ("Not to be told from the noise floor (KL 0.001" in said) is hidden
    assert ("above the noise floor" in said) is not hidden


def test_what_was_not_measured_is_told(tmp_path: Path) -> None:
    bare = make("x", None, **{name: None for name in ("bytes", "top1", "speed")})
    said = " ".join(read(section(tmp_path, [bare])))
    assert "reference was not measured" in said and "Sizes were not measured" in said and "noise floor was not" in said
    assert "None stays" not in said and "smallest" not in said


def test_all_failed(tmp_path: Path) -> None:
    said = read(section(tmp_path, [failed("a"), failed("b")]))
    assert said[0] == "No candidate has figures to compare."
    assert said[-1] == "2 cells have failed, for the reasons below: a and b."


def test_what_failed_in_part_keeps_its_figures(tmp_path: Path) -> None:
    """As when sizes and speed fail behind a measured quality."""
    half = make("half", bytes=None, speed=None, status="failed", error={"what": "no room"})
    found = section(tmp_path, [reference(), half, make("whole")])
    assert [row.label for row in found.candidates] == ["whole", "half"]
    assert [row.label for row in found.failed] == ["half"] and found.measure == "disk"


def test_logits_that_are_not_finite_take_no_part(tmp_path: Path) -> None:
    wild = make("wild", 0.00001, 10**6, 0.0, nonfinite={"logits": 1234, "tokens": 3})
    found = section(tmp_path, [reference(), wild, make("sane", change=0.001)])
    assert [row.label for row in found.best] == ["sane"] and smallest_within(found, 0.01).measured is found.candidates[
        1
    ]
    assert any("not finite: wild (1,234 logits)" in sentence for sentence in read(found))


def test_steps_name_the_best_for_each_room(tmp_path: Path) -> None:
    found = section(tmp_path, usual())
    assert [(step.share, step.row.label) for step in steps(found)] == [
        (0.25, "int2"),
        (0.35, "int4-g64"),
        (0.6, "int8"),
    ]
    assert not steps(section(tmp_path / "b", [make("x")]))


def test_sizes_fall_back_to_weights_for_all(tmp_path: Path) -> None:
    row = make("x")
    row["bytes"] |= {"disk": None}
    found = section(tmp_path, [reference(), row, make("y")])
    assert found.measure == "weights" and found.size(found.reference) == 100_000_000 - 1000


def test_models_and_texts_are_sections_in_order(tmp_path: Path) -> None:
    rows = [make("x", model=model, text=text) for model, text in (("B", "t1"), ("A", "t1"), ("B", "t2"))]
    assert [(s.model, s.text) for s in split(parse(tmp_path, rows))] == [("B", "t1"), ("B", "t2"), ("A", "t1")]


def test_lists_are_cut() -> None:
    assert (listed(["a"]), listed(["a", "b", "c"])) == ("a", "a, b and c")
    assert listed([str(i) for i in range(11)]).endswith("7 and 3 more")


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        (numbers.share(0.9934), "99.34 %"),
        (numbers.share(0.31), "31 %"),
        (numbers.share(1.0), "100 %"),
        (numbers.share(0.0), "0 %"),
        (numbers.share(0.034), "3.4 %"),
        (numbers.share(1.07), "107 %"),
        (numbers.change(-0.0012, 0.0003), "-0.12 % ± 0.03 %"),
        (numbers.change(276.2), "277×"),
        (numbers.size(999), "999 B"),
        (numbers.size(135_422_048), "135.4 MB"),
        (numbers.size(13_542_204_800), "13.54 GB"),
        (numbers.perplexity(1548236.4), "1.55e+06"),
        (numbers.nats(0.003757), "0.00376"),
        (numbers.times(None), "–"),
    ],
)
def test_numbers(written: str, wanted: str) -> None:
    assert written == wanted
