"""Claims as tables for the terminal."""

from __future__ import annotations

from rich.console import Group

from metaopt_lens.experiments import ClaimBlock
from metaopt_lens.viz._text import terminal_table, titled


def claims_text(block: ClaimBlock) -> Group:
    """Claims down, tasks across.

    Args:
        block: one model's.
    """
    table = terminal_table()
    for name in ("claim", *block.tasks):
        table.add_column(name, overflow="fold")
    for claim, cells in block.rows:
        table.add_row(claim.text, *(cell.replace("`", "") for cell in cells))
    return titled(block.title, table)
