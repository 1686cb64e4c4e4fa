"""`ties-ray merge`."""

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ties_ray.cli import completion
from ties_ray.cli.command import RECIPE, SET, command, load, often
from ties_ray.cli.console import Console, complain, print_json
from ties_ray.errors import MergeError, Problem

if TYPE_CHECKING:
    from ties_ray.planning.plan import Plan
    from ties_ray.reports.records import MergeResult, Progress, Watch


@command
@RECIPE
@SET
@often
@click.option(
    "--result",
    "result_uri",
    metavar="PATH|URI",
    shell_complete=completion.files,
    help="Write the result record here, also on failure.",
)
@click.option("--fresh", is_flag=True, help="Forget what the output folder holds of earlier merges.")
@click.option(
    "--profile",
    metavar="FILE",
    shell_complete=completion.files,
    help="Write a trace of every worker's activity here, for ui.perfetto.dev.",
)
def merge(
    console: Console, recipe: str, overrides: Sequence[str], result_uri: str | None, fresh: bool, profile: str | None
) -> int:
    """Merge the models of a RECIPE, or continue an interrupted merge.

    The same command continues an interrupted merge. If the merge is finished, it says so and does nothing.

    \b
    Examples:
      ties-ray merge recipe.yaml
      ties-ray merge recipe.yaml -o merged --workers 4
      ties-ray merge recipe.yaml --executor ray --log-format json
      ties-ray merge s3://recipes/nightly.yaml --json --quiet --result s3://recipes/nightly.result.json
    """
    job = _Job(console, result_uri)
    console.on_failure = job.failed
    loaded = load(recipe, overrides)
    job.storage = loaded.storage
    from ties_ray.cli import text
    from ties_ray.operations import merging

    # Ray and plugins print to standard output from any thread; only the record may stand there.
    with console.progress(json_lines=loaded.run.log == "json") as watch, contextlib.redirect_stdout(sys.stderr):
        watch(merging.READING_HEADERS)
        job.plan = merging.plan(loaded)
        watch, trace = job.watching(watch), Path(profile) if profile else None
        result = merging.carry_out(job.plan, started=console.started, fresh=fresh, watch=watch, profile=trace)
    console.on_failure = console.print_error  # the merge is done; only the delivery of its record can fail
    job.write(result)
    console.show(result, *text.of_result(result, recipe))
    return 0


class _Job:
    """One merge as the command line sees it, so that a failure leaves a result record too."""

    def __init__(self, console: Console, result_uri: str | None) -> None:
        self.storage: Mapping[str, Mapping[str, object]] = {}
        self.plan: Plan | None = None
        self._console = console
        self._uri = result_uri
        self._bytes_read = 0

    def watching(self, watch: "Watch") -> "Watch":
        """Return a watch that also remembers how far the merge is."""

        def remember(progress: "Progress") -> None:
            self._bytes_read = progress.bytes_read
            watch(progress)

        return remember

    def write(self, result: "MergeResult") -> None:
        """Write the record where `--result` says."""
        if self._uri:
            from ties_ray.stores import Stores, absolute

            uri = absolute(self._uri)
            Stores(self.storage).writer(uri).put(uri, (result.model_dump_json(indent=2) + "\n").encode())

    def failed(self, error: MergeError) -> None:
        """Print and write the failure as a result record."""
        from ties_ray.reports.records import Failure, MergeResult

        result = MergeResult(
            status="failed",
            run_id=self.plan.run_id if self.plan else "",
            output=self.plan.output if self.plan else "",
            bytes_read=self._bytes_read,
            seconds=round(time.monotonic() - self._console.started, 3),
            error=Failure.of(error),
        )
        if self._console.json:
            print_json(result.model_dump_json(indent=2))
        try:
            self.write(result)
        except Exception as second:
            complain(Problem("--result", str(second)))
