"""Sweeps as text for people."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ties_ray.cli.screen import duration, fact_table, new_table, num_bytes
from ties_ray.errors import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ties_ray.reports.sweep import SweepRecord, SweepResult

FEW = 40
"""Settings that are listed; further ones are counted."""


def of_plan(record: "SweepRecord") -> "Iterator[RenderableType]":
    """Yield what a sweep will do."""
    facts = fact_table()
    facts.add_row("settings", f"{len(record.settings):,}")
    facts.add_row("output", record.output)
    facts.add_row("reads", f"{num_bytes(record.bytes_read)}, once for all settings")
    facts.add_row("writes", num_bytes(record.bytes_written))
    facts.add_row("memory", f"{num_bytes(record.memory)} a worker, beyond its imports")
    yield facts
    table = new_table("setting", "models >", "sets")
    for each in record.settings[:FEW]:
        table.add_row(each.setting, f"{each.num_models:,}", values(each.values))
    yield table
    yield from _more(len(record.settings))
    if record.missing:
        yield (
            f"note: {num_bytes(record.missing)} of a shard's slices find no room in a worker, and are read again for "
            "each setting; raise run.memory"
        )


def of_results(result: "SweepResult") -> "Iterator[RenderableType]":
    """Yield the table of a sweep."""
    reused = sum(row.reused for row in result.rows)
    before = f", {reused:,} of them done before" if reused else ""
    read = f"; {num_bytes(result.bytes_read)} read" if result.bytes_read else ""
    yield f"done: {len(result.rows):,} settings in {duration(result.seconds)}{before}{read}"
    labels = list(dict.fromkeys(label for row in result.rows for label in row.scores))
    heads = ("setting", "models >", "norm >", "changed >", "conflict >", "cancelled >")
    table = new_table(*heads, *(f"{printable(label)} >" for label in labels), "sets")
    for row in result.rows[:FEW]:
        figures = (row.changed, row.conflict, row.cancellation)
        norm = "" if row.norm is None else f"{row.norm:.5g}"
        shares = ("" if figure is None else f"{figure:.1%}" for figure in figures)
        scores = (number(row.scores.get(label)) for label in labels)
        table.add_row(row.setting, f"{row.num_models:,}", norm, *shares, *scores, values(row.values))
    yield table
    yield from _more(len(result.rows))
    warned = [row for row in result.rows if row.warnings]
    yield from (f"warning: {row.setting}: {printable(row.warnings[0])}" for row in warned[:FEW])
    if result.table_files:
        yield f"table: {result.table_files[0]}"


def number(score: float | None) -> str:
    """Return a score in one word; nothing for one that is no number."""
    return "" if score is None else f"{score:.5g}"


def values(of: Mapping[str, object]) -> str:
    """Return what a setting sets in one line."""
    text = ", ".join(f"{place}={value}" for place, value in of.items())
    return printable(text if len(text) <= 80 else f"{text[:77]}...")


def _more(number: int) -> Iterator[str]:
    if number > FEW:
        yield f"and {number - FEW:,} more"
