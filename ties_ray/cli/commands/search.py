"""`ties-ray search`."""

import contextlib
import sys
from collections.abc import Sequence

import click

from ties_ray.cli.command import RECIPE, SET, command, load_search, often
from ties_ray.cli.console import Console


@command
@RECIPE
@SET
@often
@click.option("--fresh", is_flag=True, help="Forget the table of the search, and what the output folder holds.")
@click.option("--plan", "only_plan", is_flag=True, help="Only show the space, and what the search costs.")
def search(console: Console, recipe: str, overrides: Sequence[str], fresh: bool, only_plan: bool) -> int:
    """Search the numbers of a RECIPE by scores on data, confirm the best on other data, and merge it.

    The recipe has a section `search`. Candidates are merged in memory, with the bytes of a merge. The table of all is
    kept in the output, and the same command goes on from it, as with a larger budget.

    \b
    Examples:
      ties-ray search search.yaml --plan
      ties-ray search search.yaml --workers 4
      ties-ray search search.yaml --set search.budget=200 --json | jq .rows
    """
    loaded = load_search(recipe, overrides)
    from ties_ray.cli import searches
    from ties_ray.operations import merging, searching

    # Ray and plugins print to standard output from any thread; only the record may stand there.
    with console.progress() as watch, contextlib.redirect_stdout(sys.stderr):
        watch(merging.READING_HEADERS)
        planned = searching.plan(loaded)
        if only_plan:
            record = planned.record()
        else:
            result = searching.carry_out(planned, started=console.started, fresh=fresh, watch=watch)
    if only_plan:
        console.show(record, *searches.of_plan(record))
    else:
        console.show(result, *searches.of_result(result))
    return 0
