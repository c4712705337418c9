"""The files of a report: complete, the same for the same results, and safe whatever names say."""

from __future__ import annotations

import builtins
import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from results import failed, make, noise, reference, usual, write

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from llmquant.errors import MissingDependencyError, ReportError
from llmquant.report import write_report
from llmquant.report.markdown import escape
from llmquant.report.theme import COLOURS

EVIL = "<script>alert('x')</script> $\\frac{a}{b}$ & \"q\" | `c` [l](javascript:x)"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("usual"), usual())
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every text that a row may hold is an attack."""
    tasks = {EVIL: {"version": EVIL, "metrics": {EVIL: {"value": 0.5, "stderr": 0.1}}}}
    layers = [{"fqn": f"{EVIL}.{block}.{EVIL}", "format": EVIL, "bits": 4.0, "sqnr": 20.0} for block in range(2)]
    own: dict[str, Any] = {"study": EVIL, "model": EVIL, "text": EVIL}
    own |= {"protocol": {EVIL: EVIL}, "versions": {EVIL: EVIL}, "machine": {EVIL: EVIL}}
    rows = [
        reference(**own),
        noise(**own),
        make("$\\notatall{$", 0.2, **own),
        make(EVIL, tasks=tasks, **(own | {"layers": layers})),
        failed(EVIL + "2", what=EVIL, where=EVIL, hint=EVIL, kind=EVIL) | {"model": EVIL, "text": EVIL},
    ]
    folder = write(tmp_path_factory.mktemp("hostile"), rows)
    write_report(folder)
    return folder


class Page(HTMLParser):
    """Tags, addresses and texts of a page, and whether its tags are closed in order."""

    VOID = ("meta", "link", "br")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open += [tag] if tag not in self.VOID else []
        for name, value in attrs:
            self.ids += [value or ""] if name == "id" else []
            self.addresses += [value or ""] if name in ("src", "href", "xlink:href") else []
            self.handlers += [name] if name.startswith("on") else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else(written: Path) -> None:
    page = Page(written / "report.html")
    assert not page.open and len(page.ids) == len(set(page.ids))
    inside = {f"#{name}" for name in page.ids}
    assert set(page.addresses) <= inside | {"data:,"}
    outside = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page.source)
    assert "http" not in outside and "@import" not in outside and "url(" not in re.sub(r"url\(#[\w-]+\)", "", outside)
    assert set(re.findall(r"url\((#[\w-]+)\)", page.source)) <= inside


def test_the_page_has_all_parts(written: Path) -> None:
    page = Page(written / "report.html")
    assert page.tags.count("svg") == 6 and page.tags.count("figure") == 6
    for told in ("int8 keeps 99.34 %", "noise floor", "a weight is NaN", "BadWeightError", "tokens_scored", "2.13.0"):
        assert told in page.text
    for row in usual():
        assert row["label"] in page.text


def test_every_colour_of_a_picture_has_a_role(written: Path) -> None:
    page = (written / "report.html").read_text(encoding="utf-8")
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    light = {colour for colour, _ in COLOURS.values()}
    assert pictures and not any(colour in picture for picture in pictures for colour in light)
    used = set(re.findall(r"var\(--(\w+)\)", page))
    assert {"ink", "muted", "accent", "noise"} <= used <= set(COLOURS)


def test_colours_can_be_read_on_their_paper() -> None:
    """Contrast by WCAG 2: text above 4.5, marks above 3."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert len({shades[0] for shades in COLOURS.values()}) == len(COLOURS)
    for scheme in (0, 1):
        paper = light(COLOURS["paper"][scheme])
        for role, least in (("ink", 7), ("muted", 4.5), ("accent", 4.5), ("noise", 4.5), ("second", 3), ("third", 3)):
            bright, dim = sorted((light(COLOURS[role][scheme]), paper), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= least, (role, scheme)


def test_points_tell_their_figures_when_hovered(written: Path) -> None:
    page = (written / "report.html").read_text(encoding="utf-8")
    root = ElementTree.fromstring(re.findall(r"<svg.*?</svg>", page, re.DOTALL)[0])
    titles = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 4
    assert (
        "int4-g64\n31.0 MB (31 % of 16 bits)\nKL 0.05 ± 0.001\ntop-1 91.2 %\nperplexity 20.60 (+3.00 % ± 0.10 %)"
        in titles
    )


def test_the_markdown_links_to_pictures_that_exist(written: Path) -> None:
    text = (written / "report.md").read_text(encoding="utf-8")
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(links) == 6 and sorted(links) == sorted(f"plots/{path.name}" for path in (written / "plots").iterdir())
    assert all((written / link).read_bytes().startswith(b"\x89PNG") for link in links)
    assert "int8 keeps 99.34 %" in text


def test_tables_of_the_markdown_are_whole(hostile: Path, written: Path) -> None:
    for folder in (hostile, written):
        lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()
        rows = [line for line in lines if line.startswith("|")]
        widths = [len(re.findall(r"(?<!\\)\|", line)) for line in rows]
        starts = [i for i, line in enumerate(rows) if line.startswith("| ---")]
        assert starts and all(widths[i] == widths[i - 1] == widths[i + 1] for i in starts)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("int4-g64 (31 %, +3 %)", "int4-g64 (31 %, +3 %)"),
        ("# a", "\\# a"),
        ("- a\n- b", "\\- a - b"),
        ("12. a", "12\\. a"),
        ("![a](b) <i> `c` a_b $x$ a|b &lt;", "!\\[a\\](b) \\<i\\> \\`c\\` a\\_b \\$x\\$ a\\|b \\&lt;"),
    ],
)
def test_markdown_escapes_what_would_act(text: str, wanted: str) -> None:
    assert escape(text) == wanted


