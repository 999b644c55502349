"""Heads and token spans."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaopt_lens import HeadRef
from metaopt_lens._errors import HeadError, SpanError
from metaopt_lens._types import TokenSpan


@given(layer=st.integers(0, 999), head=st.integers(0, 999))
def test_heads_read_back_what_they_write(layer: int, head: int) -> None:
    ref = HeadRef(layer, head)
    assert HeadRef.parse(str(ref)) == ref
    assert HeadRef.parse(f" l{layer}h{head}\n") == ref


@pytest.mark.parametrize("text", ["", "3.7", "L3", "H7L3", "L3H7 L4H8", "L-1H0", "L3H", "LxHy", "L3H7x", "L 3H7"])
def test_other_texts_are_no_head(text: str) -> None:
    with pytest.raises(HeadError, match=r"write layer and head as in 'L3H7'") as caught:
        HeadRef.parse(text)
    assert repr(text) in str(caught.value)


def test_heads_are_checked_against_the_models_sizes() -> None:
    assert HeadRef(2, 3).check(3, 4) == HeadRef(2, 3)
    for layer, head in [(3, 0), (0, 4), (-1, 0), (0, -1)]:
        with pytest.raises(HeadError, match=rf"no head L{layer}H{head}: the model has layers 0 to 2 with heads 0 to 3"):
            HeadRef(layer, head).check(3, 4)


def test_heads_are_values() -> None:
    assert HeadRef(1, 2) == HeadRef(1, 2)
    assert len({HeadRef(1, 2), HeadRef(1, 2), HeadRef(2, 1)}) == 2
    assert sorted([HeadRef(1, 2), HeadRef(0, 9), HeadRef(1, 0)]) == [HeadRef(0, 9), HeadRef(1, 0), HeadRef(1, 2)]
    with pytest.raises(AttributeError):
        HeadRef(1, 2).layer = 3  # type: ignore[misc]


@given(start=st.integers(0, 20), length=st.integers(0, 20))
def test_spans_agree_with_ranges_and_slices(start: int, length: int) -> None:
    span = TokenSpan(start, start + length)
    everything = list(range(60))
    assert len(span) == length
    assert everything[span.slice] == list(range(start, start + length))
    assert [i for i in everything if i in span] == everything[span.slice]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (-2, -1)])
def test_spans_that_are_none(start: int, stop: int) -> None:
    with pytest.raises(SpanError, match=rf"0 <= start <= stop, got {start} and {stop}"):
        TokenSpan(start, stop)
