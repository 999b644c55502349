"""Where values and intervals stand on a chart's scale, and what is written next to them."""

from __future__ import annotations

import math

import pytest

from metaopt_lens.viz._interval_chart import Row, interval_chart

_NONE = math.nan


def test_values_and_intervals_stand_where_their_numbers_are_on_the_scale() -> None:
    """Read back through the ticks: the same straight line goes through ticks, values and ends."""
    rows = [Row("a", 0.13, 0.02, 0.24, "value"), Row("b", -0.05, -0.09, -0.01)]
    chart = interval_chart("", "", rows, reference=(0.0, "0"))
    (at0, text0), (at1, text1) = chart["ticks"][0], chart["ticks"][-1]
    first, last = (float(text.replace("−", "-")) for text in (text0, text1))

    def number(place: float) -> float:
        return first + (place - at0) * (last - first) / (at1 - at0)

    for row, drawn in zip(rows, chart["rows"], strict=True):
        assert number(drawn["at"]) == pytest.approx(row.value)
        assert number(drawn["left"]) == pytest.approx(row.low)
        assert number(drawn["left"] + drawn["width"]) == pytest.approx(row.high)
    assert number(chart["line"][0]) == pytest.approx(0, abs=1e-12)
    for place, text in chart["ticks"]:
        assert number(place) == pytest.approx(float(text.replace("−", "-")), abs=1e-9)
        assert 0 <= place <= 100
    assert [row["value"] for row in chart["rows"]] == ["+0.130", "−0.050"]
    assert chart["rows"][1]["interval"] == "−0.090 to −0.010"


def test_intervals_wider_than_a_cosine_end_with_the_scale_and_are_written_in_full() -> None:
    (row,) = interval_chart("", "", [Row("two sets", 0.1, -3.2, 3.4)])["rows"]
    assert (row["left"], row["width"]) == (0, 100)
    assert row["interval"] == "−3.200 to +3.400"


def test_what_is_undefined_is_said_and_not_drawn() -> None:
    rows = [Row("none", _NONE, _NONE, _NONE), Row("one value", 0.5, _NONE, _NONE)]
    none, one = interval_chart("", "", rows)["rows"]
    assert (none["value"], none["interval"], none["at"], none["left"]) == ("not defined", "", None, None)
    assert (one["value"], one["interval"], one["left"]) == ("+0.500", "no interval", None)
    assert one["at"] is not None


def test_shares_are_in_percent_of_the_whole_scale() -> None:
    chart = interval_chart("", "", [Row("accuracy", 0.25, 0.1, 0.4)], percent=True)
    assert chart["ticks"] == [(0, "0 %"), (25, "25 %"), (50, "50 %"), (75, "75 %"), (100, "100 %")]
    (row,) = chart["rows"]
    assert (row["at"], row["left"], row["width"]) == (25, 10, pytest.approx(30))
    assert (row["value"], row["interval"]) == ("25 %", "10 % to 40 %")
