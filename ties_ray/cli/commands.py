"""The command line. Nothing heavy is imported until a command needs it: `--help` takes neither torch nor ray."""

import contextlib
import functools
import os
import select
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ties_ray.errors import Cancelled, InputError, MergeError, Problem, RecipeError, UnavailableError, printable

if TYPE_CHECKING:
    from pydantic import BaseModel

    from ties_ray.planning.plan import Plan
    from ties_ray.recipe.recipe import Recipe
    from ties_ray.reports.records import MergeResult, Progress, Watch
    from ties_ray.stores import Stores

PATIENCE = 2.5
"""Seconds after a signal in which the run may end by itself; then the process leaves at once."""
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
_ERRORS_SHOWN = 50


_signals: list[int] = []
"""Those that ended this process: Ray's C++ turns whatever a handler raises into a plain KeyboardInterrupt."""


def main() -> NoReturn:
    """Run the command line and leave the process with its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _on_signal)
    told, heard = os.pipe()
    os.set_blocking(heard, False)
    signal.set_wakeup_fd(heard)
    threading.Thread(target=_leave_late, args=(told,), name="signals", daemon=True).start()
    code = 0
    try:
        commands(prog_name="ties-ray")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:  # before or after a command's own handling
        code = 128 + _signals[0]
    if threading.active_count() > 2:  # a thread that waits for storage would keep the interpreter from ending
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _on_signal(number: int, _: FrameType | None) -> None:
    """Raise in the main thread, once."""
    _signals.append(number)
    if len(_signals) == 1:
        raise KeyboardInterrupt


def _leave_late(told: int) -> None:
    """Leave for good `PATIENCE` after a signal, or at a second one; also where the main thread is inside a library.

    A handler in Python waits until a call into C comes back. The signal's number comes by this pipe at once.
    """
    while (number := os.read(told, 1)[0]) not in (signal.SIGINT, signal.SIGTERM):
        pass
    select.select([told], [], [], PATIENCE)
    os._exit(128 + number)


# -- what all commands share


class _Desk:
    """How a command talks: to people or to machines, and what becomes of an error."""

    def __init__(self, *, json: bool, quiet: bool, debug: bool) -> None:
        self.json, self.quiet, self.debug = json, quiet, debug
        self.started = time.monotonic()
        self.on_failure: Callable[[MergeError], None] = self._error_as_json

    def _error_as_json(self, error: MergeError) -> None:
        if self.json:
            import json

            from ties_ray.reports.records import Failure

            _print_json(json.dumps({"error": Failure.of(error).model_dump(mode="json")}, indent=2))

    def run(self, command: Callable[[], int]) -> int:
        """Return the command's exit code; every failure is told, one line a problem."""
        try:
            return command()
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise
        except (Exception, KeyboardInterrupt) as caught:
            error = _as_merge_error(caught)
            if self.debug:
                traceback.print_exception(caught)
            for problem in error.problems[:_ERRORS_SHOWN]:
                _complain(problem)
            if len(error.problems) > _ERRORS_SHOWN:
                _complain(Problem("", f"and {len(error.problems) - _ERRORS_SHOWN:,} more problems"))
            self.on_failure(error)
            return error.exit_code

    def tell(self, record: "BaseModel", *things: Any) -> None:
        """Print the record for machines, or the texts and tables for people."""
        if self.json:
            _print_json(record.model_dump_json(indent=2))
        elif not self.quiet:
            from ties_ray.cli import text

            text.show(*things)

    @contextlib.contextmanager
    def progress(self, *, as_json: bool = False) -> "Iterator[Watch]":
        """Yield what is to be called with each `Progress`; as_json: write lines for machines."""
        if self.quiet and not as_json:
            yield lambda progress: None
            return
        from ties_ray.cli import text

        if as_json:
            yield text.json_lines(sys.stderr)
            return
        with text.Bar(sys.stderr) if sys.stderr.isatty() else text.Lines(sys.stderr) as watch:
            yield watch


def _complain(problem: Problem) -> None:
    """Print a problem as one line that no file name or header can break or colour."""
    line = "".join(char if char.isprintable() else " " for char in str(problem))
    click.echo(f"error: {line}", err=True)


