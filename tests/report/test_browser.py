"""The page in a real browser: nothing complains, nothing overflows, colours follow the reader, tables sort."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Browser, find_chromium
from results import failed, make, noise, reference, usual, write

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from llmquant.report import write_report
from llmquant.report.theme import COLOURS

pytestmark = pytest.mark.slow
LONG = "a-name-without-any-room-to-break-" * 4


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("needs Chromium")
    with Browser(program, tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, one of them with all that makes a page wide."""
    tasks = {"toy": {"version": 1, "metrics": {"acc": {"value": 0.5, "stderr": 0.1}}}}
    wide = [reference(), make(LONG, tasks=tasks), failed(f"b{LONG}", what=LONG, where=LONG), noise()]
    wide += [make(f"int{bits}", 0.2**bits, bits * 10**7, 0.5**bits) for bits in range(2, 11)]
    wide += [make(f"crowd-{i}", 0.0012 + 0.0002 * i, 40_000_000 + 400_000 * i) for i in range(8)]
    rows = [row | {"model": LONG, "text": "t2"} for row in wide] + usual()
    return write_report(write(tmp_path_factory.mktemp("page"), rows))


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_complains_and_nothing_overflows(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width, dark)
    assert browser.run("innerWidth") == width
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.complaints == [] and browser.requests == [page.as_uri()]
    beyond = (
        "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && e.matches(':not(option)') && "
    )
    beyond += f"e.getBoundingClientRect().right > {width} + 0.5).map(e => e.outerHTML.slice(0, 80))"
    assert browser.run(beyond) == []


@pytest.mark.parametrize("dark", [False, True])
def test_colours_follow_the_reader(browser: Browser, page: Path, dark: bool) -> None:
    browser.open(page, 1280, dark)
    paper, ink = (rgb(COLOURS[role][dark]) for role in ("paper", "ink"))
    assert browser.run("getComputedStyle(document.documentElement).backgroundColor") == paper
    assert browser.run("getComputedStyle(document.querySelector('.lead')).color") == ink
    # Every text of a picture has one of the colours for text, and none is matplotlib's black.
    fills = set(browser.run("[...document.querySelectorAll('svg text')].map(e => getComputedStyle(e).fill)"))
    assert fills <= {rgb(COLOURS[role][dark]) for role in ("ink", "muted", "noise")} and ink in fills


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


def test_names_in_the_browser_s_font_do_not_meet(browser: Browser, page: Path) -> None:
    """Room was measured with another font; in the page's own, names must not grow into each other."""
    browser.open(page, 1280, False)
    script = """
    [...document.querySelectorAll('figure')].filter(f => f.textContent.includes('against size')).flatMap(figure => {
      const boxes = [...figure.querySelectorAll('svg text')].map(e => [e.textContent, e.getBoundingClientRect()]);
      return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>
        p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 3 && q.top < p.bottom - 3
      ).map(([b, q]) => a + ' meets ' + b));
    })"""
    assert browser.run(script) == []


def test_no_text_leaves_its_picture(browser: Browser, page: Path) -> None:
    browser.open(page, 1280, False)
    script = """
    [...document.querySelectorAll('svg')].flatMap(svg => {
      const frame = svg.getBoundingClientRect();
      return [...svg.querySelectorAll('text')].filter(text => {
        const box = text.getBoundingClientRect();
        return box.left < frame.left || box.right > frame.right || box.top < frame.top || box.bottom > frame.bottom;
      }).map(text => text.textContent);
    })"""
    assert browser.run(script) == []


COLUMN = "[...document.querySelectorAll('table.sortable')][{table}].tBodies[0].rows"


def column(browser: Browser, table: int, index: int) -> list[str | None]:
    rows = COLUMN.format(table=table)
    found: list[str | None] = browser.run(f"[...{rows}].map(r => r.cells[{index}].dataset.value ?? null)")
    return found


def click(browser: Browser, table: int, index: int) -> str:
    """Presses a heading as a keyboard does, and tells the order that it announces."""
    heading = f"document.querySelectorAll('table.sortable')[{table}].tHead.rows[0].cells[{index}]"
    browser.run(f"{heading}.querySelector('button').focus()")
    for kind in ("rawKeyDown", "char", "keyUp"):
        browser.call(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
        )
    order: str = browser.run(f"{heading}.ariaSort")
    return order


def place_of(browser: Browser, heading: str) -> int:
    """The column of the first table that has this heading."""
    headings: list[str] = browser.run("[...document.querySelector('table').rows[0].cells].map(c => c.textContent)")
    return [name.strip() for name in headings].index(heading)


def test_tables_sort_by_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page, 1280, False)
    headings = browser.run(
        "[...document.querySelectorAll('table.sortable')[0].tHead.rows[0].cells].map(c => c.innerText)"
    )
    index = next(i for i, heading in enumerate(headings) if heading.strip().startswith("decode"))
    before = column(browser, 0, index)
    assert None in before and len(set(before)) == 2  # the reference has no speed of its own
    index = next(i for i, heading in enumerate(headings) if heading.strip().startswith("KL p99"))
    values = sorted(float(value) for value in column(browser, 0, index) if value is not None)
    assert click(browser, 0, index) == "ascending"
    assert [float(value or "nan") for value in column(browser, 0, index)] == values
    assert click(browser, 0, index) == "descending"
    assert [float(value or "nan") for value in column(browser, 0, index)] == values[::-1]


def test_missing_figures_stay_last_and_names_sort_by_their_numbers(browser: Browser, page: Path) -> None:
    browser.open(page, 1280, False)
    headings = browser.run(
        "[...document.querySelectorAll('table.sortable')[0].tHead.rows[0].cells].map(c => c.innerText)"
    )
    index = next(i for i, heading in enumerate(headings) if heading.strip().startswith("decode"))
    for _ in range(2):
        click(browser, 0, index)
        values = column(browser, 0, index)
        assert values.count(None) == 2 and values[-2:] == [None, None]
    assert click(browser, 0, 0) == "ascending"
    assert browser.run("[...document.querySelectorAll('[aria-sort=ascending]')].length") == 1
    names = column(browser, 0, 0)
    assert names[0] == "16 bits" and [name for name in names if name and name.startswith("int")] == [
        f"int{bits}" for bits in range(2, 11)
    ]
