"""A real browser, cut off from the network, draws the page."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import hide_demos

from metaopt_lens import Decomposition, DecompositionSet
from metaopt_lens.experiments import ExperimentResult
from metaopt_lens.viz import token_view, write_comparison_page, write_page

pytestmark = pytest.mark.browser
_WAITING = ":is(.ml-plot, .ml-cv):not([data-ready], details:not([open]) *)"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@dataclass
class Visit:
    """A page in the browser, what it complained about and what it asked for."""

    page: Any
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def watch(self) -> None:
        self.page.on("console", lambda m: self.problems.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def open(self, path: Path) -> None:
        self.watch()
        self.page.goto(path.as_uri())
        self.drawn()

    def drawn(self) -> None:
        """Wait until everything is drawn that is not folded away."""
        self.page.wait_for_selector(_WAITING, state="detached")
        self.page.wait_for_selector(".ml-cv[data-ready]:not(:has(.colored-tokens))", state="detached")

    def open_sections(self) -> None:
        self.page.evaluate("document.querySelectorAll('details').forEach((el) => { el.open = true; })")
        self.drawn()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser found: none of {', '.join(_NAMES)} is installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    options = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=found, args=options)
        yield running
        running.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900})
    yield Visit(context.new_page())
    context.close()


def test_maps_and_views_are_drawn_without_network(result: Decomposition, visit: Visit, tmp_path: Path) -> None:
    path = write_page(result, tmp_path / "page.html")
    visit.open(path)
    page = visit.page
    assert page.locator(".js-plotly-plot .hm").count() >= 9
    assert page.locator(".js-plotly-plot").count() == 9
    for plot in page.locator(".js-plotly-plot").all():
        box, column = plot.locator("svg.main-svg").first.bounding_box(), plot.bounding_box()
        assert box["height"] > 100
        assert box["width"] <= column["width"] + 1, "the plot is wider than its column"
    # Every root has become tokens that can be read, the whole prompt in each attention card.
    roots = page.locator(".ml-cv")
    assert roots.count() == 4 * 6 + 4 * 4
    assert page.locator(".ml-cv .colored-tokens").count() == roots.count()
    first = page.locator(".ml-card").first
    words = "".join(first.locator(".ml-cv").all_inner_texts()).replace("\u200b", "").replace("\xa0", "")
    assert words == "".join(result.tokenized.tokens).replace("\n", "⏎")
    assert "<bos>" in words
    assert visit.problems == []
    assert visit.requests == [path.as_uri()]


def test_colours_follow_the_numbers(result: Decomposition, visit: Visit, tmp_path: Path) -> None:
    visit.open(token_view(result, ["L1H1"]).save(tmp_path / "view.html"))
    shares = result.token_shares(1, 1)[result.demonstrations.slice]
    spans = visit.page.locator(".colored-tokens > span > span")
    assert spans.count() == len(shares)
    colours = spans.evaluate_all("(all) => all.map((el) => getComputedStyle(el).backgroundColor)")
    assert colours[int(shares.abs().argmax())] in ("rgb(111, 163, 234)", "rgb(229, 142, 104)")
    assert visit.problems == []
    assert len(visit.requests) == 1


def test_tabs_and_sorting_work(everywhere: Decomposition, visit: Visit, tmp_path: Path) -> None:
    visit.open(write_page(everywhere, tmp_path / "page.html", heads=["L1H1"]))
    card = visit.page.locator(".ml-card").first
    panels = card.locator(".ml-panel")
    assert [panels.nth(i).is_visible() for i in range(2)] == [False, True]
    card.locator(".ml-tabs button").first.click()
    assert [panels.nth(i).is_visible() for i in range(2)] == [True, False]

    visit.page.locator("table.ml-sortable th", has_text="mass").first.click()
    cells = visit.page.locator("table.ml-sortable tbody tr td:nth-child(2)")
    values = [float(v) for v in cells.evaluate_all("(all) => all.map((el) => el.dataset.order)")]
    assert values == sorted(values, reverse=True)
    assert len(values) == 12
    visit.page.locator("table.ml-sortable th", has_text="mass").first.click()
    values = [float(v) for v in cells.evaluate_all("(all) => all.map((el) => el.dataset.order)")]
    assert values == sorted(values)
    assert visit.problems == []


def test_a_click_opens_a_head_and_switches_a_demonstration_off(
    result: Decomposition, visit: Visit, tmp_path: Path
) -> None:
    """Maps, tokens, cards and stored leave-one-out runs answer without a server."""
    visit.open(write_page(result, tmp_path / "page.html", predictions=[result.predict()]))
    found = visit.page.locator(".ml-found")
    assert not found.locator(".ml-headcard").is_visible()
    colours = "(all) => all.map((el) => getComputedStyle(el).backgroundColor)"
    before = found.locator(".ml-token").evaluate_all(colours)
    found.locator("td[data-head=L2H1]").nth(1).click()
    card = found.locator(".ml-headcard")
    assert card.is_visible()
    assert card.locator("h3").inner_text() == "L2H1"
    assert card.locator("code").count() == 24  # six words of either side of either part
    assert found.locator(".ml-pick").input_value() == "L2H1"
    assert found.locator(".ml-token").evaluate_all(colours) != before
    total = sum(float(text.replace("−", "-")) for text in found.locator(".ml-total").all_inner_texts())
    assert abs(total - float(result.logits().head_total[2, 1])) < 0.05
    found.get_by_role("button", name="attention", exact=True).click()
    total = sum(float(text) for text in found.locator(".ml-total").all_inner_texts())
    assert abs(total - 1) < 0.01
    found.get_by_role("button", name="demonstrations").click()
    found.locator(".ml-pick").select_option("")
    assert not card.is_visible()
    found.locator("[data-demo='1']").click()
    assert "Without demonstration 2 the logit is" in found.locator(".ml-status").inner_text()
    assert found.locator(".ml-line.ml-off").count() == 1
    found.locator("[data-demo='1']").click()
    assert found.locator(".ml-status").inner_text() == ""
    assert visit.problems == []


def test_several_demonstrations_are_switched_off_at_once(result: Decomposition, visit: Visit, tmp_path: Path) -> None:
    """Map, card and rows then hold the renormalised softmax, and the status line the run of this selection."""
    visit.open(write_page(result, tmp_path / "page.html", predictions=[result.predict()]))
    found, model = visit.page.locator(".ml-found"), result.required_source("runs")
    found.locator("[data-demo='0']").click()
    found.locator("[data-demo='2']").click()
    tokens, said = result.tokenized, result.logits()
    right, (wrong,) = said.token_ids[0]
    with torch.no_grad():
        edits = hide_demos(tokens, (0, 2), range(3))
        logits = model.host.run_with_hooks(torch.tensor([tokens.ids]), fwd_hooks=edits)[0, -1]
    without = float(logits[right] - logits[wrong])
    status = found.locator(".ml-status").inner_text()
    shown = re.match(r"Without demonstrations 1, 3 the logit is ([^:]*): ", status)
    assert shown is not None
    assert _number(shown[1]) == pytest.approx(without, abs=0.006)
    # L2H1 without them: the masked softmax, its values through the head's direction.
    pattern = result.pattern[2, 1].clone()
    for demo in (0, 2):
        pattern[tokens.demos[demo].slice] = 0
    factor = 1 / float(pattern.sum())
    kept = said.per_token[2, 1].clone()
    for demo in (0, 2):
        kept[tokens.demos[demo].slice] = 0
    inside = factor * float(kept[result.demonstrations.slice].sum())
    cell = found.locator("td[data-head=L2H1]").nth(1)
    assert _number(cell.get_attribute("title").split()[1]) == pytest.approx(inside, abs=0.006)
    cell.click()
    totals = [_number(text) for text in found.locator(".ml-line:visible .ml-total").all_inner_texts()]
    assert sum(totals) == pytest.approx(factor * float(kept.sum()), abs=0.05)
    assert found.locator(".ml-line.ml-off").count() == 2
    found.get_by_role("button", name="all off").click()
    assert "Without demonstrations 1, 2, 3, 4" in found.locator(".ml-status").inner_text()
    assert cell.get_attribute("title") == "L2H1 0.00"
    found.get_by_role("button", name="all on").click()
    assert found.locator(".ml-status").inner_text() == ""
    assert _number(cell.get_attribute("title").split()[1]) == pytest.approx(float(said.meta_gradient[2, 1]), abs=0.006)
    assert visit.problems == []


def test_another_token_of_the_query_or_of_the_answer_is_chosen(
    result: Decomposition, visit: Visit, tmp_path: Path
) -> None:
    """Logit, sums, maps, rows and table change with where the answer is read; the answer's token appears when fed."""
    right, (wrong,) = result.logits().token_ids[0]
    visit.open(write_page(result, tmp_path / "page.html", answer=[right, wrong], versus=()))
    found, n = visit.page.locator(".ml-found"), result.tokenized.n_tokens
    with torch.no_grad():
        ids = torch.tensor([[*result.tokenized.ids, right]])
        logits = result.required_source("logits").host(ids)[0]
    options = found.locator(".ml-view option").all_inner_texts()
    assert len(options) == len(result.tokenized.query) + 1
    assert "answer token 2" in options[-1]
    assert not found.locator(".ml-line.ml-answer").is_visible()
    for index, (position, token) in enumerate([(n - 2, right), (n - 1, right), (n, wrong)]):
        found.locator(".ml-view").select_option(str(index + len(options) - 3))
        value = float(logits[position, token])
        assert _number(found.locator(".ml-asked b").inner_text()) == pytest.approx(value, abs=0.006)
        sums = found.locator(".ml-sums > span:nth-child(3n)").all_inner_texts()
        assert sum(map(_number, sums)) == pytest.approx(value, abs=0.05)
        cells = found.locator("td[data-head]").evaluate_all("(all) => all.map((el) => el.title.split(' ')[1])")
        rows = found.locator(".ml-line:visible .ml-total").all_inner_texts()
        assert sum(map(_number, cells)) == pytest.approx(sum(map(_number, rows)), abs=0.15)
        assert found.locator(".ml-here").get_attribute("data-token") == str(position)
        assert found.locator(".ml-strong tbody tr").count() == 12
        found.locator("[data-demo='3']").click()
        assert "Without demonstration 4 the logit is" in found.locator(".ml-status").inner_text()
        found.locator("[data-demo='3']").click()
    assert found.locator(".ml-line.ml-answer").is_visible()
    assert visit.problems == []
    assert len(visit.requests) == 1


def _number(text: str) -> float:
    return float(text.replace("−", "-"))


def test_a_request_would_have_been_noticed(visit: Visit, tmp_path: Path) -> None:
    """The check above can fail: a page that does load something is caught, by its request and by its error."""
    page = tmp_path / "loads.html"
    page.write_text(
        "<div class='ml-cv' data-ready='1'><div class='colored-tokens'></div></div>"
        "<script src='https://example.invalid/x.js'></script>"
    )
    visit.open(page)
    assert "https://example.invalid/x.js" in visit.requests
    assert visit.problems


def test_comparison_page_is_drawn_without_network(run: ExperimentResult, visit: Visit, tmp_path: Path) -> None:
    page_file = write_comparison_page(run.comparison("gd"), tmp_path / "comparison.html")
    page = visit.page
    visit.open(page_file)
    assert page.locator(".js-plotly-plot svg.main-svg").count() >= 8
    assert visit.problems == []
    assert visit.requests == [page_file.as_uri()]


def test_a_page_of_many_prompts_fits_a_phone(several: DecompositionSet, visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    page.set_viewport_size({"width": 390, "height": 900})
    visit.open(write_page(several, tmp_path / "page.html", predictions=[item.predict() for item in several]))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert visit.problems == []