def _print_json(text: str) -> None:
    """Print JSON; in its strings what a terminal might act on is escaped, as JSON escapes."""
    import json

    if not text.isascii():
        text = "".join(char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text)
    click.echo(text)


def _as_merge_error(caught: BaseException) -> MergeError:
    if isinstance(caught, MergeError):
        if caught.kind != "defect":
            return caught
        error = MergeError(map(_defect, caught.problems))
        error.shard = caught.shard
        return error
    if isinstance(caught, KeyboardInterrupt):
        number = _signals[0] if _signals else signal.SIGINT
        what = f"cancelled by {signal.Signals(number).name}"
        cancelled = Cancelled(Problem("", what, "what is done is kept, and the same command continues"))
        cancelled.exit_code = 128 + number
        return cancelled
    return MergeError(_defect(Problem("", f"{type(caught).__name__}: {caught}")))


def _defect(problem: Problem) -> Problem:
    return problem._replace(remedy="a defect of ties_ray: run again with --debug, and please report it")


def _command(function: Callable[..., int], group: "click.Group | None" = None) -> click.Command:
    """Return the click command of a function `(desk, ...) -> exit code`, with the options that all have.

    group: the one it belongs to; by default that of all commands.
    """

    @functools.wraps(function)
    @click.pass_context
    def run(context: click.Context, /, *, as_json: bool, quiet: bool, debug: bool, **given: Any) -> None:
        desk = _Desk(json=as_json, quiet=quiet, debug=debug)
        context.exit(desk.run(lambda: function(desk, **given)))

    options = (
        click.option("--json", "as_json", is_flag=True, help="Print what machines read on standard output."),
        click.option("--quiet", is_flag=True, help="No progress and no summary; errors only."),
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
    )
    decorated: Any = run
    for option in options:
        decorated = option(decorated)
    return (group or commands).command(function.__name__.strip("_"))(decorated)


