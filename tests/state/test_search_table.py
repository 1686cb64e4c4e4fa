"""The table of a search: written under a condition, and read as a document of strangers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Bucket
from ties_ray.errors import InputError, UnavailableError
from ties_ray.state import search_table
from ties_ray.state.search_table import CandidateRow, Head, SearchTable
from ties_ray.stores import Stores

HEAD = Head(search="0" * 16, sampler={"name": "random"}, seed=0, axes=["method.lambda"], evaluate=[], data=[])


def row(number: int, merit: float | None = 0.1) -> CandidateRow:
    return CandidateRow(stage="search", number=number, values={"method.lambda": 0.1 + number}, merit=merit)


def table_in(folder: Path | str, storage: Mapping[str, Any] | None = None) -> SearchTable:
    return SearchTable(Stores(storage or {}), str(folder))


def test_a_table_comes_back_bit_by_bit_and_in_order(tmp_path: Path) -> None:
    rows = [row(3, 1 / 3), row(1, -1e-300), row(2, None)]
    table = table_in(tmp_path)
    assert table.read() is None
    table.write(HEAD, rows)
    head, stored = table_in(tmp_path).read() or (None, {})
    assert head == HEAD
    assert list(stored.values()) == sorted(rows, key=lambda each: each.number)
    table.write(HEAD, [row(1)])
    assert len((table_in(tmp_path).read() or (None, {}))[1]) == 1


def test_of_two_searches_that_write_one_table_the_second_stops(tmp_path: Path) -> None:
    first, second = table_in(tmp_path), table_in(tmp_path)
    first.write(HEAD, [row(1)])
    with pytest.raises(UnavailableError, match="another search writes this table"):
        second.write(HEAD, [row(1), row(2)])
    second = table_in(tmp_path)
    second.read()
    second.write(HEAD, [row(1), row(2)])
    with pytest.raises(UnavailableError, match="another search writes this table"):
        first.write(HEAD, [row(1), row(2), row(3)])


GOOD = [HEAD.model_dump(mode="json"), row(1).model_dump(mode="json")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "can't read the table"),
        ("\n\n\n", "can't read the table"),
        ("[" * 100_000, "can't read the table"),
        (json.dumps({**GOOD[0], "form": 2}), "form"),
        (json.dumps({**GOOD[0], "search": "../.."}), "search"),
        (f"{json.dumps(GOOD[0])}\n{json.dumps(GOOD[1])}\n{json.dumps(GOOD[1])}", "line 3: holds a candidate twice"),
        (f"{json.dumps(GOOD[0])}\n{json.dumps({**GOOD[1], 'merit': 'NaN'})}", "merit"),
        (f"{json.dumps(GOOD[0])}\n{json.dumps({**GOOD[1], 'number': -1})}", "number"),
        (f"{json.dumps(GOOD[0])}\n{json.dumps({**GOOD[1], 'stage': 'merge'})}", "stage"),
        (f"{json.dumps(GOOD[0])}\n{json.dumps({**GOOD[1], 'more': 1})}", "more"),
        (f"{json.dumps(GOOD[0])}\n{json.dumps({**GOOD[1], 'values': {'a': [0] * 40_000}})}", "values"),
        (f"{json.dumps(GOOD[0])}\n{json.dumps(GOOD[1])[:-3]}", "can't read the table"),
    ],
)
def test_a_table_that_somebody_has_spoilt_is_refused_with_a_way_on(text: str, message: str, tmp_path: Path) -> None:
    table = table_in(tmp_path)
    table.write(HEAD, [])
    Path(table.uri).write_text(text)
    with pytest.raises(InputError, match="--fresh to forget this table") as error:
        table_in(tmp_path).read()
    assert message in str(error.value)


def test_a_table_of_too_many_rows_or_bytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table_in(tmp_path).write(HEAD, map(row, range(5)))
    monkeypatch.setattr(search_table, "MOST_ROWS", 3)
    with pytest.raises(InputError, match="has more than 3 rows"):
        table_in(tmp_path).read()
    monkeypatch.setattr(search_table, "MOST_BYTES", 100)
    with pytest.raises(InputError, match="at most 100 were expected"):
        table_in(tmp_path).read()


def test_the_table_of_a_search_lies_on_s3_too(s3_bucket: Bucket) -> None:
    first, second = (table_in(f"{s3_bucket.uri}/out", s3_bucket.storage) for _ in range(2))
    first.write(HEAD, [row(1)])
    first.write(HEAD, [row(1), row(2)])
    assert len((second.read() or (None, {}))[1]) == 2
    first.write(HEAD, [row(1), row(2), row(3)])
    with pytest.raises(UnavailableError, match="another search writes this table"):
        second.write(HEAD, [row(1), row(2), row(4)])
