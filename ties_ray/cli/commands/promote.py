"""`ties-ray promote`."""

import functools
import shlex
from collections.abc import Sequence

import click

from ties_ray.cli.command import OUTPUT, POINTER, SET, command, place
from ties_ray.cli.console import Console


@command
@OUTPUT
@POINTER
@SET
@click.option("--evaluate", metavar="COMMAND", default="", help="Promote only if this command exits with 0; see above.")
@click.option("--verify", "verified", is_flag=True, help="Promote only what `ties-ray verify` finds whole; reads all.")
def promote(
    console: Console, output: str, pointer: str, overrides: Sequence[str], evaluate: str, verified: bool
) -> int:
    """Let POINTER name the finished merge in OUTPUT.

    POINTER is a small JSON object, which also keeps the merge before for `rollback`.

    COMMAND gets TIES_RAY_OUTPUT (the folder) and TIES_RAY_RESULT (a file with the result record). If it does not
    approve, or if the folder changes meanwhile, the pointer stays and the exit code is 3. An output that the pointer
    names already is not evaluated again.

    \b
    Examples:
      ties-ray promote s3://merged/2026-11-22 s3://merged/current.json --evaluate "python evaluate.py"
    """
    stores, folder = place(output, overrides)
    from ties_ray.cli import text
    from ties_ray.operations.promote import promote
    from ties_ray.operations.verify import verify
    from ties_ray.stores import absolute

    with console.progress() as watch:
        check = functools.partial(verify, stores, folder, watch) if verified else None
        record = promote(stores, folder, absolute(pointer), shlex.split(evaluate), check)
    console.show(record, *text.of_promotion(record))
    return 0
