"""`ties-ray compare`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from ties_ray.cli import completion
from ties_ray.cli.command import SET, command, report, stores_of
from ties_ray.cli.console import Console

if TYPE_CHECKING:
    from ties_ray.operations.compare import Order

ORDERS = ("stored", "name", "difference", "relative", "cosine", "changed")


@command
@click.argument("a", shell_complete=completion.files)
@click.argument("b", shell_complete=completion.files)
@click.option("--base", metavar="URI", shell_complete=completion.files, help="Compare what A and B add to this model.")
@click.option("--sort", type=click.Choice(ORDERS), default="relative", show_default=True, help="Order of the tensors.")
@click.option("--all", "every", is_flag=True, help="List every tensor. Default: the first 20.")
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    metavar="ERROR",
    help="Exit with 3 if the relative error of any tensor is above this, or tensors are missing; 0 asks for equality.",
)
@SET
def compare(
    console: Console,
    a: str,
    b: str,
    overrides: Sequence[str],
    base: str | None,
    sort: "Order",
    every: bool,
    tolerance: float | None,
) -> int:
    """Show how model B differs from model A.

    A and B are folders in any store: checkpoints, adapters, deltas or merges. Both are streamed. Checksums that a merge
    or a store has recorded show at once that files are the same. The relative error is the norm of B - A over that of
    A. Exits with 0 whatever the difference is, unless --tolerance is given.

    \b
    Examples:
      ties-ray compare merged-0.2 merged-0.3
      ties-ray compare s3://merged/monday s3://merged/tuesday --tolerance 0
      ties-ray compare ./adapter-a ./adapter-b --sort cosine
      ties-ray compare ./math ./code --base ./llama-3.1-8b
    """
    stores = stores_of(overrides)
    from ties_ray.cli.comparing import of_comparison
    from ties_ray.operations.compare import compare, problems_of
    from ties_ray.stores import absolute

    with console.progress() as watch:
        record = compare(stores, absolute(a), absolute(b), base=base and absolute(base), watch=watch)
    console.show(record, *of_comparison(record, sort, every=every))
    return report([]) if tolerance is None else report(problems_of(record, tolerance))
