"""The token views hold the attention and the shares of the result, demonstration by demonstration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from shown import cards

from metaopt_lens import Decomposition, HeadRef
from metaopt_lens._errors import HeadError, OptionError
from metaopt_lens.runs import Runs
from metaopt_lens.viz import attention_view, token_view
from metaopt_lens.viz._sceptic_figures import _points


def changed(result: Decomposition, **fields: Any) -> Decomposition:
    """The decomposition of an in-context run with other contents."""
    return replace(result, runs=Runs({"icl": replace(result.runs.icl, **fields)}))


def _values(panel: list) -> torch.Tensor:
    return torch.tensor([v for row in panel if row.props for v in row.props["values"]])


def test_attention_view_shows_the_pattern_of_every_token(result: Decomposition) -> None:
    (card,) = cards(attention_view(result, ["L1H2"]).html)
    assert card.head == "L1H2"
    (panel,) = card.panels
    torch.testing.assert_close(_values(panel), result.pattern[1, 2], atol=1e-6, rtol=0)
    shown = [token for row in panel for token in row.props["tokens"]]
    assert [t.replace("\u200b", "").replace("⏎", "\n") for t in shown] == list(result.tokenized.tokens)


def test_demonstrations_are_rows_with_their_share_of_the_attention(result: Decomposition) -> None:
    (card,) = cards(attention_view(result, [HeadRef(1, 2)]).html)
    rows = card.panels[0]
    assert [row.name for row in rows] == ["start", "demo 1", "demo 2", "demo 3", "demo 4", "query"]
    for row, span in zip(rows[1:5], result.tokenized.demos, strict=True):
        assert len(row.props["tokens"]) == len(span)
        assert row.total == pytest.approx(float(result.pattern[1, 2, span.slice].sum()), abs=1e-3)
    assert sum(row.total for row in rows[1:5]) == pytest.approx(float(result.softmax.mass[1, 2]), abs=3e-3)
    assert sum(row.total for row in rows) == pytest.approx(1, abs=3e-3)


def test_the_attention_sink_has_a_row(with_sinks: Decomposition) -> None:
    (card,) = cards(attention_view(with_sinks, ["L0H1"]).html)
    (sink,) = [row for row in card.panels[0] if row.name == "sink"]
    assert sink.total == pytest.approx(float(with_sinks.sink[0, 1]), abs=1e-3)
    assert sum(row.total for row in card.panels[0]) == pytest.approx(1, abs=3e-3)


@pytest.mark.parametrize("form", ["softmax", "linear"])
def test_token_view_shows_the_shares_and_they_sum_to_one(result: Decomposition, form: str) -> None:
    for card in cards(token_view(result, form=form).html):
        ref = HeadRef.parse(card.head)
        (panel,) = card.panels
        expected = result.token_shares(ref.layer, ref.head, form)[result.demonstrations.slice]
        torch.testing.assert_close(_values(panel), expected, atol=1e-6, rtol=0)
        assert [row.name for row in panel] == ["demo 1", "demo 2", "demo 3", "demo 4"]
        assert sum(row.total for row in panel) == pytest.approx(1, abs=3e-3)
        props = panel[0].props
        assert props["minValue"] == -props["maxValue"]
        assert props["maxValue"] == pytest.approx(float(expected.abs().max()), abs=1e-6)


def test_every_position_has_a_panel_and_the_last_is_open(everywhere: Decomposition) -> None:
    for view in (attention_view(everywhere, ["L2H0"]), token_view(everywhere, ["L2H0"])):
        (card,) = cards(view.html)
        assert card.hidden == [True, False]
    (card,) = cards(attention_view(everywhere, ["L2H0"]).html)
    for index in range(2):
        torch.testing.assert_close(_values(card.panels[index]), everywhere.pattern[index, 2, 0], atol=1e-6, rtol=0)


def test_the_strongest_heads_are_shown_by_default(result: Decomposition) -> None:
    expected = [str(ref) for ref in result.heads(4)]
    assert [card.head for card in cards(attention_view(result).html)] == expected
    assert [card.head for card in cards(token_view(result).html)] == expected
    assert result.attention_view(["L0H0"]) == attention_view(result, ["L0H0"])
    assert result.token_view(["L0H0"], "linear") == token_view(result, ["L0H0"], form="linear")


def test_wrong_heads_are_refused(result: Decomposition) -> None:
    with pytest.raises(HeadError, match="no head L9H9: the model has layers 0 to 2 with heads 0 to 3"):
        attention_view(result, ["L9H9"])
    with pytest.raises(HeadError, match="cannot read 'third head' as a head"):
        token_view(result, ["third head"])
    with pytest.raises(OptionError, match="no heads to show"):
        attention_view(result, [])


def test_tokens_that_look_like_markup_stay_text(result: Decomposition) -> None:
    nasty = "<script>&amp;\"'</script>"
    tokens = (nasty, *result.tokenized.tokens[1:])
    view = attention_view(changed(result, tokens=replace(result.tokenized, tokens=tokens)), ["L0H0"])
    assert "<script" not in view.html
    shown = cards(view.html)[0].panels[0][0].props["tokens"][0]
    # circuitsvis sets it as HTML: no "<" or "&" may be followed by what makes it markup
    assert shown == "<\u200bscript>&\u200bamp;\"'<\u200b/script>"


def test_a_meta_gradient_of_zero_is_drawn_without_colour(result: Decomposition) -> None:
    silent = changed(result, pattern=torch.zeros_like(result.runs.icl.pattern))
    (card,) = cards(token_view(silent, ["L0H0"]).html)
    assert not _values(card.panels[0]).any()
    assert card.panels[0][0].props["maxValue"] > 0


def test_a_view_can_be_saved_and_shows_itself_in_a_notebook(result: Decomposition, tmp_path: Path) -> None:
    view = attention_view(result, ["L1H2"])
    saved = view.save(tmp_path / "view.html").read_text(encoding="utf-8")
    notebook = view._repr_html_()
    for text in (saved, notebook):
        assert text.count("var CircuitsVis=") == 1
        assert view.html in text
    assert "plotly" not in saved.split("</style>")[1].split("var CircuitsVis=")[0]


def test_a_value_off_the_scale_is_an_arrow_with_its_number() -> None:
    """A worst R² would stretch the scale until nothing else could be read, and clipped it would look like no value."""
    points = _points("x", ["a", "b", "c"], [-18.5, 0.5, 4.25], [-20.0, 0.25, 4.0], [-17.0, 1.0, 4.5])
    assert points.x == (-0.25, 0.5, 1.05)
    assert points.marker.symbol == ("triangle-left", "circle", "triangle-right")
    assert points.text == ("−18.50", "", "4.25")
    assert (points.error_x.arrayminus[1], points.error_x.array[1]) == (0.25, 0.5)
    assert points.error_x.array[0] == points.error_x.array[2] == 0
