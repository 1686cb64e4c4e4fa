"""`ties-ray status`."""

from collections.abc import Sequence

from ties_ray.cli.command import OUTPUT, SET, command, place
from ties_ray.cli.console import Console


@command
@OUTPUT
@SET
def status(console: Console, output: str, overrides: Sequence[str]) -> int:
    """Show the merges in an OUTPUT folder.

    That is a finished merge, or unfinished ones and how far they are. OUTPUT is the folder, or the recipe file that
    names it.

    \b
    Examples:
      ties-ray status s3://merged/math-code
      ties-ray status s3://merged/math-code --set storage.s3.endpoint_url=https://minio:9000
      ties-ray status recipe.yaml
    """
    stores, folder = place(output, overrides)
    from ties_ray.cli import text
    from ties_ray.operations.status import status

    record = status(stores, folder)
    console.show(record, *text.of_status(record))
    return 0
