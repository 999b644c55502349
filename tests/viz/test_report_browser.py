"""The report in a real browser, cut off from the network: first screen, sections, colours, paper, keyboard, phone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from shown import prompt
from test_browser import Visit, browser, visit

from metaopt_lens import Decomposition
from metaopt_lens.experiments import ExperimentResult, compile_prompts
from metaopt_lens.viz import write_comparison_page, write_compiled_outputs, write_page, write_report

pytestmark = pytest.mark.browser
__all__ = ["browser", "visit"]  # fixtures
_PIXELS = "(all) => all.map((el) => [el.scrollWidth, el.clientWidth])"


@pytest.fixture(scope="module")
def report(run: ExperimentResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([run], tmp_path_factory.mktemp("one") / "report.html")["page"]


@pytest.fixture(scope="module")
def reports(run: ExperimentResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, of what is said to be another model."""
    other = dataclasses.replace(run, config=dataclasses.replace(run.config, model="another"))
    return write_report([run, other], tmp_path_factory.mktemp("two") / "reports.html")["page"]


def test_the_first_screen_needs_no_library_and_sections_draw_when_opened(
    run: ExperimentResult, report: Path, visit: Visit
) -> None:
    """Plotly and circuitsvis stay text until a section is opened; then every plot in it has a picture."""
    visit.open(report)
    page = visit.page
    assert page.locator(".ml-verdict").count() == 1
    assert page.locator(".ml-first .ml-chart").count() == 2
    dots = page.locator(".ml-first .ml-dot")
    assert all(dot.bounding_box()["y"] < 900 for dot in dots.all())
    assert page.evaluate("[typeof Plotly, typeof CircuitsVis]") == ["undefined", "undefined"]
    page.locator("summary", has_text="Where it lives").click()
    visit.drawn()
    plots = page.locator(".js-plotly-plot")
    assert plots.count() == 2  # by depth and head by head; the other similarities are folded away inside
    page.locator("summary", has_text="Other similarities").click()
    visit.drawn()
    assert plots.count() >= 5
    for plot in plots.all():
        box, column = plot.locator("svg.main-svg").first.bounding_box(), plot.bounding_box()
        assert box["height"] > 100
        assert box["width"] <= column["width"] + 1
    assert page.evaluate("typeof CircuitsVis") == "undefined"
    visit.open_sections()
    assert page.locator(".ml-cv .colored-tokens").count() == page.locator(".ml-cv").count() > 0
    assert page.locator(".ml-findings tbody tr").count() == len(run.comparison("gd").findings())
    assert visit.problems == []
    assert [url for url in visit.requests if not url.startswith("data:image/")] == [report.as_uri()]


def test_stored_tables_open_and_are_saved_as_csv(
    run: ExperimentResult, report: Path, visit: Visit, tmp_path: Path
) -> None:
    """A table's rows are there once it is opened, and the file saved is the stored table, byte for byte."""
    visit.open(report)
    page = visit.page
    page.locator("summary", has_text="All tables").click()
    links = page.locator("a[download]")
    assert {link.get_attribute("download") for link in links.all()} == {f"{name}.csv" for name in run.table_names}
    stored = page.locator("details.ml-data", has_text="predictions (")
    assert stored.locator("table").count() == 0
    stored.locator("summary").click()
    stored.locator("table").wait_for()
    assert stored.locator("tbody tr").count() == len(run.table("predictions"))
    with page.expect_download() as saved:
        stored.locator("a").click()
    saved.value.save_as(tmp_path / "saved.csv")
    assert (tmp_path / "saved.csv").read_text(encoding="utf-8") == run.table("predictions").to_csv(index=False)
    assert visit.problems == []


