"""Values that show themselves: in one line, in a notebook as tables, and as a data frame."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

MOST_CHARACTERS = 300
"""Characters of a value in one line."""
MOST_ROWS = 100
"""Rows of a table in a notebook; further ones are counted."""
Row = dict[str, object]


class Tabular:
    """A value with facts of its own, and with a table."""

    def _facts(self) -> Row:
        """Return what tells the value apart, by name."""
        raise NotImplementedError

    def table(self) -> list[Row]:
        """Return the rows of the value's table, each by column."""
        raise NotImplementedError

    def to_dataframe(self) -> Any:
        """Return the table as a data frame. Raises `ImportError` without pandas."""
        try:
            import pandas  # here, since nothing else needs it
        except ImportError:
            raise ImportError("to_dataframe needs pandas: pip install pandas; table() gives the rows") from None
        return pandas.DataFrame(self.table())

    def __repr__(self) -> str:
        text = ", ".join(f"{name}={value!r}" for name, value in self._facts().items())
        text = text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "..."
        return f"{type(self).__name__}({text})"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        facts = "".join(
            f"<tr><th>{_cell(name)}</th><td>{_cell(value)}</td></tr>" for name, value in self._facts().items()
        )
        return f"<table>{facts}</table>{html_table(self.table())}"


def html_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return rows as a table in HTML; it holds no markup of theirs."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{_cell(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(row.get(name, ''))}</td>" for name in columns) + "</tr>"
        for row in rows[:MOST_ROWS]
    )
    more = f"<p>and {len(rows) - MOST_ROWS:,} more</p>" if len(rows) > MOST_ROWS else ""
    return f"<table><tr>{head}</tr>{body}</table>{more}"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return html.escape(text)
