"""`ties-ray convert`."""

from collections.abc import Sequence

import click

from ties_ray.cli import completion
from ties_ray.cli.command import SET, command, name_of, often, text_of
from ties_ray.cli.console import Console
from ties_ray.errors import Problem, RecipeError


@command
@click.argument("configuration", shell_complete=completion.files)
@SET
@often
def convert(console: Console, configuration: str, overrides: Sequence[str]) -> int:
    """Print the recipe of a mergekit CONFIGURATION, and what is different.

    CONFIGURATION is mergekit's YAML file: a path, a URI, or - for standard input. `merge` and `plan` take it too.
    A key that mergekit ignores is refused, with its line.

    \b
    Examples:
      ties-ray convert mergekit.yml -o merged > recipe.yaml
      ties-ray merge mergekit.yml -o merged
    """
    text, source = text_of(configuration, overrides), name_of(configuration)
    from ties_ray.operations import conversion
    from ties_ray.recipe.mergekit import is_mergekit

    if not is_mergekit(text):
        message = "is no configuration of mergekit: it has no merge_method"
        raise RecipeError(Problem(source, message, "give mergekit's file; recipes need no conversion"))
    converted = conversion.convert(text, source, overrides)
    if console.json:
        console.show(converted)
    else:
        click.echo(conversion.to_yaml(converted.recipe, converted.notes, source), nl=False)
    return 0
