"""`ties-ray schema`."""

import click

from ties_ray.cli.command import command
from ties_ray.cli.console import Console


@command
def schema(console: Console) -> int:
    """Print the JSON schema of a recipe.

    Editors and programs that write recipes can use it.

    \b
    Example, for the YAML language server of an editor:
      ties-ray schema > recipe.schema.json
      and as the recipe's first line   # yaml-language-server: $schema=recipe.schema.json
    """
    import json

    from ties_ray.recipe.json_schema import recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=2))
    return 0
