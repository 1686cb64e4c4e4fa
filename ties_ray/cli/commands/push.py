"""`ties-ray push`."""

from collections.abc import Sequence

import click

from ties_ray.cli.command import OUTPUT, SET, command, place
from ties_ray.cli.console import Console


@command
@OUTPUT
@click.argument("repository")
@SET
@click.option("--private", is_flag=True, help="Make a new repository private.")
def push(console: Console, output: str, repository: str, overrides: Sequence[str], private: bool) -> int:
    """Publish the finished merge in OUTPUT on the Hugging Face hub.

    REPOSITORY is hf://org/name, or hf://org/name@branch. Weights, config, tokenizer and card go there in one commit.
    Files of another model go, if a loader would take them for this one's. The recipe and the result record stay where
    they are. The token comes from HF_TOKEN or from `hf auth login`.

    \b
    Examples:
      ties-ray push ./merged hf://my-team/merged --private
      ties-ray push s3://merged/team hf://my-team/merged@nightly
    """
    stores, folder = place(output, overrides)
    from ties_ray.cli import text
    from ties_ray.operations.push import push

    with console.progress() as watch:
        record = push(stores, folder, repository, private=private, watch=watch)
    console.show(record, *text.of_push(record))
    return 0
