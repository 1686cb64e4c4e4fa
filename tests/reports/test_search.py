"""The table of a search as people see it, also while the search is under way."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from ties_ray.cli import commands
from ties_ray.errors import InputError
from ties_ray.reports import search, sweep
from ties_ray.state.search_table import CandidateRow, Head, SearchTable
from ties_ray.stores import Stores

STORES = Stores({})
AXIS = "method.lambda"


@pytest.fixture
def output(tmp_path: Path) -> str:
    """Return the output of a search that has scored five candidates and confirmed two."""
    head = Head(search="a" * 16, sampler={"name": "random"}, seed=7, axes=[AXIS], evaluate=[], data=[])
    merits = {0: -2.0, 1: -1.0, 2: -1.5, 3: None, 4: -1.2}
    rows = [
        CandidateRow(
            stage="search", number=number, values={AXIS: float(number)}, merit=merit,
            scores={} if merit is None else {"loss": -merit}, failed="is not finite" if merit is None else "",
        )
        for number, merit in merits.items()
    ]  # fmt: skip
    rows += [
        CandidateRow(stage="confirm", number=number, values={}, merit=merit, scores={"loss": -merit})
        for number, merit in {1: -1.9, 4: -1.4}.items()
    ]
    rows.append(CandidateRow(stage="select", number=1, values={}, merit=0.0))
    SearchTable(STORES, str(tmp_path)).write(head, rows)
    return str(tmp_path)


def test_confirmed_candidates_come_first_then_the_others_by_merit(output: str) -> None:
    table = search.find(STORES, output)
    assert table is not None
    assert [(row.number, row.confirmed.get("loss")) for row in table.rows] == [
        (4, 1.4), (1, 1.9), (2, None), (0, None), (3, None),
    ]  # fmt: skip
    assert (table.sampler, table.seed, table.axes) == ("random", 7, [AXIS])
    assert table.table()[0] == {
        "number": 4, AXIS: 4.0, "merit": -1.2, "loss": 1.2, "confirmed loss": 1.4, "failed": "",
    }  # fmt: skip


def test_the_command_prints_it_as_text_and_as_json(output: str) -> None:
    printed = CliRunner().invoke(commands.commands, ["results", output])
    assert printed.exit_code == 0
    lines = [line.split() for line in printed.stdout.splitlines()]
    assert printed.stdout.startswith("searched by random, seed 7: 4 of 5 candidates have a score")
    assert ["4", "1.2", "1.4", "method.lambda=4.0"] in lines
    assert ["0", "2", "as", "the", "recipe", "stands"] in lines
    assert ["3", "is", "not", "finite"] in lines
    record = json.loads(CliRunner().invoke(commands.commands, ["results", output, "--json"]).stdout)
    assert [row["number"] for row in record["rows"]] == [4, 1, 2, 0, 3]


def test_a_folder_without_a_table_is_refused_with_what_to_give(tmp_path: Path) -> None:
    assert search.find(STORES, str(tmp_path)) is None
    with pytest.raises(InputError, match="no results of a sweep or a search; give the output of a search, or"):
        sweep.read(STORES, str(tmp_path))
