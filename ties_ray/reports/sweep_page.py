"""A sweep as one HTML file: heat maps of its grid and the table of its settings. It asks nobody for anything."""

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ties_ray.reports.page import environment
from ties_ray.reports.sweep import SettingResult, SweepResult
from ties_ray.tables import Row

MEASURES = ("norm", "changed", "conflict", "cancellation", "truncation")
"""Figures that have a heat map, beside the scores."""
LEFT_OUT = frozenset({"output", "run_id", "reused", "bytes_written"})
"""Columns of the table that the page leaves out."""
WIDEST = 40
"""The most columns and rows of a heat map. A longer axis is left to the table."""


class Cell(NamedTuple):
    """One setting in a heat map."""

    setting: str
    value: float | None
    heat: int
    """Place of the value between the least and the largest of its measure, in percent."""


class HeatMap(NamedTuple):
    """One measure over two axes of a grid."""

    measure: str
    rest: str
    """Values of the other axes."""
    rows: str
    """Place in the recipe whose values are the rows; empty where there is one axis."""
    columns: str
    row_values: list[str]
    column_values: list[str]
    cells: list[list[Cell | None]]


def page_of(result: SweepResult) -> str:
    """Return the page. Every text that comes from a recipe or a folder is escaped."""
    rows = result.table()
    filled = (name for row in rows for name, value in row.items() if value not in (None, ""))
    columns = [name for name in dict.fromkeys(filled) if name not in LEFT_OUT]
    template = environment().get_template("sweep.html.j2")
    return template.render(result=result, maps=list(maps_of(result.rows)), columns=columns, rows=rows, plain=_plain)


def maps_of(rows: Sequence[SettingResult]) -> Iterator[HeatMap]:
    """Yield a heat map for each measure that differs, and for each combination of further axes."""
    grid = _grid(rows)
    axes = list(grid[0].values) if grid else []
    values = {axis: list(dict.fromkeys(_text(row.values[axis]) for row in grid)) for axis in axes}
    varied = [axis for axis in axes if len(values[axis]) > 1]
    if not varied or any(len(values[axis]) > WIDEST for axis in varied[-2:]):
        return
    *further, columns = varied
    rows_axis = further.pop() if further else ""
    for measure in (*MEASURES, *dict.fromkeys(label for row in grid for label in row.scores)):
        figures = [value for row in grid if (value := _value(row, measure)) is not None]
        if len(set(figures)) < 2:
            continue
        least, span = min(figures), max(figures) - min(figures)
        parts: dict[str, dict[tuple[str, str], Cell]] = {}
        for row in grid:
            value = _value(row, measure)
            heat = 0 if value is None else round(100 * (value - least) / span)
            place = _text(row.values[rows_axis]) if rows_axis else "", _text(row.values[columns])
            rest = ", ".join(f"{axis} = {_text(row.values[axis])}" for axis in further)
            parts.setdefault(rest, {})[place] = Cell(row.setting, value, heat)
        ends = values[rows_axis] if rows_axis else [""]
        for rest, cells in parts.items():
            lines = [[cells.get((end, other)) for other in values[columns]] for end in ends]
            yield HeatMap(measure, rest, rows_axis, columns, ends, values[columns], lines)


def _grid(rows: Sequence[SettingResult]) -> list[SettingResult]:
    """Return the settings that set the same places as most others do."""
    by_places: dict[tuple[str, ...], list[SettingResult]] = {}
    for row in rows:
        by_places.setdefault(tuple(row.values), []).append(row)
    return max((group for places, group in by_places.items() if places), key=len, default=[])


def _value(row: SettingResult, measure: str) -> float | None:
    if measure in row.scores:
        return row.scores[measure]
    value = getattr(row, measure, None) if measure in MEASURES else None
    return None if value is None else float(value)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _plain(row: Row, column: str) -> str:
    """Return a value of the table as text."""
    value = row.get(column)
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
