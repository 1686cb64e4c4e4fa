"""`ties-ray evaluate`."""

import contextlib
import sys
from collections.abc import Sequence

import click

from ties_ray.cli import completion
from ties_ray.cli.command import SET, command, of_run, report
from ties_ray.cli.console import Console, complain
from ties_ray.errors import InputError, Problem


@command
@click.argument("models", nargs=-1, required=True, metavar="OUTPUT|SWEEP|FOLDER...", shell_complete=completion.files)
@click.option(
    "--with",
    "texts",
    multiple=True,
    required=True,
    metavar="FILE|EVALUATION",
    shell_complete=completion.files,
    help="A file of evaluations, or one such as loss:dev.jsonl or '{name: loss, data: dev.jsonl}'.",
)
@click.option("--with-base", is_flag=True, help="Score the base of the merges too.")
@click.option("--base", metavar="URI", default="", shell_complete=completion.files,
              help="Score this base too. Adapters are scored on it.")  # fmt: skip
@click.option("--fresh", is_flag=True, help="Compute scores again that are known from an earlier call.")
@SET
@of_run
def evaluate(
    console: Console,
    models: Sequence[str],
    texts: Sequence[str],
    overrides: Sequence[str],
    with_base: bool,
    base: str,
    fresh: bool,
) -> int:
    """Score finished merges, all settings of a sweep, or any models, on data.

    Kinds of evaluations are `loss`, `accuracy`, `function`, `command` and `lm_eval`. The scores of a merge lie beside
    it, in ties-ray.scores.json, and those of a sweep in its table as well. An interrupted call goes on by the same
    command. The exit code is 3 if a model can't be scored, or a score is outside `at_least` and `at_most`.

    \b
    Examples:
      ties-ray evaluate ./merged --with loss:dev.jsonl --with-base
      ties-ray evaluate s3://merged/sweep --with evaluations.yaml --workers 4 --executor ray
      ties-ray evaluate ./sweep ./base --with '{name: accuracy, data: test.parquet, batch_size: 64}'
      ties-ray evaluate ./merged --with function:my_module:score --json
    """
    from ties_ray.cli import scores
    from ties_ray.operations import evaluating

    asked = scores.of_options(texts, overrides)
    # Ray and functions of the user's print to standard output; only the record may stand there.
    with console.progress() as watch, contextlib.redirect_stdout(sys.stderr):
        record = evaluating.evaluate(asked, models, with_base=with_base, base=base, fresh=fresh, watch=watch)
    console.show(record, *scores.of_scores(record))
    code = report([problem for model in record.models for problem in model.problems])
    for sentence in record.rejected:
        complain(Problem("", sentence, "", "not_approved"))
    return InputError.exit_code if record.rejected else code
