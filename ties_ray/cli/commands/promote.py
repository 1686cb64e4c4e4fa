"""`ties-ray promote`."""

import functools
import shlex
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from ties_ray.cli.command import OUTPUT, POINTER, SET, command, place
from ties_ray.cli.console import Console
from ties_ray.errors import Problem, RecipeError

if TYPE_CHECKING:
    from ties_ray.reports.records import Watch


@command
@OUTPUT
@POINTER
@SET
@click.option(
    "--evaluate",
    "texts",
    multiple=True,
    metavar="COMMAND|FILE|EVALUATION",
    help="Promote only if this command exits with 0, or the scores are within their bounds; see above.",
)
@click.option("--no-worse", is_flag=True, help="Promote only if no score is worse than that of the current merge.")
@click.option("--verify", "verified", is_flag=True, help="Promote only what `ties-ray verify` finds whole; reads all.")
def promote(
    console: Console,
    output: str,
    pointer: str,
    overrides: Sequence[str],
    texts: Sequence[str],
    no_worse: bool,
    verified: bool,
) -> int:
    """Let POINTER name the finished merge in OUTPUT.

    POINTER is a small JSON object, which also keeps the merge before for `rollback`.

    COMMAND gets TIES_RAY_OUTPUT (the folder) and TIES_RAY_RESULT (a file with the result record). EVALUATION is one as
    in `ties-ray evaluate`, and a FILE of them ends in .yaml or .json. Their bounds are `at_least` and `at_most`. If
    anything does not approve, or if the folder changes meanwhile, the pointer stays and the exit code is 3. An output
    that the pointer names already is not evaluated again.

    \b
    Examples:
      ties-ray promote s3://merged/2026-11-22 s3://merged/current.json --evaluate "python evaluate.py"
      ties-ray promote ./merged current.json --evaluate '{name: accuracy, data: test.jsonl, at_least: 0.8}' --no-worse
    """
    stores, folder = place(output, overrides)
    of_scores = [text for text in texts if _is_of_scores(text)]
    commands = [shlex.split(text) for text in texts if text not in of_scores]
    if len(commands) > 1:
        raise RecipeError(Problem("--evaluate", "names two commands", "give one that runs both"))
    if no_worse and not of_scores:
        raise RecipeError(Problem("--no-worse", "compares scores, and nothing is scored", "add --evaluate loss:DATA"))
    from ties_ray.cli import text
    from ties_ray.operations.promote import promote
    from ties_ray.operations.verify import verify
    from ties_ray.stores import absolute

    with console.progress() as watch:
        check = functools.partial(verify, stores, folder, watch) if verified else None
        scored = _scored(folder, of_scores, overrides, no_worse, watch) if of_scores else None
        record = promote(stores, folder, absolute(pointer), commands[0] if commands else [], check, scored)
    console.show(record, *text.of_promotion(record))
    return 0


def _is_of_scores(text: str) -> bool:
    """Return whether a text is an evaluation or a file of them, and no command."""
    if text.lstrip().startswith("{") or (" " not in text and text.endswith((".yaml", ".yml", ".json"))):
        return True
    from ties_ray.evaluations import short_form

    return short_form(text) is not text


def _scored(
    folder: str, texts: Sequence[str], overrides: Sequence[str], no_worse: bool, watch: "Watch"
) -> "Callable[[str], None]":
    """Return what scores an output before it is promoted."""
    from ties_ray.cli import scores
    from ties_ray.operations import evaluating

    asked = scores.of_options(texts, overrides)

    def scored(current: str) -> None:
        evaluating.approve(asked, folder, current if no_worse else "", watch)

    return scored
