"""`ties-ray plan`."""

from collections.abc import Sequence

import click

from ties_ray.cli.command import RECIPE, SET, command, load, often
from ties_ray.cli.console import Console, print_json
from ties_ray.errors import InputError, UnavailableError


@command
@RECIPE
@SET
@often
@click.option("--full", is_flag=True, help="Print the whole stored plan, every tensor and its place; needs --json.")
@click.option("--no-rates", is_flag=True, help="Read headers only: do not measure, and predict no time.")
def plan(console: Console, recipe: str, overrides: Sequence[str], full: bool, no_rates: bool) -> int:
    """Show what a merge reads, writes and needs.

    Reads headers. Then reads some of the weights for about a second, to measure the storage and to predict how long the
    merge takes.

    \b
    Examples:
      ties-ray plan recipe.yaml
      ties-ray plan recipe.yaml --json --no-rates | jq .bytes_read
    """
    loaded = load(recipe, overrides)
    from ties_ray.operations import merging
    from ties_ray.reports.records import plan_record

    plan = merging.plan(loaded)
    if full and console.json:
        print_json(plan.to_json().decode())
        return 0
    from ties_ray.cli import text

    forecast, problem = None, ""
    if not no_rates:
        try:
            forecast = merging.forecast(plan)
            problem = "" if forecast else merging.unpredicted(plan)
        except (InputError, UnavailableError) as error:
            problem = str(error)
    record = plan_record(plan, forecast)
    console.show(record, *text.of_plan(record), *([f"note: no time is predicted: {problem}"] if problem else []))
    return 0