def test_equal_results_give_equal_files(written: Path, tmp_path: Path) -> None:
    folder = write(tmp_path, usual())
    write_report(folder)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 9
    assert all((folder / name).read_bytes() == (written / name).read_bytes() for name in files)


def test_names_cannot_do_anything(hostile: Path) -> None:
    page = Page(hostile / "report.html")
    assert page.tags.count("script") == 1 and not page.handlers and not page.open
    assert all(address.startswith("#") or address == "data:," for address in page.addresses)
    assert page.text.count("<script>alert('x')</script>") > 20
    markdown = (hostile / "report.md").read_text(encoding="utf-8")
    assert "<script>" not in markdown.replace("\\<", "") and not re.search(r"(?<!\\)\]\(javascript", markdown)
    assert all(re.fullmatch(r"[a-z0-9-]+\.png", path.name) for path in (hostile / "plots").iterdir())


def test_models_whose_names_look_alike_stay_apart(tmp_path: Path) -> None:
    rows = [row | {"model": model} for model in ("a/b", "a-b", "!!") for row in quick(usual()[:2])]
    write_report(write(tmp_path, rows))
    page = Page(tmp_path / "report.html")
    assert len(page.ids) == len(set(page.ids)) and {"#a-b-wikitext2", "#a-b-wikitext2-2"} <= set(page.addresses)
    assert len(list((tmp_path / "plots").glob("*-kl.png"))) == 3


def test_protocols_that_differ_are_told(tmp_path: Path) -> None:
    other = make("other")
    other["protocol"] = other["protocol"] | {"context": 64}
    write_report(write(tmp_path, quick([reference(), make("x"), other])))
    assert "different protocols (context)" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "different protocols (context)" in (tmp_path / "report.md").read_text(encoding="utf-8")


def quick(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of few pictures, for these take most of the time."""
    return [row | {"layers": [], "speed": None} for row in rows]


NOTHING = dict.fromkeys(("kl", "perplexity", "top1", "bytes", "speed", "seconds", "protocol", "versions", "machine"))


@pytest.mark.parametrize(
    "rows",
    [
        [make("alone", layers=[], speed=None)],
        [make("nothing", layers=[], **NOTHING)],
        [failed("a")],
        [reference()],
        quick([reference(), make("exact", 0.0, change=0.0), make("better", 1e-9, change=-0.02)]),
        quick([reference(), make("same", 0.1), make("same too", 0.1)]),
        quick([reference(), make("huge", 11.0, change=1e5), make("no error", perplexity={"value": 3.0})]),
        [reference(), make("odd", layers=[{"fqn": "lm_head.weight", "sqnr": 3.0}, {"fqn": "7", "sqnr": None}])],
    ],
)
def test_whatever_is_missing_there_is_a_report(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    write_report(write(tmp_path, rows))
    page = Page(tmp_path / "report.html")
    assert not page.open and all(row["label"] in page.text for row in rows)
    assert not re.search(r"\b(nan|inf|None(?! stays))\b", page.text.partition("use strict")[0])


def test_tasks_have_a_table_and_their_perplexity_a_warning(tmp_path: Path) -> None:
    metrics = {"acc": {"value": 0.4321, "stderr": 0.0101}, "word_perplexity": {"value": 12.5, "stderr": None}}
    rows = [*quick([reference()]), make("x", layers=[], speed=None, tasks={"toy": {"version": 2, "metrics": metrics}})]
    write_report(write(tmp_path, rows))
    for text in (Page(tmp_path / "report.html").text, (tmp_path / "report.md").read_text(encoding="utf-8")):
        plain = text.replace("\\", "")
        assert "toy (v2) acc" in plain and "0.4321 ± 0.0101" in plain and "are other metrics" in plain


def test_a_missing_package_is_named_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, usual())
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jinja2" else find(name))
    with pytest.raises(MissingDependencyError, match=r"llmquant\[report\]"):
        write_report(folder)
    assert [path.name for path in folder.iterdir()] == ["results.jsonl"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, quick(usual()[:2]))
    (folder / "plots").write_text("a file in the way")
    with pytest.raises(ReportError, match="cannot be written"):
        write_report(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["plots", "results.jsonl"]


def test_damaged_results_leave_the_old_report(tmp_path: Path) -> None:
    folder = write(tmp_path, quick(usual()[:2]))
    before = write_report(folder).read_bytes()
    (folder / "results.jsonl").write_text(json.dumps(usual()[0])[:-9])
    with pytest.raises(ReportError, match="damaged"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before


def test_reading_needs_no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing the report pulls in neither matplotlib nor jinja2."""
    real = builtins.__import__

    def guarded(name: str, *args: Any, **kwargs: Any) -> Any:
        assert name.split(".")[0] not in ("matplotlib", "jinja2", "markupsafe"), name
        return real(name, *args, **kwargs)

    import sys

    for name in [name for name in sys.modules if name.startswith("llmquant.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", guarded)
    import llmquant.report  # noqa: F401
