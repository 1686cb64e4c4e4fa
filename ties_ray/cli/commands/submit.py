"""`ties-ray submit`."""

import hashlib
import json
import sys
from collections.abc import Sequence

import click

from ties_ray.cli import completion
from ties_ray.cli.command import RECIPE, SET, command, load, often
from ties_ray.cli.console import Console, print_json
from ties_ray.errors import InputError, InterruptedMerge, MergeError, Problem, RecipeError, UnavailableError

ERRORS = {error.exit_code: error for error in (RecipeError, InputError, InterruptedMerge, UnavailableError)}
"""The error of each exit code of a job that did not run."""


@command
@RECIPE
@SET
@often
@click.option(
    "--address",
    envvar="RAY_API_SERVER_ADDRESS",
    required=True,
    metavar="URL",
    help="The cluster's dashboard, http://head:8265. RAY_AUTH_TOKEN has its token.",
)
@click.option("--id", "name", default="", help="Name of the job. Default: `merge-` and a digest of the recipe.")
@click.option(
    "--result",
    "result_uri",
    metavar="URI",
    shell_complete=completion.files,
    help="Let the cluster write the result record here, also on failure.",
)
def submit(
    console: Console, recipe: str, overrides: Sequence[str], address: str, name: str, result_uri: str | None
) -> int:
    """Merge a RECIPE on a Ray cluster, as a job of it.

    The recipe is checked here and travels with the job. The command shows the job's log as it grows, and exits with the
    code of the merge. A job of that name that still runs is joined. SIGINT and SIGTERM stop the job.

    \b
    Examples:
      ties-ray submit recipe.yaml --address http://head:8265
      ties-ray submit recipe.yaml --address http://head:8265 --set run.workers=16 --result s3://recipes/last.json
    """
    try:
        from ties_ray_pipelines import jobs
    except ImportError:
        message = "the client of Ray's jobs is not installed"
        raise InputError(Problem("ties-ray submit", message, "pip install ties-ray-pipelines")) from None
    from ties_ray.cli import text
    from ties_ray.recipe.parse import with_absolute_paths
    from ties_ray.reports.records import MergeResult

    asked = with_absolute_paths(load(recipe, overrides).model_dump(mode="json", exclude_unset=True))
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    try:
        outcome = jobs.run(
            jobs.Jobs(address),
            jobs.merge_command(asked, result=result_uri),
            name or f"merge-{digest}",
            show=lambda part: None if console.quiet else sys.stderr.write(jobs.visible(part)),
        )
    except jobs.JobsError as error:
        raise ERRORS.get(error.exit_code, MergeError)(Problem("--address", str(error))) from error
    record = MergeResult.model_validate(outcome.record) if outcome.record else None
    if console.json and record:
        print_json(record.model_dump_json(indent=2))
    elif record and record.status == "done":
        console.show(record, *text.of_result(record, recipe))
    return outcome.exit_code
