"""Options and arguments that commands share, and how they find a recipe or an output."""

import functools
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ties_ray.cli import completion
from ties_ray.cli.console import Console, complain
from ties_ray.errors import InputError, Problem, RecipeError, shown

if TYPE_CHECKING:
    from ties_ray.recipe.recipe import Recipe
    from ties_ray.recipe.search import SearchRecipe
    from ties_ray.recipe.settings import Sweep
    from ties_ray.reports.records import ReportedProblem
    from ties_ray.stores import Stores

Function = TypeVar("Function", bound=Callable[..., Any])
_KEPT = "ties_ray.overrides"
"""Key of the overrides that options have given, in the meta data of click's context."""
RECIPE = click.argument("recipe", shell_complete=completion.files)
OUTPUT = click.argument("output", shell_complete=completion.files)
POINTER = click.argument("pointer", shell_complete=completion.files)
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="FIELD=VALUE",
    shell_complete=completion.fields,
    help="Override a field of the recipe, as in method.density=0.3.",
)


def _set(name: str) -> "Callable[[click.Context, click.Parameter, str | None], None]":
    """Return a callback that keeps an option's value as an override of a field of the recipe."""

    def keep(context: click.Context, parameter: click.Parameter, value: object) -> None:
        if value is not None:
            context.meta.setdefault(_KEPT, []).append(f"{name}={json.dumps(value)}")

    return keep


def often(function: Function) -> Function:
    """Add options for the fields of a recipe that are overridden most; `command` adds them to the overrides."""
    for add in reversed(_OFTEN):
        function = add(function)
    return function


def of_run(function: Function) -> Function:
    """Add options for the fields of `run` that are overridden most."""
    for add in reversed(_OFTEN[1:]):
        function = add(function)
    return function


_OFTEN = (
    click.option(
        "-o",
        "--output",
        metavar="FOLDER",
        callback=_set("output.path"),
        expose_value=False,
        shell_complete=completion.files,
        help="The folder to write: output.path.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(1),
        metavar="N",
        callback=_set("run.workers"),
        expose_value=False,
        help="The number of workers: run.workers.",
    ),
    click.option(
        "--executor",
        metavar="NAME",
        callback=_set("run.executor"),
        expose_value=False,
        shell_complete=completion.executors,
        help="local, ray or auto: run.executor.",
    ),
)


def command(function: Callable[..., int]) -> click.Command:
    """Return the click command of a function `(console, ...) -> exit code`, with the options that all have."""

    @functools.wraps(function)
    @click.pass_context
    def run(
        context: click.Context, /, *, as_json: bool, quiet: bool, debug: bool, log_format: str, **options: Any
    ) -> None:
        console = Console(json=as_json, quiet=quiet, debug=debug, json_log=log_format == "json")
        context.obj = console
        if _KEPT in context.meta:
            options["overrides"] = (*options["overrides"], *context.meta[_KEPT])
        context.exit(console.run(lambda: function(console, **options)))

    made = click.command(function.__name__.rstrip("_"))(run)
    made.params += [
        click.Option(["--json", "as_json"], is_flag=True, help="Print a record for machines on standard output."),
        click.Option(["--quiet"], is_flag=True, help="Print errors only, no progress and no summary."),
        click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."),
        click.Option(
            ["--log-format"],
            type=click.Choice(["text", "json"]),
            default="text",
            help="How progress and errors look on standard error: lines of text, or a JSON object a line.",
        ),
    ]
    return made


def load(source: str, overrides: Sequence[str]) -> "Recipe":
    """Return the recipe of a path, a URI or standard input."""
    from ties_ray.operations import recipes
    from ties_ray.recipe.problems import located_input

    text, name = text_of(source, overrides), name_of(source)
    recipe = recipes.parsed(text, name, overrides)
    console = click.get_current_context().obj
    console.place = lambda problem: located_input(problem, text, name, overrides)
    return recipe


def load_sweep(source: str, overrides: Sequence[str]) -> "Sweep":
    """Return the sweep of a path, a URI or standard input."""
    from ties_ray.operations import recipes

    return recipes.parsed_sweep(text_of(source, overrides), name_of(source), overrides)


def load_search(source: str, overrides: Sequence[str]) -> "SearchRecipe":
    """Return the search of a path, a URI or standard input."""
    from ties_ray.operations import recipes

    return recipes.parsed_search(text_of(source, overrides), name_of(source), overrides)


def name_of(source: str) -> str:
    """Return what messages call a recipe's file."""
    return "standard input" if source == "-" else shown(source)


def text_of(source: str, overrides: Sequence[str]) -> str:
    """Return the text of a recipe's file, or of standard input."""
    from ties_ray.operations import recipes

    return sys.stdin.read() if source == "-" else recipes.text_of(source, overrides)


def stores_of(overrides: Sequence[str]) -> "Stores":
    """Return the stores with the options that `--set storage....` gives."""
    from ties_ray.recipe.parse import override
    from ties_ray.stores import Stores, options_of

    data: dict[str, Any] = {}
    override(data, overrides)
    if data.keys() - {"storage"} or not isinstance(data.get("storage", {}), dict):
        raise RecipeError(Problem("--set", "without a recipe, only `storage` has a meaning here"))
    storage = data.get("storage", {})
    for scheme, options in storage.items():
        options_of(scheme, options)
    return Stores(storage)


def place(output: str, overrides: Sequence[str]) -> "tuple[Stores, str]":
    """Return the stores for an output folder, and its URI. A pool stands for its current result."""
    from ties_ray.operations.pool_members import current_result

    stores, folder = _folder(output, overrides)
    return stores, current_result(stores, folder)


def _folder(output: str, overrides: Sequence[str]) -> "tuple[Stores, str]":
    from ties_ray.stores import Stores, absolute

    if not output.endswith((".yaml", ".yml", ".json")):
        return stores_of(overrides), absolute(output).rstrip("/")
    recipe = load(output, overrides)
    if "{run_id}" in recipe.output.path:
        problem = "the recipe's output holds {run_id}"
        raise InputError(Problem(output, problem, "give the folder itself; `ties-ray plan` names it"))
    return Stores(recipe.storage), absolute(recipe.output.path).rstrip("/")


def report(problems: "Sequence[ReportedProblem]") -> int:
    """Log problems as errors; return the exit code."""
    for reported in problems:
        complain(reported.problem())
    return InputError.exit_code if problems else 0
