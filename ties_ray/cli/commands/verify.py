"""`ties-ray verify`."""

from collections.abc import Sequence

import click

from ties_ray.cli.command import OUTPUT, SET, command, place, report
from ties_ray.cli.console import Console, log
from ties_ray.errors import printable


@command
@OUTPUT
@SET
@click.option(
    "--sample",
    type=click.FloatRange(0, 1),
    default=0.0,
    metavar="SHARE",
    help="Merge this share of the elements again, at least one slice of every tensor, and compare every bit.",
)
@click.option(
    "--recount",
    type=click.FloatRange(0, 1),
    default=0.0,
    metavar="SHARE",
    help="Count the thresholds of this share of the models anew, of one at least, and compare them.",
)
@click.option("--seed", type=int, default=0, help="Another seed takes another sample.")
@click.option("--sha256", "sums", is_flag=True, help="If all is well, write SHA256SUMS for `sha256sum -c`.")
def verify(
    console: Console, output: str, overrides: Sequence[str], sample: float, recount: float, seed: int, sums: bool
) -> int:
    """Re-read a finished OUTPUT, and report damage.

    Checks headers, the index, checksums of parts and files, and that all values are finite. OUTPUT is the folder, or
    the recipe file that names it. Exits with 3 if the files are not as they were written, or not what the inputs give.

    A sample reads the inputs that the folder's plan names. It uses the storage options of the recipe or of --set, never
    those of the plan.

    \b
    Examples:
      ties-ray verify s3://merged/math-code
      ties-ray verify s3://merged/math-code --sample 0.01 --set storage.s3.endpoint_url=https://minio:9000
      ties-ray verify ./merged --sha256 && (cd merged && sha256sum -c SHA256SUMS)
    """
    stores, folder = place(output, overrides)
    from ties_ray.cli import text
    from ties_ray.operations.verify import verify

    def announce(inputs: Sequence[str]) -> None:
        more = f" and {len(inputs) - 5} more" if len(inputs) > 5 else ""
        log.info("sample: reads the inputs that the folder's plan names: %s%s", printable(", ".join(inputs[:5])), more)

    with console.progress() as watch:
        record = verify(stores, folder, watch, sample=sample, recount=recount, seed=seed, sums=sums, announce=announce)
    console.show(record, *text.of_verification(record))
    return report(record.problems)
