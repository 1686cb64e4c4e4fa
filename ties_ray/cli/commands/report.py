"""`ties-ray report`."""

from collections.abc import Sequence

import click

from ties_ray.cli import completion
from ties_ray.cli.command import OUTPUT, SET, command, place
from ties_ray.cli.console import Console, log
from ties_ray.errors import printable


@command
@OUTPUT
@SET
@click.option("--compare", "compared", is_flag=True, help="Read all models too: add cosines, clusters and spectra.")
@click.option(
    "--controls",
    "controlled",
    is_flag=True,
    help="Merge some elements again, without each model and with signs drawn by chance.",
)
@click.option(
    "--to",
    "target",
    metavar="PATH|URI",
    default="report.html",
    show_default=True,
    shell_complete=completion.files,
    help="Write the page here.",
)
def report(
    console: Console, output: str, overrides: Sequence[str], compared: bool, controlled: bool, target: str
) -> int:
    """Write a page about a finished merge in OUTPUT.

    The page is one HTML file that needs no network. It shows what stands out, what each model added, where models agree
    by layer and module, and the ledger of what was merged. It reads the result record alone, unless models are compared
    or controls are made. OUTPUT is the folder, or the recipe file that names it. The folder of a sweep gets a page with
    heat maps of its grid. With --json, the same figures are printed, and no page is written. The command needs
    `pip install 'ties-ray[report]'`.

    \b
    Examples:
      ties-ray report ./merged
      ties-ray report s3://merged/team --compare --to s3://merged/team-report.html
      ties-ray report ./merged --controls
      ties-ray report s3://merged/sweep
      ties-ray report ./merged --json | jq .remarks
    """
    stores, folder = place(output, overrides)
    from ties_ray.cli.comparing import of_report
    from ties_ray.cli.sweeps import of_results
    from ties_ray.operations.report import report, sweep_of, write

    if results := sweep_of(stores, folder):
        written = None if console.json else write(stores, results, target)
        console.show(results, *of_results(results), *([f"wrote {written}"] if written else []))
        return 0

    def announce(inputs: Sequence[str]) -> None:
        more = f" and {len(inputs) - 5} more" if len(inputs) > 5 else ""
        log.info("report: reads the inputs that the folder's plan names: %s%s", printable(", ".join(inputs[:5])), more)

    with console.progress() as watch:
        record = report(stores, folder, compare=compared, controls=controlled, watch=watch, announce=announce)
    written = None if console.json else write(stores, record, target)
    console.show(record, *of_report(record, written or ""))
    return 0
