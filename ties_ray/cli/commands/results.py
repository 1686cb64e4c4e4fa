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
    """Print the table of a finished sweep.

    FOLDER is what stands before `{setting}` in the recipe's `output.path`. The same table lies there as results.csv.

    \b
    Examples:
      ties-ray results ./sweep
      ties-ray results s3://merged/sweep --json | jq '.rows[] | {setting, norm}'
    """
    stores = stores_of(overrides)
    from ties_ray.cli import sweeps
    from ties_ray.reports import sweep
    from ties_ray.stores import absolute

    record = sweep.read(stores, absolute(folder).rstrip("/"))
    console.show(record, *sweeps.of_results(record))
    return 0
