"""The page of a compiled context in a real browser, cut off from the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from shown import prompt
from test_browser import Visit, browser, visit

from metaopt_lens.experiments import compile_prompts
from metaopt_lens.viz import write_compiled_outputs

pytestmark = pytest.mark.browser
__all__ = ["browser", "visit"]  # fixtures


def test_the_compiled_page_is_drawn_on_a_desk_and_on_a_phone(tiny: Any, visit: Visit, tmp_path: Path) -> None:
    """Demonstrations are struck out, three answers stand side by side in view, and no page scrolls sideways."""
    found = compile_prompts(tiny, [prompt()])
    path = write_compiled_outputs(found, tmp_path)["page"]
    page = visit.page
    visit.watch()
    for width in (1400, 390):
        page.set_viewport_size({"width": width, "height": 900})
        page.goto(path.as_uri())
        page.wait_for_selector(".js-plotly-plot .main-svg")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        struck = page.locator(".ml-struck pre")
        assert struck.count() == len(found.patch.tokens.demos)
        for line in struck.evaluate_all("(all) => all.map((el) => getComputedStyle(el).textDecorationLine)"):
            assert line == "line-through"
        answers = page.locator(".ml-scroll").first
        assert answers.locator("th").all_inner_texts() == ["in context", "patched zero-shot", "zero-shot"]
        scroll, shown = answers.evaluate("(el) => [el.scrollWidth, el.clientWidth]")
        assert scroll <= shown
    assert visit.problems == []
    assert {url for url in visit.requests if not url.startswith(("file:", "data:", "blob:"))} == set()