_RECIPE = click.argument("recipe")
_SET = click.option(
    "--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override a field, as in method.density=0.3."
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
Shell completion:
  eval "$(_TIES_RAY_COMPLETE=bash_source ties-ray)"      (or zsh_source, fish_source)

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
@click.option("--full", is_flag=True, help="With --json: the whole stored plan, every tensor and its place.")
@click.option("--no-rates", is_flag=True, help="Read headers only: do not measure, and predict no time.")
def _plan(desk: _Desk, recipe: str, overrides: Sequence[str], full: bool, no_rates: bool) -> int:
    """Say what a merge would read, write and need, and how long it takes.

    Reads headers, and for about a second some of the weights, to see how fast that goes from here.

    \b
    Examples:
      ties-ray plan recipe.yaml
      ties-ray plan recipe.yaml --json --no-rates | jq .bytes_read
    """
    asked = _load(recipe, overrides)
    from ties_ray.operations import merging
    from ties_ray.reports.records import plan_record

    made = merging.plan(asked)
    if full and desk.json:
        _print_json(made.to_json().decode())
        return 0
    from ties_ray.cli import text

    found, problem = None, ""
    if not no_rates:
        try:
            found = merging.forecast(made)
        except (InputError, UnavailableError) as error:
            problem = str(error)
    record = plan_record(made, found)
    desk.tell(record, *text.of_plan(record), *([f"note: no time is predicted: {problem}"] if problem else []))
    return 0


@_command
@_RECIPE
@_SET
@click.option("--result", "result_uri", metavar="PATH|URI", help="Write the result record here, also on failure.")
@click.option("--fresh", is_flag=True, help="Forget what the output folder holds of earlier merges.")
@click.option("--profile", metavar="FILE", help="Write here what every worker did when, for ui.perfetto.dev.")
def _merge(
    desk: _Desk, recipe: str, overrides: Sequence[str], result_uri: str | None, fresh: bool, profile: str | None
) -> int:
    """Merge. Interrupted, the same command continues; finished, it says so and does nothing.

    \b
    Examples:
      ties-ray merge recipe.yaml
      ties-ray merge recipe.yaml --set run.executor=local
      ties-ray merge s3://recipes/nightly.yaml --json --quiet --result s3://recipes/nightly.result.json
    """
    job = _Job(desk, result_uri)
    desk.on_failure = job.failed
    asked = _load(recipe, overrides)
    job.storage = asked.storage
    # Ray and plugins print what they like, from any thread; standard output is for the record alone.
    from ties_ray.cli import text
    from ties_ray.operations import merging

    with desk.progress(as_json=asked.run.log == "json") as watch, contextlib.redirect_stdout(sys.stderr):
        if not desk.quiet and asked.run.log == "none":
            click.echo("plan: reading headers", err=True)
        job.plan = merging.plan(asked)
        watch, trace = job.watching(watch), Path(profile) if profile else None
        result = merging.carry_out(job.plan, started=desk.started, fresh=fresh, watch=watch, profile=trace)
    desk.on_failure = desk._error_as_json  # from here on, what fails is the record's own delivery
    job.write(result)
    desk.tell(result, *text.of_result(result, recipe))
    return 0


@_command
@click.argument("output")
@_SET
def _status(desk: _Desk, output: str, overrides: Sequence[str]) -> int:
    """Say what an OUTPUT folder holds: a finished merge, or unfinished ones and how far they are.

    OUTPUT is the folder, or the recipe file that names it.

    \b
    Examples:
      ties-ray status s3://merged/math-code
      ties-ray status s3://merged/math-code --set storage.s3.endpoint_url=https://minio:9000
      ties-ray status recipe.yaml
    """
    stores, folder = _place(output, overrides)
    from ties_ray.cli import text
    from ties_ray.operations.status import status

    found = status(stores, folder)
    desk.tell(found, *text.of_status(found))
    return 0


@_command
@click.argument("output")
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
    help="Count the thresholds of this share of the models anew, at least of one, and compare them.",
)
@click.option("--seed", type=int, default=0, help="Takes another sample.")
@click.option("--sha256", "sums", is_flag=True, help="If all is well, write SHA256SUMS for `sha256sum -c`.")
def _verify(
    desk: _Desk, output: str, overrides: Sequence[str], sample: float, recount: float, seed: int, sums: bool
) -> int:
    """Re-read a finished OUTPUT: headers, index, checksums of parts and files, values that are not finite.

    OUTPUT is the folder, or the recipe file that names it. Exits with 3 if anything is not as it was written, or not
    what the inputs give. A sample reads the inputs that the folder's plan names, with the storage options of the recipe
    or of --set, never with those of the plan.

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
        if not desk.quiet:
            more = f" and {len(inputs) - 5} more" if len(inputs) > 5 else ""
            named = printable(", ".join(inputs[:5]))
            click.echo(f"sample: reads the inputs that the folder's plan names: {named}{more}", err=True)

    with desk.progress() as watch:
        found = verify(stores, folder, watch, sample=sample, recount=recount, seed=seed, sums=sums, announce=announce)
    desk.tell(found, *text.of_verification(found))
    return _report(found.findings)


@_command
@click.argument("output")
@_SET
@click.option("--dry-run", is_flag=True, help="Only say what there is.")
def _clean(desk: _Desk, output: str, overrides: Sequence[str], dry_run: bool) -> int:
    """Remove what interrupted merges left in OUTPUT: unfinished uploads, and records to continue by.

    OUTPUT is the folder, or the recipe file that names it. Visible files stay, and so does what `verify` needs of a
    finished merge. Exits with 5 while a merge is at work there.

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
    found = clean(stores, folder, remove=False)
    if found:  # else there is nothing of ours, and nothing should come to be
        with lease.acquire(stores, folder, notes.append):
            found = clean(stores, folder, remove=not dry_run)
    told = Cleaning(output=folder, removed=not dry_run, found=found, notes=notes)
    desk.tell(told, *text.of_cleaning(told))
    return 0


