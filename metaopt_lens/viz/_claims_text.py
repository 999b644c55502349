"""Claims as tables for the terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table

from metaopt_lens.experiments import ClaimBlock
from metaopt_lens.viz._text import terminal_table, titled

_CLAIM, _CELL = 34, 22  # characters that a column needs to be read


def claims_text(block: ClaimBlock, width: int) -> Group:
    """Claims down, tasks across: as many tasks in a table as can be read in it, then the next ones below.

    Args:
        block: one model's.
        width: of the terminal, in characters.
    """
    at_once = max(1, (width - _CLAIM) // _CELL)
    starts = range(0, len(block.tasks), at_once)
    return Group(*(titled(block.title, _table(block, slice(start, start + at_once))) for start in starts))


def _table(block: ClaimBlock, tasks: slice) -> Table:
    table = terminal_table()
    for name in ("claim", *block.tasks[tasks]):
        table.add_column(name, overflow="fold")
    for claim, cells in block.rows:
        table.add_row(claim.text, *(cell.replace("`", "") for cell in cells[tasks]))
    return table
