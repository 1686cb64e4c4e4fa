"""Tables of a recipe: CSV files with a header row, read within bounds."""

import csv
import io
from collections.abc import Callable, Mapping
from itertools import islice
from typing import NamedTuple, TypeVar

from ties_ray.errors import InputError, Problem
from ties_ray.recipe.parse import unfit
from ties_ray.stores import Stores

TABLE_BYTES = 4 * 2**20
"""The largest table that is read, in bytes."""
TABLE_ROWS = 40_000
"""The most rows of a table: empty rows would take a hundred times their size in memory."""
LINE_SHOWN = 200
"""The most characters of a header row that a message repeats."""
LINES_SHOWN = 20
"""The most problems of one table that are shown; the rest is counted."""

T = TypeVar("T")


class Table(NamedTuple):
    """What a kind of table holds."""

    columns: tuple[str, ...]
    required: tuple[str, ...]
    line: str
    """What a row stands for, as `model`."""


def read_table(
    uri: str, place: str, table: Table, stores: Stores, read_row: Callable[[str, Mapping[str, str]], T]
) -> list[T]:
    """Return what `read_row` makes of each row, from its place and its filled cells by column.

    place: where the recipe names the table. Raises `InputError` with all that is wrong with the rows.
    """
    made: list[T] = []
    problems: list[Problem] = []
    for line, row in enumerate(_rows(uri, place, table, stores), start=2):
        try:
            made.append(read_row(f"{uri}:{line}", _cells(f"{uri}:{line}", row)))
        except InputError as error:
            problems += error.problems
    if len(problems) > LINES_SHOWN:
        problems = [*problems[:LINES_SHOWN], Problem(uri, f"and {len(problems) - LINES_SHOWN:,} more problems")]
    if problems:
        raise InputError(problems)
    return made


def _rows(uri: str, place: str, table: Table, stores: Stores) -> list[dict[str | None, str]]:
    """Return the rows by column; the key None holds fields beyond the header row."""
    try:
        _, data = stores.of(uri).get(uri, TABLE_BYTES)
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig")), strict=True)
        columns = reader.fieldnames or []
        fitting = set(table.required) <= set(columns) <= set(table.columns)
        rows = list(islice(reader, TABLE_ROWS + 1)) if fitting else []
    except FileNotFoundError:
        raise InputError(Problem(place, f"there is no table {uri}", "check the path")) from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(Problem(uri, f"is not a CSV file in UTF-8 ({error})", "save it again")) from None
    if not rows:
        optional = [column for column in table.columns if column not in table.required]
        message = f"needs a header row and at least one {table.line}; columns: {', '.join(table.columns)}"
        message += f" (optional: {', '.join(optional)}); it has {', '.join(columns)[:LINE_SHOWN] or 'none'}"
        raise InputError(Problem(uri, message))
    if len(rows) > TABLE_ROWS:
        raise InputError(Problem(uri, f"has more than {TABLE_ROWS:,} rows", "split it into several tables"))
    return rows


def _cells(place: str, row: Mapping[str | None, str]) -> dict[str, str]:
    """Return the filled cells of a row."""
    if None in row:
        raise InputError(Problem(place, "has more fields than the header row", "quote a field with commas"))
    cells = {key: value.strip() for key, value in row.items() if key and value and value.strip()}
    if problems := [problem._replace(where=place) for problem in unfit(cells)]:
        raise InputError(problems)
    return cells
