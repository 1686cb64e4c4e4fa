"""`ties-ray inspect`."""

from collections.abc import Sequence

import click

from ties_ray.cli import completion
from ties_ray.cli.command import SET, command, report, stores_of
from ties_ray.cli.console import Console


@command
@click.argument("uri", shell_complete=completion.files)
@click.option("--norms", is_flag=True, help="Read adapters whole: show norms, values that are not finite, duplicates.")
@SET
def inspect(console: Console, uri: str, overrides: Sequence[str], norms: bool) -> int:
    """Show what an input folder holds, before any recipe.

    Shows tensors, config, tokenizer, licence, and every reason to refuse the folder. URI may be a glob (quote it).
    Exits with 3 if a folder could not be merged.

    \b
    Examples:
      ties-ray inspect s3://models/llama-3.1-8b
      ties-ray inspect './checkpoints/*'
      ties-ray inspect 's3://adapters/*/' --norms
    """
    stores = stores_of(overrides)
    from ties_ray.cli import text
    from ties_ray.operations.inspection import Inspections, inspect, pool

    folders = inspect(stores, uri, norms=norms)
    record = Inspections(folders=folders, pool=pool(folders))
    console.show(record, *text.of_inspections(record))
    return report([problem for folder in folders for problem in folder.problems])
