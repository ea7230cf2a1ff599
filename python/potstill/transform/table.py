"""Tables of layers for a terminal."""

from __future__ import annotations

import io
from collections.abc import Iterable


def text_table(titles: Iterable[str], rows: Iterable[Iterable[str]], summary: Iterable[str]) -> str:
    """A table for 120 columns: the layer, columns with these titles, and why; then the lines of the summary."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
    table.add_column("layer", overflow="fold")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(file=io.StringIO(), width=120, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(table)
    for line in summary:
        console.print(Text(line))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())