@_command
@click.argument("output")
@click.argument("pointer")
@_SET
@click.option("--evaluate", metavar="COMMAND", default="", help="Promote only if it ends with 0; see below.")
@click.option("--verify", "verified", is_flag=True, help="Promote only what `ties-ray verify` finds whole; reads all.")
def _promote(desk: _Desk, output: str, pointer: str, overrides: Sequence[str], evaluate: str, verified: bool) -> int:
    """Let POINTER, a small JSON object, name the finished merge in OUTPUT; the one before is kept for `rollback`.

    COMMAND gets TIES_RAY_OUTPUT (the folder) and TIES_RAY_RESULT (a file with the result record). Exits with 3, and
    leaves the pointer, if it does not approve, or if the folder was changed meanwhile. What the pointer names already
    is not evaluated again.

    \b
    Examples:
      ties-ray promote s3://merged/2026-11-22 s3://merged/current.json --evaluate "python evaluate.py"
    """
    stores, folder = _place(output, overrides)
    from ties_ray.cli import text
    from ties_ray.operations.promote import promote
    from ties_ray.operations.verify import verify
    from ties_ray.stores import absolute

    with desk.progress() as watch:
        check = functools.partial(verify, stores, folder, watch) if verified else None
        told = promote(stores, folder, absolute(pointer), shlex.split(evaluate), check)
    desk.tell(told, *text.of_promotion(told))
    return 0


@_command
@click.argument("pointer")
@_SET
def _rollback(desk: _Desk, pointer: str, overrides: Sequence[str]) -> int:
    """Let POINTER name the merge before the current one again.

    \b
    Examples:
      ties-ray rollback s3://merged/current.json
    """
    stores = _stores(overrides)
    from ties_ray.cli import text
    from ties_ray.operations.promote import rollback
    from ties_ray.stores import absolute

    told = rollback(stores, absolute(pointer))
    desk.tell(told, *text.of_promotion(told))
    return 0


@_command
@click.argument("uri")
@click.option("--norms", is_flag=True, help="Read adapters whole: norms, values that are not finite, duplicates.")
@_SET
def _inspect(desk: _Desk, uri: str, overrides: Sequence[str], norms: bool) -> int:
    """Say what an input folder holds, before any recipe: tensors, config, tokenizer, licence, and what is wrong.

    URI may be a glob (quote it). Exits with 3 if a folder could not be merged.

    \b
    Examples:
      ties-ray inspect s3://models/llama-3.1-8b
      ties-ray inspect './checkpoints/*'
      ties-ray inspect 's3://adapters/*/' --norms
    """
    stores = _stores(overrides)
    from ties_ray.cli import text
    from ties_ray.operations.inspection import Inspections, inspect, pool

    found = inspect(stores, uri, norms=norms)
    whole = Inspections(folders=found, pool=pool(found))
    desk.tell(whole, *text.of_inspections(whole))
    return _report([problem for one in found for problem in one.problems])


@_command
@click.argument("name", required=False)
def _methods(desk: _Desk, name: str | None) -> int:
    """List the merge methods, or say all about one: its parameters, defaults and paper.

    \b
    Examples:
      ties-ray methods
      ties-ray methods ties
    """
    from ties_ray import plugins
    from ties_ray.cli import text
    from ties_ray.methods import Method
    from ties_ray.recipe.json_schema import MethodDocs, method_doc

    names = [name] if name else plugins.names("methods")
    docs = [method_doc(one, plugins.load("methods", one, Method)) for one in names]
    desk.tell(MethodDocs(methods=docs), *(text.of_method(docs[0]) if name else text.of_methods(docs)))
    return 0


@commands.group()
def deploy() -> None:
    """Print what runs a merge elsewhere."""


