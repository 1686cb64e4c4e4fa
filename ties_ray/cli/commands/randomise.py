"""`ties-ray randomise`."""

from collections.abc import Sequence

import click

from ties_ray.cli import completion
from ties_ray.cli.command import SET, command, stores_of
from ties_ray.cli.console import Console


@command
@click.argument("adapters", nargs=-1, required=True, shell_complete=completion.files)
@click.option("--folder", required=True, metavar="FOLDER", help="Where the twins are written, each under its own name.")
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed gives other twins.")
@SET
def randomise(console: Console, adapters: Sequence[str], folder: str, seed: int, overrides: Sequence[str]) -> int:
    """Write a random twin of each of the ADAPTERS, as a control for merges.

    ADAPTERS are folders or globs. A twin has the modules and ranks of its adapter, and the norm of each module. This
    process reads the adapters whole, and writes as many bytes.

    \b
    Examples:
      ties-ray randomise "s3://adapters/*" --folder s3://adapters-random --seed 1
    """
    stores = stores_of(overrides)
    from ties_ray.cli.screen import new_table
    from ties_ray.operations.random_adapters import randomise

    with console.progress() as watch:
        record = randomise(stores, adapters, folder, seed=seed, watch=watch)
    table = new_table("twin", "modules >", "norm >")
    for twin in record.twins:
        table.add_row(twin.output, f"{twin.modules:,}", f"{twin.norm:.5g}")
    console.show(record, table)
    return 0
