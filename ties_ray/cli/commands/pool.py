"""`ties-ray pool`."""

import contextlib
import sys
from collections.abc import Sequence

import click

from ties_ray.cli import completion
from ties_ray.cli.command import SET, command, of_run
from ties_ray.cli.console import Console, print_json

POOL = click.argument("pool", shell_complete=completion.files)


@click.group()
def pool() -> None:
    """Keep a merge up to date while models come and go.

    POOL is a folder, or the recipe file whose `output.path` it is. Its result has the bytes of one merge of all
    members. `verify`, `report`, `promote` and the like take a pool for its current result.
    """


@command
@POOL
@click.argument("models", nargs=-1, shell_complete=completion.files)
@SET
@of_run
@click.option("--weight", type=float, help="The weight of these models.")
@click.option("--id", "id_", help="The id of the model.")
@click.option("--plan", "only_plan", is_flag=True, help="Only show what would be read.")
def add(
    console: Console,
    pool: str,
    models: Sequence[str],
    overrides: Sequence[str],
    weight: float | None,
    id_: str | None,
    only_plan: bool,
) -> int:
    """Merge MODELS into POOL, or make POOL of them.

    MODELS are folders or globs. Without any, those of the recipe are meant. Members are left alone, so the same glob
    adds what has come since. A new model is read alone where the method allows. Else the command says beforehand which
    models it reads again, and why.

    \b
    Examples:
      ties-ray pool add pool.yaml
      ties-ray pool add s3://pools/support s3://adapters/tuesday/* --plan
      ties-ray pool add s3://pools/support s3://adapters/math --weight 0.5
    """
    from ties_ray.cli import pools

    living = pools.pool_at(pool, overrides)
    lines = pools.lines_of(models, weight, id_)
    if only_plan:
        change = living.plan_add(lines).record()
    else:
        with console.progress() as watch, contextlib.redirect_stdout(sys.stderr):
            change = living.add(lines, watch)
    console.show(change, *pools.of_change(change))
    return 0


@command
@POOL
@click.argument("models", nargs=-1, required=True)
@SET
@of_run
@click.option("--erase", is_flag=True, help="Remove all results, states and findings that hold anything of them.")
@click.option("--plan", "only_plan", is_flag=True, help="Only show what would be read.")
def drop(
    console: Console, pool: str, models: Sequence[str], overrides: Sequence[str], erase: bool, only_plan: bool
) -> int:
    """Take MODELS out of POOL.

    MODELS are ids, folders, or patterns of these. The new result goes on from the last one before the first of them.
    The models after it are read again. Earlier results that hold a dropped model are listed. --erase removes them, also
    in a later call. `ties-ray verify POOL` shows by its pins that the result holds none of them.

    \b
    Examples:
      ties-ray pool drop s3://pools/support s3://adapters/withdrawn --plan
      ties-ray pool drop s3://pools/support 17 --erase
    """
    from ties_ray.cli import pools

    living = pools.pool_at(pool, overrides)
    if only_plan:
        change = living.plan_drop(models).record()
    else:
        with console.progress() as watch, contextlib.redirect_stdout(sys.stderr):
            change = living.drop(models, erase=erase, watch=watch)
    console.show(change, *pools.of_change(change))
    return 0


@command
@POOL
@SET
@click.option("--recipe", is_flag=True, help="Print the recipe of one merge of all members.")
def list_(console: Console, pool: str, overrides: Sequence[str], recipe: bool) -> int:
    """Show the members of POOL, its result, and what a change would read.

    --recipe prints a recipe that merges all members from their own files. Its result has the bytes of the pool's.

    \b
    Examples:
      ties-ray pool list s3://pools/support
      ties-ray pool list s3://pools/support --recipe > whole.json && ties-ray merge whole.json -o ./whole
    """
    from ties_ray.cli import pools

    living = pools.pool_at(pool, overrides)
    if recipe:
        print_json(pools.recipe_text(living.recipe()))
        return 0
    record = living.record()
    console.show(record, *pools.of_pool(record))
    return 0


@command
@POOL
@SET
@click.option("--keep", type=click.IntRange(1), help="The number of the last results that stay. Default: all of them.")
@click.option("--dry-run", is_flag=True, help="List what would be removed.")
def clean(console: Console, pool: str, overrides: Sequence[str], keep: int | None, dry_run: bool) -> int:
    """Remove earlier results of POOL, and what interrupted merges have left there.

    Dropping a model goes on from an earlier result. So each one that stays saves reading.

    \b
    Examples:
      ties-ray pool clean s3://pools/support --keep 3 --dry-run
    """
    from ties_ray.cli import pools

    cleaning = pools.pool_at(pool, overrides).clean(keep, remove=not dry_run)
    console.show(cleaning, *pools.of_cleaning(cleaning))
    return 0


for each in (add, drop, list_, clean):
    pool.add_command(each)
