"""`ties-ray inspect`."""

from collections.abc import Sequence

import click

from ties_ray.cli import completion
from ties_ray.cli.command import SET, command, report, stores_of
from ties_ray.cli.console import Console


@command
@click.argument("uri", shell_complete=completion.files)
@click.option("--norms", is_flag=True, help="Read adapters whole: show norms, values that are not finite, duplicates.")
@click.option(
    "--compare", "compared", is_flag=True, help="Read all models whole: show how they relate, and what stands out."
)
@click.option(
    "--base", metavar="URI", shell_complete=completion.files, help="Base of whole models, for --compare to subtract."
)
@click.option("--file", metavar="NAME", help="Model of a folder that holds several: its index, file, or first shard.")
@click.option("--variant", metavar="NAME", help="Variant of the model, such as fp16.")
@SET
def inspect(
    console: Console,
    uri: str,
    overrides: Sequence[str],
    norms: bool,
    compared: bool,
    base: str | None,
    file: str | None,
    variant: str | None,
) -> int:
    """Show what an input folder holds, before any recipe.

    Shows tensors, config, tokenizer, licence, and every reason to refuse the folder. URI may be a glob (quote it).
    Exits with 3 if a folder could not be merged. With --compare, it names outliers, duplicates, dead adapters and
    models in conflict.

    \b
    Examples:
      ties-ray inspect s3://models/llama-3.1-8b
      ties-ray inspect ./models/both --file consolidated.safetensors
      ties-ray inspect './checkpoints/*'
      ties-ray inspect 's3://adapters/*/' --norms
      ties-ray inspect 's3://adapters/*/' --compare
      ties-ray inspect './checkpoints/*' --compare --base ./base
    """
    stores = stores_of(overrides)
    from ties_ray.cli import text
    from ties_ray.cli.comparing import of_pool_comparison
    from ties_ray.operations.inspection import Inspections, inspect, pool
    from ties_ray.operations.pool_comparison import compare_models
    from ties_ray.stores import absolute

    folders = inspect(stores, uri, norms=norms, file=file, variant=variant)
    comparison = None
    if compared:
        with console.progress() as watch:
            comparison = compare_models(stores, [absolute(uri)], base and absolute(base), watch)
    record = Inspections(folders=folders, pool=pool(folders), comparison=comparison)
    console.show(record, *(of_pool_comparison(comparison) if comparison else text.of_inspections(record)))
    return report([problem for folder in folders for problem in folder.problems])
