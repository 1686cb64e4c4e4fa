"""`ties-ray clean`."""

from collections.abc import Sequence

import click

from ties_ray.cli.command import OUTPUT, SET, command, place
from ties_ray.cli.console import Console


@command
@OUTPUT
@SET
@click.option("--dry-run", is_flag=True, help="List what would be removed.")
def clean(console: Console, output: str, overrides: Sequence[str], dry_run: bool) -> int:
    """Remove what interrupted merges left in OUTPUT.

    That is unfinished uploads, and the records to continue from. OUTPUT is the folder, or the recipe file that names
    it. Visible files stay, and so does what `verify` needs of a finished merge. Exits with 5 while a merge is at work
    there.

    \b
    Examples:
      ties-ray clean s3://merged/math-code --dry-run
      ties-ray clean s3://merged/math-code
    """
    stores, folder = place(output, overrides)
    from ties_ray.cli import text
    from ties_ray.driver.resume import clean
    from ties_ray.reports.records import Cleaning
    from ties_ray.state import lease

    notes: list[str] = []
    remnants = clean(stores, folder, remove=False)
    if remnants:  # a lease would create the folder of an output that holds nothing of ours
        with lease.acquire(stores, folder, notes.append):
            remnants = clean(stores, folder, remove=not dry_run)
    record = Cleaning(output=folder, removed=not dry_run, found=remnants, notes=notes)
    console.show(record, *text.of_cleaning(record))
    return 0
