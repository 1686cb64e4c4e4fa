"""`ties-ray sweep`."""

import contextlib
import sys
from collections.abc import Sequence

import click

from ties_ray.cli.command import RECIPE, SET, command, load_sweep, often
from ties_ray.cli.console import Console


@command
@RECIPE
@SET
@often
@click.option("--fresh", is_flag=True, help="Forget what the output folders hold of earlier merges.")
@click.option("--plan", "only_plan", is_flag=True, help="Only show which settings there are and what they read.")
def sweep(console: Console, recipe: str, overrides: Sequence[str], fresh: bool, only_plan: bool) -> int:
    """Merge all settings of a RECIPE from one reading, or continue an interrupted sweep.

    The recipe has `settings`, `grid` or `controls`, and `{setting}` in `output.path`. Each setting is a merge of its
    own, with the bytes that it gets alone. The table of all lies above the outputs: `ties-ray results` prints it.

    \b
    Examples:
      ties-ray sweep sweep.yaml --plan
      ties-ray sweep sweep.yaml --workers 4
      ties-ray sweep sweep.yaml --json | jq .rows
    """
    loaded = load_sweep(recipe, overrides)
    from ties_ray.cli import sweeps
    from ties_ray.operations import merging, sweeping

    # Ray and plugins print to standard output from any thread; only the record may stand there.
    with console.progress() as watch, contextlib.redirect_stdout(sys.stderr):
        watch(merging.READING_HEADERS)
        planned = sweeping.plan(loaded)
        if only_plan:
            record = planned.record()
        else:
            result = sweeping.carry_out(planned, started=console.started, fresh=fresh, watch=watch)
    if only_plan:
        console.show(record, *sweeps.of_plan(record))
    else:
        console.show(result, *sweeps.of_results(result))
    return 0