@functools.partial(_command, group=deploy)
@_RECIPE
@_SET
@click.option("--image", required=True, help="With ties_ray, Ray and torch in it; deploy/Dockerfile makes one.")
@click.option("--ray-version", default="", help="Of the image; this environment's by default.")
@click.option("--name", default="", help="Of all that is made; `merge-` and the start of the run_id by default.")
@click.option("--namespace", default="default", show_default=True)
@click.option("--workers", type=int, help="The recipe's, else as many as read the inputs in a quarter of an hour.")
@click.option("--workers-per-pod", type=int, default=4, show_default=True, help="At most; each takes one CPU.")
@click.option("--service-account", default="ties-ray", show_default=True, help="Whose role may read and write.")
@click.option("--role-arn", default="", help="Print that account too, bound to this IAM role (IRSA).")
@click.option("--kueue-queue", "queue", default="", help="Wait in this local queue of Kueue.")
@click.option("--cron", "schedule", default="", metavar='"M H D M W"', help="A RayCronJob that merges at these times.")
@click.option("--time-zone", default="", help="Of --cron; the operator's by default.")
@click.option("--cluster", is_flag=True, help="A RayCluster that grows and shrinks, to submit merges to.")
@click.option("--spot/--no-spot", default=True, help="Workers on spot nodes where there are any (the default).")
@click.option("--result", default="", metavar="URI", help="Where the result record is written, also on failure.")
@click.option("--deadline", type=int, help="Seconds; four times what the plan expects by default, at least an hour.")
@click.option("--env", multiple=True, metavar="NAME=VALUE", help="Of all pods; no secrets.")
@click.option("--env-from", "secrets", multiple=True, metavar="SECRET", help="A Kubernetes secret, as environment.")
def _kuberay(desk: _Desk, recipe: str, overrides: Sequence[str], env: Sequence[str], **given: Any) -> int:
    """Print a RayJob for KubeRay, sized for this merge: it is planned here, from headers only.

    \b
    Examples:
      ties-ray deploy kuberay recipe.yaml --image registry.example/ties-ray:0.1.0 | kubectl apply -f -
      ties-ray deploy kuberay recipe.yaml --image IMAGE --cron "15 2 * * *" --result s3://recipes/nightly.result.json
    """
    wrong = [one for one in env if "=" not in one]
    if wrong:
        raise RecipeError(Problem("--env", f"{wrong[0]!r} is not of the form NAME=VALUE"))
    asked = _load(recipe, overrides)
    import importlib.metadata
    import json

    from ties_ray.operations import merging
    from ties_ray.operations.kubernetes import Options, kuberay, to_yaml
    from ties_ray.reports.records import plan_record

    given["ray_version"] = given["ray_version"] or importlib.metadata.version("ray")
    options = Options(env=dict(one.split("=", 1) for one in env), **given)
    made = kuberay(plan_record(merging.plan(asked)), asked, options)
    click.echo(json.dumps(made, indent=2) if desk.json else to_yaml(made), nl=desk.json)
    return 0


@_command
def _schema(desk: _Desk) -> int:
    """Print the JSON schema of a recipe, for editors and for programs that write recipes.

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
    """One merge as the command line sees it, so that a failure too leaves a result record."""

    def __init__(self, desk: _Desk, result_uri: str | None) -> None:
        self.storage: Mapping[str, Mapping[str, object]] = {}
        self.plan: Plan | None = None
        self._desk = desk
        self._uri = result_uri
        self._bytes_read = 0

    def watching(self, watch: "Watch") -> "Watch":
        """Return a watch that also remembers how far the merge came."""

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
        """Tell the failure as a result record."""
        from ties_ray.reports.records import Failure, MergeResult

        result = MergeResult(
            status="failed",
            run_id=self.plan.run_id if self.plan else "",
            output=self.plan.output if self.plan else "",
            bytes_read=self._bytes_read,
            seconds=round(time.monotonic() - self._desk.started, 3),
            error=Failure.of(error),
        )
        if self._desk.json:
            _print_json(result.model_dump_json(indent=2))
        try:
            self.write(result)
        except Exception as second:
            _complain(Problem("--result", str(second)))


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
    """Return the folder that is meant, and the stores to read it with."""
    from ties_ray.stores import Stores, absolute

    if not output.endswith((".yaml", ".yml", ".json")):
        return _stores(overrides), absolute(output).rstrip("/")
    recipe = _load(output, overrides)
    if "{run_id}" in recipe.output.path:
        what = "the recipe's output holds {run_id}"
        raise InputError(Problem(output, what, "give the folder itself; `ties-ray plan` names it"))
    return Stores(recipe.storage), absolute(recipe.output.path).rstrip("/")


def _report(findings: Sequence[Any]) -> int:
    """Print findings as errors; return the exit code."""
    for one in findings:
        _complain(Problem(one.where, one.what, one.remedy, getattr(one, "code", "")))
    return InputError.exit_code if findings else 0
