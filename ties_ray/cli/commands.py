"""The command line. Each command imports what it needs when it runs, so that `--help` imports neither torch nor ray."""

import contextlib
import functools
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ties_ray.cli import completion, signals
from ties_ray.cli.console import Console, complain, log, print_json
from ties_ray.errors import InputError, MergeError, Problem, RecipeError, UnavailableError, printable

if TYPE_CHECKING:
    from ties_ray.planning.plan import Plan
    from ties_ray.recipe.recipe import Recipe
    from ties_ray.reports.records import MergeResult, Progress, ReportedProblem, Watch
    from ties_ray.stores import Stores

EXIT_CODES = """\b
Exit codes:
  0        done (also when it was done before)
  1        a defect of ties_ray
  2        the recipe or the command line is wrong
  3        inputs or permissions are missing, incompatible, not finite, or changed
  4        interrupted or failed part-way: run the same command again, it continues
  5        cluster or storage unreachable, throttled or held by another run: retry later
  130, 143 cancelled by SIGINT, SIGTERM
"""


def main() -> NoReturn:
    """Run the command line and leave the process with its exit code."""
    signals.listen()
    code = 0
    try:
        commands(prog_name="ties-ray")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:  # while no command runs
        code = 128 + signals.received[0]
    if threading.active_count() > 2:  # a thread that waits for storage would keep the interpreter from ending
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _command(function: Callable[..., int], group: "click.Group | None" = None) -> click.Command:
    """Return the click command of a function `(console, ...) -> exit code`, with the options that all have.

    group: the group of the command; None: the group of all commands.
    """

    @functools.wraps(function)
    @click.pass_context
    def run(context: click.Context, /, *, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
        console = Console(json=as_json, quiet=quiet, debug=debug)
        context.exit(console.run(lambda: function(console, **options)))

    command = (group or commands).command(function.__name__.strip("_"))(run)
    command.params += [
        click.Option(["--json", "as_json"], is_flag=True, help="Print a record for machines on standard output."),
        click.Option(["--quiet"], is_flag=True, help="Print errors only, no progress and no summary."),
        click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."),
    ]
    return command


_RECIPE = click.argument("recipe", shell_complete=completion.files)
_OUTPUT = click.argument("output", shell_complete=completion.files)
_POINTER = click.argument("pointer", shell_complete=completion.files)
_SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="FIELD=VALUE",
    shell_complete=completion.fields,
    help="Override a field of the recipe, as in method.density=0.3.",
)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="""\b
Examples:
  ties-ray plan recipe.yaml
  ties-ray merge recipe.yaml --set method.density=0.3 --set output.path=s3://merged/d03
  ties-ray merge recipe.yaml --json --quiet --result result.json
  ties-ray inspect 's3://models/llama-*'

\b
Shell completion of commands, files, methods and fields of a recipe:
  bash   eval "$(_TIES_RAY_COMPLETE=bash_source ties-ray)"      in ~/.bashrc
  zsh    eval "$(_TIES_RAY_COMPLETE=zsh_source ties-ray)"       in ~/.zshrc
  fish   _TIES_RAY_COMPLETE=fish_source ties-ray | source       in ~/.config/fish/completions/ties-ray.fish

"""
    + EXIT_CODES,
)
@click.version_option(package_name="ties-ray")
def commands() -> None:
    """Merge many models into one, exactly as the papers define it, on a Ray cluster, at the speed of the storage.

    RECIPE is a file in YAML or JSON: a path, a URI (s3://...), or - for standard input.
    """


# -- commands


