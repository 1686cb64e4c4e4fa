"""Plans a merge, and does it: recipe, catalog, plan, rounds on an executor, publication."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from ties_ray import plugins, runtime
from ties_ray.driver import result, resume
from ties_ray.driver.crew import Crew
from ties_ray.driver.meters import Meters
from ties_ray.driver.publish import as_loaded, demand_space, read_documents
from ties_ray.driver.run import MergeRun
from ties_ray.errors import InputError, InterruptedMerge, Problem
from ties_ray.executors import Executor
from ties_ray.inputs.catalog import read_catalog
from ties_ray.layout.sizes import SIZES, Sizes
from ties_ray.libraries.loaders import remarks, unloadable
from ties_ray.operations.continuing import continued, find_earlier
from ties_ray.planning.forecast import Forecast, predict, predictable
from ties_ray.planning.placement import placed
from ties_ray.planning.plan import Plan
from ties_ray.planning.planner import make_plan
from ties_ray.recipe.recipe import Recipe
from ties_ray.reports.records import MergeResult, Progress, Watch
from ties_ray.rounds import kind_of
from ties_ray.state import lease
from ties_ray.state.lease import Lease
from ties_ray.state.manifest import Manifest
from ties_ray.stores import CAN_ONLY_BE_READ, WRITE_ELSEWHERE, Stores, WritableStore, absolute
from ties_ray.worker.timing import Trace

READING_HEADERS = Progress("plan", 0, 0, 0, 0, activity="reading headers")
"""What is reported before the plan is made."""
TRIES = 3
"""The most tries of a merge whose store forgets uploads."""


def plan(recipe: Recipe, sizes: Sizes = SIZES) -> Plan:
    """Return the plan of a merge. It reads headers only. Raises `RecipeError` and `InputError` with all problems."""
    stores = Stores(recipe.storage)
    output = recipe.output.model_copy(update={"path": absolute(recipe.output.path)})
    earlier = find_earlier(recipe, stores)
    catalog = read_catalog(recipe, stores, first=earlier[1].listed if earlier else 0)
    if earlier:
        catalog = continued(recipe, catalog, *earlier)
    return checked(make_plan(recipe.model_copy(update={"output": output}), catalog, sizes), stores)


def checked(made: Plan, stores: Stores) -> Plan:
    """Return a plan with remarks on its output. Raises `InputError` where nothing can be written, or would not load."""
    if not isinstance(stores.of(made.output), WritableStore):
        raise InputError(Problem("output.path", f"{made.output} {CAN_ONLY_BE_READ}", WRITE_ELSEWHERE))
    folder = as_loaded(made, read_documents(made, stores, texts=True))
    problems = unloadable(folder)
    if problems:
        raise InputError(problems)
    return replace(made, notes=(*made.notes, *(remarks(folder) if made.recipe.output.reads_base else ())))


def forecast(made: Plan) -> Forecast | None:
    """Return how long a merge would take one worker and more; it reads and merges for about a second.

    None where that is unknown: only a worker with a GPU knows how fast it is. Raises what reading the inputs raises.
    """
    if made.recipe.run.device != "cpu" or not predictable(made):
        return None
    from ties_ray.worker import rates  # imports torch and the compiled kernels

    measured = rates.measure(made, Stores(made.recipe.storage))
    asked = placed(made).workers
    numbers = (1, 8, 64) if asked is None else sorted({1, asked})
    predictions = [prediction for number in numbers if (prediction := predict(made, measured, number))]
    return Forecast(rates=measured, predictions=predictions)


def unpredicted(made: Plan) -> str:
    """Return why `forecast` predicts nothing; empty where it may."""
    if made.recipe.run.device != "cpu":
        return "how fast a worker's GPU is shows when the merge runs"
    slow = [round_.name for round_ in made.merges[0].rounds if kind_of(round_).relative_cost(round_) is None]
    return f"how long a whole matrix takes ({', '.join(slow)}) shows when the first are done" if slow else ""


def merge(
    recipe: Recipe,
    *,
    fresh: bool = False,
    watch: Watch = lambda progress: None,
    profile: Path | None = None,
    sizes: Sizes = SIZES,
) -> MergeResult:
    """Merge, or continue an interrupted merge, or recognise a finished one; return the result record.

    fresh: remove what earlier runs have left in the output. profile: a file for the spans of time of each worker, in
    Chrome's trace event format. Raises a `MergeError`. Finished work is kept, and the next call continues from there.
    """
    started = runtime.monotonic()
    watch(READING_HEADERS)
    return carry_out(plan(recipe, sizes), started=started, fresh=fresh, watch=watch, profile=profile)


def carry_out(planned: Plan, *, started: float, fresh: bool, watch: Watch, profile: Path | None = None) -> MergeResult:
    """Carry out a plan of this process, as `merge` does. started: when the call began, by the monotonic clock."""
    with Trace(profile) if profile else nullcontext() as trace:
        return _carry_out(planned, started, watch, trace, fresh=fresh)


def _carry_out(planned: Plan, started: float, watch: Watch, trace: Trace | None, *, fresh: bool) -> MergeResult:
    stores = Stores(planned.recipe.storage)
    watch(Progress("start", 0, 0, 0, planned.bytes_read, activity="starting"))
    finished = None if fresh else _finished(planned, stores)
    if finished:
        return finished
    taken_over: list[str] = []
    with lease.acquire(stores, planned.output, taken_over.append) as held:
        try:
            finished = None if fresh else _finished(planned, stores)  # the last holder may have finished it
            if finished:
                return finished
            opened, manifest, resumed = resume.open_run(planned, stores, fresh=fresh)
            demand_space(opened, stores)
            opened = replace(opened, notes=(*opened.notes, *taken_over))
            meters = Meters(_telling(held, watch), trace)
            return _run(opened, manifest, stores, started, held.check, meters, resumed=resumed)
        except InputError:
            held.check()  # another run that has taken over may have written what is amiss
            raise
    raise AssertionError("a lease is held or refused")


def _telling(held: Lease, watch: Watch) -> Watch:
    """Return what takes reports of progress, and notes the last one in the lease, where `status` finds it."""

    def take(progress: Progress) -> None:
        if progress.stage:
            here = progress.workers - progress.workers_missing
            held.doing = (
                f"{progress.stage}, {progress.done} of {progress.total} done, {here} of {progress.workers} workers"
            )
        watch(progress)

    return take


def _run(
    opened: Plan,
    manifest: Manifest,
    stores: Stores,
    started: float,
    check: Callable[[], None],
    meters: Meters,
    *,
    resumed: bool,
) -> MergeResult:
    """Do all rounds and publish. Try again where the store has forgotten an upload."""
    run = MergeRun(opened, stores, manifest, meters, check, resumed=resumed)
    place = placed(opened)
    executor = plugins.load("executors", place.executor, Executor)
    if place.executor == "local" and place.chosen:
        meters.announce("the merge runs in this process, as it is small and local (run.executor: ray starts Ray)")
    for left in reversed(range(TRIES)):
        crew = Crew(executor(), meters, opened.recipe.run.patience)
        try:
            try:
                crew.start(opened, [run.setup(profiled=meters.profiled)], place.workers)
                run.execute(crew)
            finally:
                crew.stop()
            return result.publish(run, meters, stores, manifest, check, started=started)
        except InterruptedMerge:
            if not left or run.uploads.are_known(run.plan):
                raise
    raise AssertionError("the last try returns or raises")


def _finished(planned: Plan, stores: Stores) -> MergeResult | None:
    """Return the record of this very merge where the output holds the whole result, None otherwise."""
    finished = resume.finished(planned, stores)
    return finished.model_copy(update={"waiting": list(planned.catalog.waiting)}) if finished else None
