"""The plan and the outcome of a search, for machines and people."""

from collections.abc import Mapping
from typing import Any

from ties_ray.reports.records import MergeResult, Report
from ties_ray.state.search_table import MOST_ROWS, CandidateRow, Key, SearchTable
from ties_ray.stores import Stores
from ties_ray.tables import Row


class SearchRecord(Report):
    """What a search will do."""

    output: str
    search: str
    """Digest of all that decides the table."""
    table_uri: str
    axes: list[str]
    """Name of each number that is searched."""
    shares: bool
    """Whether weights are searched as shares that sum to 1, as a common factor changes nothing."""
    sampler: str
    budget: int
    done: int
    """Candidates that the table holds already."""
    batch: int
    """Candidates that can be evaluated at a time."""
    evaluations: list[str]
    confirmations: list[str]
    best: int
    """Number of the best that are confirmed."""
    num_models: int
    executor: str
    workers: int | None
    memory: int
    """Bytes of memory that the models take in each worker."""
    bytes_read: int
    """Bytes of inputs that each worker reads."""


class SearchedCandidate(Report):
    """A candidate of a finished search."""

    number: int
    """Its place in the order asked; 0 is the recipe as it stands."""
    values: dict[str, Any]
    """What it sets, by place in the recipe."""
    merit: float | None
    """The number that was searched, larger is better."""
    scores: dict[str, float]
    """Its scores by label."""
    confirmed_merit: float | None = None
    confirmed: dict[str, float] = {}
    """Its scores on other data, by label."""
    failed: str = ""

    def row(self) -> Row:
        """Return a row of the table: what it sets by place, then the scores."""
        values = {place: value if isinstance(value, str | int | float) else str(value)
                  for place, value in self.values.items()}  # fmt: skip
        confirmed = {f"confirmed {label}": value for label, value in self.confirmed.items()}
        return {"number": self.number, **values, "merit": self.merit, **self.scores, **confirmed, "failed": self.failed}


class SearchedTable(Report):
    """The table of a search, which may be under way."""

    output: str
    search: str
    """Digest of all that decides the table."""
    table_uri: str
    """The table that the search keeps: JSON lines."""
    sampler: str
    seed: int
    axes: list[str]
    """Name of each number that is searched."""
    rows: list[SearchedCandidate]
    """All candidates: those that were confirmed first, then by merit."""


class SearchResult(Report):
    """The outcome of a search."""

    output: str
    search: str
    """Digest of all that decides the table."""
    table_uri: str
    """The table that the search keeps: JSON lines."""
    rows: list[SearchedCandidate]
    """All candidates: those that were confirmed first, then by merit."""
    chosen: int
    """Number of the candidate that was merged."""
    improvement: float | None
    """How much better its score is than that of the recipe as it stood: the confirmed one, if there is one."""
    evaluated: int
    """Candidates that this call has evaluated; the table had the others."""
    workers_lost: int = 0
    evaluation_seconds: float = 0.0
    """Seconds of workers that merging and scoring took in this call."""
    seconds: float = 0.0
    merge: MergeResult
    """The record of the merge of the best."""


def ranked(rows: Mapping[Key, CandidateRow], budget: int = MOST_ROWS) -> list[SearchedCandidate]:
    """Return the candidates up to number `budget`: those that were confirmed first, then by merit."""
    made = [
        _candidate(row, rows.get(("confirm", number)))
        for (stage, number), row in rows.items()
        if stage == "search" and number <= budget
    ]

    def place(each: SearchedCandidate) -> tuple[bool, float, bool, float, int]:
        confirmed, merit = each.confirmed_merit, each.merit
        return confirmed is None, -(confirmed or 0.0), merit is None, -(merit or 0.0), each.number

    return sorted(made, key=place)


def find(stores: Stores, output: str) -> SearchedTable | None:
    """Return the table of a search in an output; None where there is none. Raises `InputError` for a broken one."""
    table = SearchTable(stores, output)
    stored = table.read()
    if stored is None:
        return None
    head, rows = stored
    return SearchedTable(
        output=output,
        search=head.search,
        table_uri=table.uri,
        sampler=str(head.sampler.get("name", "")),
        seed=head.seed,
        axes=head.axes,
        rows=ranked(rows),
    )


def _candidate(row: CandidateRow, confirmed: CandidateRow | None) -> SearchedCandidate:
    return SearchedCandidate(
        number=row.number,
        values=row.values,
        merit=row.merit,
        scores=row.scores,
        confirmed_merit=confirmed.merit if confirmed else None,
        confirmed=confirmed.scores if confirmed else {},
        failed=row.failed or (confirmed.failed if confirmed else ""),
    )
