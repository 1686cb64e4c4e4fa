"""`ties-ray methods`."""

import click

from ties_ray.cli import completion
from ties_ray.cli.command import command
from ties_ray.cli.console import Console


@command
@click.argument("name", required=False, shell_complete=completion.methods)
def methods(console: Console, name: str | None) -> int:
    """List the merge methods, or explain one.

    Explains its parameters, their defaults, and the paper.

    \b
    Examples:
      ties-ray methods
      ties-ray methods ties
    """
    from ties_ray import plugins
    from ties_ray.cli import text
    from ties_ray.cli.method_docs import MethodDocs, method_doc
    from ties_ray.methods import Method

    names = [name] if name else plugins.names("methods")
    docs = [method_doc(each, plugins.load("methods", each, Method)) for each in names]
    console.show(MethodDocs(methods=docs), *(text.of_method(docs[0]) if name else text.of_methods(docs)))
    return 0
