"""`ties-ray results`."""

from collections.abc import Sequence

import click

from ties_ray.cli import completion
from ties_ray.cli.command import SET, command, stores_of
from ties_ray.cli.console import Console


@command
@click.argument("folder", shell_complete=completion.files)
@SET
def results(console: Console, folder: str, overrides: Sequence[str]) -> int:
    """Print the table of a finished sweep, or of a search.

    FOLDER is what stands before `{setting}` in the recipe's `output.path`. The same table lies there as results.csv.
    For a search it is the output. The search may be under way.

    \b
    Examples:
      ties-ray results ./sweep
      ties-ray results ./tuned
      ties-ray results s3://merged/sweep --json | jq '.rows[] | {setting, norm}'
    """
    stores = stores_of(overrides)
    from ties_ray.cli import searches, sweeps
    from ties_ray.reports import search, sweep
    from ties_ray.stores import absolute

    place = absolute(folder).rstrip("/")
    if table := search.find(stores, place):
        console.show(table, *searches.of_table(table))
        return 0
    record = sweep.read(stores, place)
    console.show(record, *sweeps.of_results(record))
    return 0
