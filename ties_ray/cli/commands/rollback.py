"""`ties-ray rollback`."""

from collections.abc import Sequence

from ties_ray.cli.command import POINTER, SET, command, stores_of
from ties_ray.cli.console import Console


@command
@POINTER
@SET
def rollback(console: Console, pointer: str, overrides: Sequence[str]) -> int:
    """Let POINTER name the merge before the current one again.

    \b
    Examples:
      ties-ray rollback s3://merged/current.json
    """
    stores = stores_of(overrides)
    from ties_ray.cli import text
    from ties_ray.operations.promote import rollback
    from ties_ray.stores import absolute

    record = rollback(stores, absolute(pointer))
    console.show(record, *text.of_promotion(record))
    return 0