@_command
@_RECIPE
@_SET
@click.option("--full", is_flag=True, help="Print the whole stored plan, every tensor and its place; needs --json.")
@click.option("--no-rates", is_flag=True, help="Read headers only: do not measure, and predict no time.")
def _plan(console: Console, recipe: str, overrides: Sequence[str], full: bool, no_rates: bool) -> int:
    """Show what a merge reads, writes and needs.

    Reads headers. Then reads some of the weights for about a second, to measure the storage and to predict how long the
    merge takes.

    \b
    Examples:
      ties-ray plan recipe.yaml
      ties-ray plan recipe.yaml --json --no-rates | jq .bytes_read
    """
    loaded = _load(recipe, overrides)
    from ties_ray.operations import merging
    from ties_ray.reports.records import plan_record

    plan = merging.plan(loaded)
    if full and console.json:
        print_json(plan.to_json().decode())
        return 0
    from ties_ray.cli import text

    forecast, problem = None, ""
    if not no_rates:
        try:
            forecast = merging.forecast(plan)
        except (InputError, UnavailableError) as error:
            problem = str(error)
    record = plan_record(plan, forecast)
    console.show(record, *text.of_plan(record), *([f"note: no time is predicted: {problem}"] if problem else []))
    return 0


@_command
@_RECIPE
@_SET
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
def _merge(
    console: Console, recipe: str, overrides: Sequence[str], result_uri: str | None, fresh: bool, profile: str | None
) -> int:
    """Merge the models of a RECIPE, or continue an interrupted merge.

    The same command continues an interrupted merge. If the merge is finished, it says so and does nothing.

    \b
    Examples:
      ties-ray merge recipe.yaml
      ties-ray merge recipe.yaml --set run.executor=local
      ties-ray merge s3://recipes/nightly.yaml --json --quiet --result s3://recipes/nightly.result.json
    """
    job = _Job(console, result_uri)
    console.on_failure = job.failed
    loaded = _load(recipe, overrides)
    job.storage = loaded.storage
    from ties_ray.cli import text
    from ties_ray.operations import merging

    # Ray and plugins print to standard output from any thread; only the record may stand there.
    with console.progress(json_lines=loaded.run.log == "json") as watch, contextlib.redirect_stdout(sys.stderr):
        log.info("plan: reading headers")
        job.plan = merging.plan(loaded)
        watch, trace = job.watching(watch), Path(profile) if profile else None
        result = merging.carry_out(job.plan, started=console.started, fresh=fresh, watch=watch, profile=trace)
    console.on_failure = console.print_error  # the merge is done; only the delivery of its record can fail
    job.write(result)
    console.show(result, *text.of_result(result, recipe))
    return 0


@_command
@_OUTPUT
@_SET
def _status(console: Console, output: str, overrides: Sequence[str]) -> int:
    """Show the merges in an OUTPUT folder.

    That is a finished merge, or unfinished ones and how far they are. OUTPUT is the folder, or the recipe file that
    names it.

    \b
    Examples:
      ties-ray status s3://merged/math-code
      ties-ray status s3://merged/math-code --set storage.s3.endpoint_url=https://minio:9000
      ties-ray status recipe.yaml
    """
    stores, folder = _place(output, overrides)
    from ties_ray.cli import text
    from ties_ray.operations.status import status

    record = status(stores, folder)
    console.show(record, *text.of_status(record))
    return 0


