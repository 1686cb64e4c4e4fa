"""The screen: text that can't move a cursor, tables, and numbers as people read them."""

import sys
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ties_ray.errors import printable_lines

WIDTH = 160
"""Columns of output that does not go to a terminal."""


class Screen(Console):
    """A terminal on which no text moves a cursor, sets a title or turns a line around."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield what is printed; all invisible characters are escaped but rich's own control codes."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable_lines(segment.text))


def show(*things: RenderableType, file: TextIO | None = None) -> None:
    """Print texts and tables to a file, by default standard output; colour and fold them only on a terminal."""
    stream = file or sys.stdout
    console = Screen(file=stream, width=None if stream.isatty() else WIDTH, highlight=False, soft_wrap=True)
    for thing in things:
        console.print(thing, markup=False, soft_wrap=isinstance(thing, str | Text))


def num_bytes(value: float) -> str:
    """Return a size in decimal units: 1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"


def num(value: float) -> str:
    """Return a count in short: 8.03 B."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Return a time span: 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def fact_table() -> Table:
    """Return an empty table of two columns, a name and its value, without a header."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def new_table(*columns: str) -> Table:
    """Return an empty table; a column whose name ends in > is aligned to the right."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        right = column.endswith(" >")
        table.add_column(column.removesuffix(" >"), justify="right" if right else "left", overflow="fold")
    return table
