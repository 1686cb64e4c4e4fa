"""The table of a search, at `<output>/.ties-ray/search.jsonl`: JSON lines, the search itself first, then candidates.

It is all that a search keeps. A search that goes on asks its sampler again, and takes the scores from the table. The
table is rewritten whole under a condition, so object storage holds it, and of two searches one stops. Anybody may have
written it, so it is read within bounds, and every row is compared with what the sampler asks.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter

from ties_ray.errors import InputError, Problem, UnavailableError
from ties_ray.evaluations import DataPin
from ties_ray.state import documents
from ties_ray.state.documents import SMALL
from ties_ray.state.manifest import FOLDER
from ties_ray.stores import Stores, join

NAME = "search.jsonl"
"""Name of the table."""
MOST_BYTES = 2**28
"""Bytes of a table that is read."""
MOST_ROWS = 300_000
"""Rows of a table that is read."""
FRESH = "choose another output, or run it with --fresh to forget this table"

Stage = Literal["select", "search", "confirm"]
STAGES: tuple[Stage, ...] = ("select", "search", "confirm")
"""What rows are of, in the order of the table."""


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Head(_Line):
    """What a search is; the first line of its table."""

    form: Literal[1] = 1
    search: str = Field(pattern="^[0-9a-f]{16}$")
    """Digest of all that decides the rows."""
    sampler: dict[str, Any]
    seed: int
    axes: list[str]
    """Name of each axis."""
    evaluate: list[dict[str, Any]]
    """The evaluations, without what may hold a secret."""
    data: list[DataPin]
    """What they have read."""


class CandidateRow(_Line):
    """A candidate and its scores."""

    stage: Stage
    number: int = Field(ge=0, lt=MOST_ROWS)
    """Its place in the order asked; 0 is the recipe as it stands."""
    values: dict[str, Any]
    """What it sets, by place in the recipe."""
    merit: FiniteFloat | None
    """The number that is searched, larger is better; None where the candidate has no score."""
    scores: dict[str, FiniteFloat] = {}
    """The value of each evaluation by its label."""
    failed: str = Field(default="", max_length=1000)
    """Why it has no score."""


HEAD = TypeAdapter(Head)
ROW = TypeAdapter(CandidateRow)
Key = tuple[Stage, int]
"""Stage and number of a row."""


class SearchTable:
    """The table of one search in an output."""

    def __init__(self, stores: Stores, output: str) -> None:
        self.uri = join(join(output, FOLDER), NAME)
        self._store = stores.writer(output)
        self._etag = ""
        self._lines: dict[Key, bytes] = {}
        """The line of each row that was written; a row never changes."""

    def read(self) -> tuple[Head, dict[Key, CandidateRow]] | None:
        """Return the search and its rows; None where there is no table. Raises `InputError` where it can't be read."""
        try:
            pin, data = self._store.get(self.uri, MOST_BYTES)
        except FileNotFoundError:
            return None
        self._etag = pin.etag
        lines = _lines(data)
        head = documents.parse(next(lines, b""), HEAD, SMALL, self.uri, "the table of a search", FRESH)
        rows: dict[Key, CandidateRow] = {}
        for number, line in enumerate(lines):
            where = f"{self.uri}, line {number + 2}"
            row = documents.parse(line, ROW, SMALL, where, "the table of a search", FRESH)
            if number == MOST_ROWS or rows.setdefault((row.stage, row.number), row) is not row:
                message = "holds a candidate twice" if number < MOST_ROWS else f"has more than {MOST_ROWS:,} rows"
                raise InputError(Problem(where, message, FRESH))
        return head, rows

    def write(self, head: Head, rows: Iterable[CandidateRow]) -> None:
        """Replace the table. Raises `UnavailableError` where another search has written it meanwhile."""
        ordered = sorted(rows, key=lambda row: (STAGES.index(row.stage), row.number))
        data = b"".join((_line(head), *map(self._line_of, ordered)))
        pin = self._store.swap(self.uri, data, self._etag)
        if pin is None:  # or the answer to our own write was lost
            pin, there = self._store.get(self.uri, MOST_BYTES)
            if there != data:
                message = "another search writes this table"
                raise UnavailableError(Problem(self.uri, message, "let that run finish, or choose another output"))
        self._etag = pin.etag

    def forget(self) -> None:
        """Remove the table."""
        self._store.delete(self.uri)
        self._etag = ""
        self._lines.clear()

    def _line_of(self, row: CandidateRow) -> bytes:
        key = row.stage, row.number
        if key not in self._lines:
            self._lines[key] = _line(row)
        return self._lines[key]


def _line(line: _Line) -> bytes:
    return line.model_dump_json().encode() + b"\n"


def _lines(data: bytes) -> Iterator[bytes]:
    """Yield the lines of a text; what follows the last line break is one, too."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        yield data[start:end]
        start = end + 1
