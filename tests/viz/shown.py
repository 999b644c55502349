"""The prompt that the tests draw, and what is in the views' HTML, read back without a browser."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

from metaopt_lens import ICLPrompt


def prompt(query: str = "plum") -> ICLPrompt:
    """Four demonstrations in the bundled model's words."""
    demos = [("apple", "dax"), ("hammer", "wug"), ("pear", "dax"), ("saw", "wug")]
    return ICLPrompt(demos, query, label="dax", candidates=["dax", "wug"])


@dataclass
class Row:
    """One row of a card: its name, the properties circuitsvis gets, and the sum written at its end."""

    name: str = ""
    props: dict[str, Any] | None = None
    total: float = float("nan")


@dataclass
class Card:
    """One head's card: panels of rows, and which of them are hidden at first."""

    head: str
    panels: list[list[Row]] = field(default_factory=list)
    hidden: list[bool] = field(default_factory=list)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.cards: list[Card] = []
        self._into: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        classes = (given.get("class") or "").split()
        self._into = None
        if "ml-card" in classes:
            self.cards.append(Card(given["data-head"] or ""))
        elif "ml-panel" in classes:
            self.cards[-1].panels.append([])
            self.cards[-1].hidden.append("hidden" in given)
        elif "ml-row" in classes:
            self.cards[-1].panels[-1].append(Row())
        elif "ml-cv" in classes:
            assert given["data-element"] == "ColoredTokens"
            self.cards[-1].panels[-1][-1].props = json.loads(given["data-props"] or "")
        elif "ml-tag" in classes or "ml-sum" in classes:
            self._into = "name" if "ml-tag" in classes else "total"

    def handle_data(self, data: str) -> None:
        if self._into is not None:
            row = self.cards[-1].panels[-1][-1]
            if self._into == "name":
                row.name = data
            else:
                row.total = float(data.replace("−", "-"))
            self._into = None


def cards(html: str) -> list[Card]:
    """The cards in a view."""
    reader = _Reader()
    reader.feed(html)
    return reader.cards