@_command
@_OUTPUT
@_SET
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
def _verify(
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
    stores, folder = _place(output, overrides)
    from ties_ray.cli import text
    from ties_ray.operations.verify import verify

    def announce(inputs: Sequence[str]) -> None:
        more = f" and {len(inputs) - 5} more" if len(inputs) > 5 else ""
        log.info("sample: reads the inputs that the folder's plan names: %s%s", printable(", ".join(inputs[:5])), more)

    with console.progress() as watch:
        record = verify(stores, folder, watch, sample=sample, recount=recount, seed=seed, sums=sums, announce=announce)
    console.show(record, *text.of_verification(record))
    return _report(record.problems)


@_command
@_OUTPUT
@_SET
@click.option("--dry-run", is_flag=True, help="List what would be removed.")
def _clean(console: Console, output: str, overrides: Sequence[str], dry_run: bool) -> int:
    """Remove what interrupted merges left in OUTPUT.

    That is unfinished uploads, and the records to continue from. OUTPUT is the folder, or the recipe file that names
    it. Visible files stay, and so does what `verify` needs of a finished merge. Exits with 5 while a merge is at work
    there.

    \b
    Examples:
      ties-ray clean s3://merged/math-code --dry-run
      ties-ray clean s3://merged/math-code
    """
    stores, folder = _place(output, overrides)
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


@_command
@_OUTPUT
@_POINTER
@_SET
@click.option("--evaluate", metavar="COMMAND", default="", help="Promote only if this command exits with 0; see above.")
@click.option("--verify", "verified", is_flag=True, help="Promote only what `ties-ray verify` finds whole; reads all.")
def _promote(
    console: Console, output: str, pointer: str, overrides: Sequence[str], evaluate: str, verified: bool
) -> int:
    """Let POINTER name the finished merge in OUTPUT.

    POINTER is a small JSON object, which also keeps the merge before for `rollback`.

    COMMAND gets TIES_RAY_OUTPUT (the folder) and TIES_RAY_RESULT (a file with the result record). If it does not
    approve, or if the folder changes meanwhile, the pointer stays and the exit code is 3. An output that the pointer
    names already is not evaluated again.

    \b
    Examples:
      ties-ray promote s3://merged/2026-11-22 s3://merged/current.json --evaluate "python evaluate.py"
    """
    stores, folder = _place(output, overrides)
    from ties_ray.cli import text
    from ties_ray.operations.promote import promote
    from ties_ray.operations.verify import verify
    from ties_ray.stores import absolute

    with console.progress() as watch:
        check = functools.partial(verify, stores, folder, watch) if verified else None
        record = promote(stores, folder, absolute(pointer), shlex.split(evaluate), check)
    console.show(record, *text.of_promotion(record))
    return 0


@_command
@_POINTER
@_SET
def _rollback(console: Console, pointer: str, overrides: Sequence[str]) -> int:
    """Let POINTER name the merge before the current one again.

    \b
    Examples:
      ties-ray rollback s3://merged/current.json
    """
    stores = _stores(overrides)
    from ties_ray.cli import text
    from ties_ray.operations.promote import rollback
    from ties_ray.stores import absolute

    record = rollback(stores, absolute(pointer))
    console.show(record, *text.of_promotion(record))
    return 0


@_command
@click.argument("uri", shell_complete=completion.files)
@click.option("--norms", is_flag=True, help="Read adapters whole: show norms, values that are not finite, duplicates.")
@_SET
def _inspect(console: Console, uri: str, overrides: Sequence[str], norms: bool) -> int:
    """Show what an input folder holds, before any recipe.

    Shows tensors, config, tokenizer, licence, and every reason to refuse the folder. URI may be a glob (quote it).
    Exits with 3 if a folder could not be merged.

    \b
    Examples:
      ties-ray inspect s3://models/llama-3.1-8b
      ties-ray inspect './checkpoints/*'
      ties-ray inspect 's3://adapters/*/' --norms
    """
    stores = _stores(overrides)
    from ties_ray.cli import text
    from ties_ray.operations.inspection import Inspections, inspect, pool

    folders = inspect(stores, uri, norms=norms)
    record = Inspections(folders=folders, pool=pool(folders))
    console.show(record, *text.of_inspections(record))
    return _report([problem for folder in folders for problem in folder.problems])


@_command
@click.argument("name", required=False, shell_complete=completion.methods)
def _methods(console: Console, name: str | None) -> int:
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


@commands.group()
def deploy() -> None:
    """Print manifests that run a merge elsewhere."""


@functools.partial(_command, group=deploy)
@_RECIPE
@_SET
@click.option("--image", required=True, help="Image that holds ties_ray, Ray and torch; deploy/Dockerfile makes one.")
@click.option("--ray-version", default="", help="Ray version of the image. Default: the version of this environment.")
@click.option("--name", default="", help="Name of all objects. Default: `merge-` and the start of the run_id.")
@click.option("--namespace", default="default", show_default=True)
@click.option(
    "--workers",
    type=int,
    help="Number of workers. Default: the recipe's, else enough to read the inputs in a quarter of an hour.",
)
@click.option(
    "--workers-per-pod", type=int, default=4, show_default=True, help="Most workers of a pod; each takes one CPU."
)
@click.option(
    "--service-account", default="ties-ray", show_default=True, help="Service account that may read and write."
)
@click.option("--role-arn", default="", help="Print that account too, bound to this IAM role (IRSA).")
@click.option("--kueue-queue", "queue", default="", help="Wait in this local queue of Kueue.")
@click.option("--cron", "schedule", default="", metavar='"M H D M W"', help="A RayCronJob that merges at these times.")
@click.option("--time-zone", default="", help="Time zone of --cron. Default: the operator's.")
@click.option("--cluster", is_flag=True, help="A RayCluster that grows and shrinks, to submit merges to.")
@click.option("--spot/--no-spot", default=True, help="Run workers on spot nodes where there are any (the default).")
@click.option("--result", default="", metavar="URI", help="Write the result record here, also on failure.")
@click.option(
    "--deadline",
    type=int,
    help="Seconds until the job is given up. Default: four times the expected time, an hour at least.",
)
@click.option("--env", multiple=True, metavar="NAME=VALUE", help="An environment variable of all pods; no secrets.")
@click.option("--env-from", "secrets", multiple=True, metavar="SECRET", help="A Kubernetes secret, as environment.")
def _kuberay(console: Console, recipe: str, overrides: Sequence[str], env: Sequence[str], **options: Any) -> int:
    """Print a RayJob for KubeRay, sized for this merge.

    The command plans the merge here, from headers only.

    \b
    Examples:
      ties-ray deploy kuberay recipe.yaml --image registry.example/ties-ray:0.1.0 | kubectl apply -f -
      ties-ray deploy kuberay recipe.yaml --image IMAGE --cron "15 2 * * *" --result s3://recipes/nightly.result.json
    """
    wrong = [setting for setting in env if "=" not in setting]
    if wrong:
        raise RecipeError(Problem("--env", f"{wrong[0]!r} is not of the form NAME=VALUE"))
    loaded = _load(recipe, overrides)
    import importlib.metadata
    import json

    from ties_ray.operations import merging
    from ties_ray.operations.kubernetes import Options, kuberay, to_yaml
    from ties_ray.reports.records import plan_record

    options["ray_version"] = options["ray_version"] or importlib.metadata.version("ray")
    asked = Options(env=dict(setting.split("=", 1) for setting in env), **options)
    manifests = kuberay(plan_record(merging.plan(loaded)), loaded, asked)
    click.echo(json.dumps(manifests, indent=2) if console.json else to_yaml(manifests), nl=console.json)
    return 0


@_command
def _schema(console: Console) -> int:
    """Print the JSON schema of a recipe.

    Editors and programs that write recipes can use it.

    \b
    Example, for the YAML language server of an editor:
      ties-ray schema > recipe.schema.json
      and as the recipe's first line   # yaml-language-server: $schema=recipe.schema.json
    """
    import json

    from ties_ray.recipe.json_schema import recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=2))
    return 0


# -- parts


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


def _load(source: str, overrides: Sequence[str]) -> "Recipe":
    """Return the recipe of a path, a URI or standard input."""
    if source == "-":
        from ties_ray.recipe.parse import parse

        return parse(sys.stdin.read(), "standard input", overrides)
    import ties_ray

    return ties_ray.load_recipe(source, overrides)


def _stores(overrides: Sequence[str]) -> "Stores":
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


def _place(output: str, overrides: Sequence[str]) -> "tuple[Stores, str]":
    """Return the stores for an output folder, and its URI."""
    from ties_ray.stores import Stores, absolute

    if not output.endswith((".yaml", ".yml", ".json")):
        return _stores(overrides), absolute(output).rstrip("/")
    recipe = _load(output, overrides)
    if "{run_id}" in recipe.output.path:
        problem = "the recipe's output holds {run_id}"
        raise InputError(Problem(output, problem, "give the folder itself; `ties-ray plan` names it"))
    return Stores(recipe.storage), absolute(recipe.output.path).rstrip("/")


def _report(problems: "Sequence[ReportedProblem]") -> int:
    """Log problems as errors; return the exit code."""
    for reported in problems:
        complain(reported.problem())
    return InputError.exit_code if problems else 0