def test_several_runs_show_a_matrix_whose_cells_open_their_run(reports: Path, visit: Visit) -> None:
    visit.open(reports)
    page = visit.page
    assert page.locator(".ml-matrix tbody tr").count() == 2
    opened = page.locator("details.ml-run[open]")
    assert opened.count() == 0
    page.locator(".ml-cell").nth(1).click()
    opened.wait_for()
    assert opened.get_attribute("id") == "run-1"
    assert opened.locator(".ml-verdict").is_visible()
    assert opened.locator(".ml-verdict").bounding_box()["y"] < 900
    assert page.locator(".js-plotly-plot").count() == 0  # its sections are closed
    assert visit.problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(
    run: ExperimentResult,
    result: Decomposition,
    tiny: Any,
    report: Path,
    reports: Path,
    visit: Visit,
    tmp_path: Path,
    scheme: str,
) -> None:
    """Contrast, names, headings, tables, keyboard, on all pages; sections open, but for those of several runs."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    pages: dict[str, Callable[[], Path]] = {
        "report": lambda: report,
        "reports": lambda: reports,
        "decomposition": lambda: write_page(result, tmp_path / "page.html", predictions=[result.predict()]),
        "comparison": lambda: write_comparison_page(run.comparison("gd"), tmp_path / "comparison.html"),
        "compiled": lambda: write_compiled_outputs(compile_prompts(tiny, [prompt()]), tmp_path)["page"],
    }
    visit.page.emulate_media(color_scheme=scheme)
    faults = []
    for name, write in pages.items():
        visit.page.goto(write().as_uri())
        if name != "reports":
            visit.page.evaluate("document.querySelectorAll('.ml-part').forEach((el) => { el.open = true; })")
        visit.drawn()
        for fault in axe.Axe().run(visit.page, options={"resultTypes": ["violations"]}).response["violations"]:
            if fault["impact"] in ("serious", "critical"):
                faults.append((name, fault["id"], [node["html"][:120] for node in fault["nodes"][:3]]))
    assert faults == []


def test_axe_would_find_a_fault(visit: Visit, tmp_path: Path) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    faulty = tmp_path / "faulty.html"
    faulty.write_text("<html><body><p style='color:#ccc;background:#fff'>pale</p><button></button></body></html>")
    visit.page.goto(faulty.as_uri())
    found = {fault["id"] for fault in axe.Axe().run(visit.page).response["violations"]}
    assert {"color-contrast", "button-name", "html-has-lang"} <= found


def test_headings_are_in_order(report: Path, reports: Path, visit: Visit) -> None:
    """One first heading, and none that skips a level."""
    for path in (report, reports):
        visit.page.goto(path.as_uri())
        names = visit.page.locator("h1, h2, h3, h4, h5, h6").evaluate_all("(all) => all.map((el) => el.tagName)")
        levels = [int(name[1]) for name in names]
        assert levels.count(1) == 1
        assert levels[0] == 1
        assert max(after - before for before, after in pairwise(levels)) == 1


def test_the_keyboard_opens_sections_and_sorts(report: Path, visit: Visit) -> None:
    visit.open(report)
    page = visit.page
    page.keyboard.press("Tab")
    focused = page.locator(":focus")
    assert "Where it lives" in focused.inner_text()
    assert focused.evaluate("(el) => getComputedStyle(el).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.locator("details[open]").wait_for()
    visit.drawn()
    visit.open_sections()
    header = page.locator("th", has_text="first-order estimate").first
    header.locator("button").focus()
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    table = page.locator("table", has=header)
    column = header.evaluate("(el) => el.cellIndex + 1")
    cells = table.locator(f"tbody td:nth-child({column})").evaluate_all("(all) => all.map((el) => +el.dataset.order)")
    assert cells == sorted(cells, reverse=True)


def test_figures_follow_the_readers_theme(report: Path, visit: Visit) -> None:
    """Text of page and figures is dark on light, light on dark, also when the theme changes while the page is open."""
    visit.page.emulate_media(color_scheme="light")
    visit.open(report)
    visit.page.locator("summary", has_text="Where it lives").click()
    visit.drawn()

    def brightness() -> tuple[float, float, float]:
        """Of a figure's text, of the page's text, of the page's background; from 0 to 255."""
        colours = visit.page.evaluate(
            "[getComputedStyle(document.querySelector('.xtick text')).fill, getComputedStyle(document.body).color, "
            "getComputedStyle(document.body).backgroundColor]"
        )
        text, ink, paper = (sum(map(int, c.removeprefix("rgb(").removesuffix(")").split(","))) / 3 for c in colours)
        return text, ink, paper

    text, ink, paper = brightness()
    assert max(text, ink) < 80 < 230 < paper
    sheet = visit.page.locator(".js-plotly-plot .main-svg").first
    assert sheet.evaluate("(el) => el.style.background") in ("rgba(0, 0, 0, 0)", "transparent")
    visit.page.emulate_media(color_scheme="dark")
    visit.page.wait_for_timeout(50)
    text, ink, paper = brightness()
    assert paper < 40 < 200 < min(text, ink)


def test_printing_opens_and_draws_all_sections(report: Path, visit: Visit) -> None:
    """On paper every section is open and drawn, in dark ink and no wider than the paper; afterwards they are closed."""
    visit.page.emulate_media(color_scheme="dark")
    visit.open(report)
    page = visit.page
    plain = page.pdf(format="A4")  # the listener below runs after the page's own
    page.evaluate(
        """addEventListener("beforeprint", () => {
          const all = (of) => document.querySelectorAll(of).length;
          window.seen = [all("details:not([open], .ml-data)"), all(".ml-plot:not(.js-plotly-plot)"), all(".ml-plot"),
            Math.max(...[...document.querySelectorAll(".main-svg")].map((el) => el.clientWidth)),
            getComputedStyle(document.querySelector(".xtick text")).fill];
        })"""
    )
    printed = page.pdf(format="A4")
    closed, missing, plots, widest, ink = page.evaluate("window.seen")
    assert (closed, missing) == (0, 0)
    assert plots >= 8
    assert widest <= 680
    assert ink == "rgb(31, 41, 51)"
    assert page.locator("details[open]").count() == 0
    page.evaluate("document.querySelectorAll('details').forEach((el) => el.remove())")
    without = page.pdf(format="A4")
    first, second, bare = (document.count(b"/Type /Page\n") for document in (plain, printed, without))
    assert abs(first - second) <= 1  # the same content; plots that are drawn for the first time may break elsewhere
    assert first > bare + 3


def test_nothing_is_cut_off_on_a_desk_or_a_phone(report: Path, reports: Path, visit: Visit) -> None:
    """At 1400 pixels tables show all their columns; at 390 no page scrolls sideways, open or closed."""
    page = visit.page
    page.set_viewport_size({"width": 1400, "height": 900})
    visit.open(report)
    visit.open_sections()
    widths = page.locator(".ml-scroll:not(.ml-data *)").evaluate_all(_PIXELS)
    assert len(widths) >= 4
    assert [pair for pair in widths if pair[0] > pair[1]] == []
    page.set_viewport_size({"width": 390, "height": 900})
    for path in (report, reports):
        page.goto(path.as_uri())
        visit.drawn()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        charts = page.locator(".ml-chart").evaluate_all(_PIXELS)
        assert [pair for pair in charts if pair[0] > pair[1]] == []
        visit.open_sections()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        sentences = page.locator(".ml-findings td:nth-child(3)")
        assert min(cell.bounding_box()["width"] for cell in sentences.all()) > 280
    assert visit.problems == []
