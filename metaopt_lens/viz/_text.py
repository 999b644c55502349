"""Tables for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text


def terminal_table() -> Table:
    """An empty table in the style of all others."""
    return Table(header_style="", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)


def titled(title: str, table: Table) -> Group:
    """Under a line of its own: rich would break a table's title at the table's width."""
    return Group("", Text(title, style="bold"), table)
