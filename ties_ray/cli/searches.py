"""Searches as text for people."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ties_ray.cli.screen import duration, fact_table, new_table, num_bytes
from ties_ray.cli.sweeps import values
from ties_ray.errors import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ties_ray.reports.search import SearchedCandidate, SearchedTable, SearchRecord, SearchResult

FEW = 12
"""Candidates that are listed; further ones are counted."""
AXES = 24
"""Axes that are listed."""


def of_plan(record: "SearchRecord") -> "Iterator[RenderableType]":
    """Yield what a search will do."""
    facts = fact_table()
    named = ", ".join(map(printable, record.axes[:AXES]))
    more = f" and {len(record.axes) - AXES} more" if len(record.axes) > AXES else ""
    facts.add_row("searches", f"{len(record.axes):,} numbers of {record.num_models:,} models: {named}{more}")
    if record.shares:
        facts.add_row("weights", "as shares that sum to 1: a common factor changes nothing")
    done = f", {record.done:,} of them done" if record.done else ""
    facts.add_row("sampler", f"{record.sampler}: {record.budget:,} candidates{done}, {record.batch:,} at a time")
    facts.add_row("score", ", ".join(record.evaluations))
    if record.confirmations:
        facts.add_row("confirms", f"the best {record.best} by {', '.join(record.confirmations)} on other data")
    workers = record.workers or 1
    facts.add_row("workers", f"{workers:,}, {record.executor}")
    facts.add_row("memory", f"{num_bytes(record.memory)} of models a worker, beside the model that is scored")
    facts.add_row("reads", f"{num_bytes(record.bytes_read)} a worker, once for all candidates")
    facts.add_row("output", record.output)
    facts.add_row("table", record.table_uri)
    yield facts
    if not record.confirmations:
        yield "note: the best of many scores is better than it is: `confirm` scores it on other data"


def of_result(result: "SearchResult") -> "Iterator[RenderableType]":
    """Yield the table of a search."""
    before = f", {result.evaluated:,} scores in this call" if result.evaluated < len(result.rows) else ""
    yield f"done: {_scored(result.rows)}, in {duration(result.seconds)}{before}"
    yield from _rows(result.rows, result.chosen)
    of = "candidate " + str(result.chosen) if result.chosen else "the recipe as it stands"
    gain = "" if result.improvement is None else f"; {result.improvement:+.6g} against the recipe as it stands"
    yield f"best: {of}{gain}"
    yield f"table: {result.table_uri}"
    yield f"merged: {result.output}"


def of_table(table: "SearchedTable") -> "Iterator[RenderableType]":
    """Yield the table of a search that may be under way."""
    yield f"searched by {printable(table.sampler)}, seed {table.seed}: {_scored(table.rows)}"
    yield from _rows(table.rows, None)
    yield f"table: {table.table_uri}"


def _scored(rows: "Sequence[SearchedCandidate]") -> str:
    scored = sum(row.merit is not None for row in rows)
    return f"{scored:,} of {len(rows):,} candidates have a score"


def _rows(rows: "Sequence[SearchedCandidate]", chosen: int | None) -> "Iterator[RenderableType]":
    """Yield the best candidates and the recipe as it stands. chosen: number of the one that was merged."""
    labels = list(dict.fromkeys(label for row in rows for label in row.scores))
    confirmed = list(dict.fromkeys(label for row in rows for label in row.confirmed))
    heads = [*labels, *(f"confirmed {label}" for label in confirmed)]
    table = new_table("candidate >", *(f"{printable(head)} >" for head in heads), "sets")
    listed = [*rows[:FEW], *(row for row in rows[FEW:] if not row.number)]
    for row in listed:
        mark = " *" if row.number == chosen else ""
        cells = [_figure(row.scores.get(label)) for label in labels]
        cells += [_figure(row.confirmed.get(label)) for label in confirmed]
        sets = values(row.values) if row.number else "as the recipe stands"
        table.add_row(f"{row.number}{mark}", *cells, printable(row.failed) if row.failed else sets)
    yield table
    if len(rows) > len(listed):
        yield f"and {len(rows) - len(listed):,} more in the table"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
