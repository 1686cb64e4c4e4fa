"""Sweeps: many merges of the same models from one reading, each with an output, a manifest and a record of its own."""

import json
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from ties_ray import plugins
from ties_ray.driver import result, resume, together
from ties_ray.driver.crew import Crew
from ties_ray.driver.meters import Meters
from ties_ray.driver.publish import demand_space
from ties_ray.driver.run import MergeRun
from ties_ray.errors import InterruptedMerge, Problem, RecipeError
from ties_ray.executors import Executor
from ties_ray.inputs.catalog import THREADS, Inputs, read_inputs, with_numbers
from ties_ray.inputs.choice import chosen
from ties_ray.inputs.expand import BASE, Entry, expand, overlapping
from ties_ray.inputs.fetch import EarlierInputs
from ties_ray.layout.sizes import SIZES, Sizes
from ties_ray.operations import merging
from ties_ray.planning.placement import placed
from ties_ray.planning.plan import Plan
from ties_ray.planning.together import aligned, room_for, share
from ties_ray.recipe.recipe import Recipe
from ties_ray.recipe.settings import PLACE, Setting, Sweep
from ties_ray.reports import sweep as table
from ties_ray.reports.records import MergeResult, Watch
from ties_ray.reports.sweep import PlannedSetting, SweepRecord, SweepResult, row_of
from ties_ray.state import lease
from ties_ray.state.manifest import Manifest
from ties_ray.stores import Stores, absolute


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will do."""

    output: str
    """The path of the outputs, with `{setting}` in it."""
    settings: tuple[Setting, ...]
    plans: tuple[Plan, ...]
    """One for each setting."""
    missing: int
    """Bytes of a shard's slices for which workers have no room, so that each setting reads them again."""

    memory: int
    """The most bytes of memory that a worker takes beyond its imports."""

    def record(self) -> SweepRecord:
        """Return the plan as a report."""
        return SweepRecord(
            output=self.output,
            settings=[
                PlannedSetting(
                    setting=setting.name,
                    values=setting.set,
                    output=plan.output,
                    run_id=plan.run_id,
                    num_models=len(plan.merges[0].members),
                )
                for setting, plan in zip(self.settings, self.plans, strict=True)
            ],
            bytes_read=max(plan.bytes_read for plan in self.plans),
            bytes_written=sum(plan.bytes_written for plan in self.plans),
            memory=self.memory,
            missing=self.missing,
        )


def plan(sweep: Sweep, sizes: Sizes = SIZES) -> SweepPlan:
    """Return the plans of all settings. It reads headers only, once for settings that read them alike.

    Raises `RecipeError` and `InputError` with all problems.
    """
    settings, recipes = _recipes(sweep)
    inputs, earlier = dict[Hashable, Inputs](), EarlierInputs()
    asked, problems = [], list[Problem]()
    for recipe in recipes:
        key, stores = reading_of(recipe), Stores(recipe.storage)
        if key not in inputs:
            inputs[key] = read_inputs(recipe, stores, earlier=earlier)
        problems += overlapping(recipe.output.path, inputs[key].entries)
        asked.append((recipe, with_numbers(recipe, inputs[key], stores)))
    if problems:
        raise RecipeError(problems)
    shared = share(asked, sizes)
    stores = Stores(recipes[0].storage)
    plans = tuple(merging.checked(made, stores) for made in shared.plans)
    memory = max(made.memory for made in plans) + shared.room.size
    return SweepPlan(absolute(sweep.output), tuple(settings), plans, shared.missing, memory)


def sweep(
    asked: Sweep, *, fresh: bool = False, watch: Watch = lambda progress: None, sizes: Sizes = SIZES
) -> SweepResult:
    """Merge all settings from one reading, or continue an interrupted sweep; return the table of their results.

    A setting whose output holds this very merge already is done. fresh: remove what earlier runs have left in the
    outputs. Raises a `MergeError`. Finished work is kept, and the next call continues from there.
    """
    started = time.monotonic()
    watch(merging.READING_HEADERS)
    return carry_out(plan(asked, sizes), started=started, fresh=fresh, watch=watch)


def carry_out(planned: SweepPlan, *, started: float, fresh: bool, watch: Watch) -> SweepResult:
    """Carry out the plans of a sweep."""
    stores = Stores(planned.plans[0].recipe.storage)
    results: dict[int, MergeResult] = {}
    meters = Meters(watch, None)
    with ExitStack() as leases:
        left = []
        for number, each in enumerate(planned.plans):
            done = None if fresh else resume.finished(each, stores)
            if done is None:
                taken_over: list[str] = []
                held = leases.enter_context(lease.acquire(stores, each.output, taken_over.append))
                done = None if fresh else resume.finished(each, stores)
            if done is not None:
                results[number] = done
                continue
            opened, manifest, resumed = resume.open_run(each, stores, fresh=fresh)
            demand_space(opened, stores)
            left.append(_Opened(number, opened, manifest, resumed, held.check))
        results |= _run(left, meters, stores, started)
    rows = [row_of(setting.name, setting.set, results[number]) for number, setting in enumerate(planned.settings)]
    made = SweepResult(
        output=planned.output,
        rows=rows,
        bytes_read=meters.traffic.bytes_read,
        workers_lost=meters.places.losses,
        seconds=round(time.monotonic() - started, 3),
    )
    folder = planned.output.partition(PLACE)[0].rpartition("/")[0]
    return table.write(stores, folder, table.with_kept_scores(stores, folder, made))


@dataclass(frozen=True)
class _Opened:
    """A merge of the sweep that is to be done."""

    number: int
    plan: Plan
    manifest: Manifest
    resumed: bool
    check: Callable[[], None]
    """Raises if another run holds the output."""


def _run(left: Sequence[_Opened], meters: Meters, stores: Stores, started: float) -> dict[int, MergeResult]:
    """Do all rounds of all merges, and publish them. Try again where the store has forgotten an upload."""
    if not left:
        return {}
    left = sorted(left, key=lambda each: (_op_of(each.plan.recipe), each.number))  # alike merges follow each other
    plans = aligned([each.plan for each in left])
    room, _ = room_for(plans)
    note = f"merged together with {len(left) - 1} other settings of a sweep: traffic and seconds are those of all"
    runs = [
        MergeRun(
            replace(own, notes=(*own.notes, note)), stores, each.manifest, _silent(), each.check, resumed=each.resumed
        )
        for own, each in zip(plans, left, strict=True)
    ]
    place = placed(max(plans, key=lambda own: own.bytes_read))
    meters.bytes_planned = max(own.bytes_read for own in plans)
    executor = plugins.load("executors", place.executor, Executor)
    for tries_left in reversed(range(merging.TRIES)):
        crew = Crew(executor(), meters, plans[0].recipe.run.patience)
        try:
            try:
                setups = [replace(run.setup(profiled=False), held=room) for run in runs]
                crew.start(max(plans, key=lambda own: own.memory), setups, place.workers, beside=room.size)
                together.execute(runs, crew)
            finally:
                crew.stop()
            return {
                each.number: result.publish(run, meters, stores, each.manifest, each.check, started=started)
                for run, each in zip(runs, left, strict=True)
            }
        except InterruptedMerge:
            if not tries_left or all(run.uploads.are_known(run.plan) for run in runs):
                raise
    raise AssertionError("the last try returns or raises")


def _silent() -> Meters:
    """Return meters that report nothing: the sweep has its own."""
    return Meters(lambda progress: None, None)


def _recipes(sweep: Sweep) -> tuple[list[Setting], list[Recipe]]:
    """Return the settings and their recipes. Raises `RecipeError` with the problems of all."""
    problems: list[Problem] = []
    entries: tuple[Entry, ...] = ()
    if sweep.needs_models:
        first = sweep.recipe(Setting(name="models"))
        with ThreadPoolExecutor(THREADS) as threads:
            entries = expand(first, Stores(first.storage), threads).entries
    made: list[tuple[Setting, Recipe]] = []
    for setting in sweep.all([entry.id for entry in entries if entry.id != BASE]):
        try:
            recipe, choice = sweep.recipe(setting), sweep.choice(setting)
            if choice is not None:
                recipe = chosen(recipe, entries, choice, f"settings.{setting.name}: models")
            output = recipe.output.model_copy(update={"path": absolute(recipe.output.path)})
            made.append((setting, recipe.model_copy(update={"output": output})))
        except RecipeError as error:
            problems += error.problems
    problems += _not_shared(made)
    if problems:
        raise RecipeError(problems)
    return [setting for setting, _ in made], [recipe for _, recipe in made]


def _not_shared(made: Sequence[tuple[Setting, Recipe]]) -> list[Problem]:
    """Return what settings may not differ in: one crew of workers does them all."""
    problems, outputs = [], dict[str, str]()
    for setting, recipe in made:
        if recipe.continues or recipe.output.state:
            problems.append(Problem(f"settings.{setting.name}", "keeps a state", "merge it in a recipe of its own"))
        other = outputs.setdefault(recipe.output.path, setting.name)
        if other != setting.name:
            message = f"writes to {recipe.output.path}, as {other} does"
            problems.append(Problem(f"settings.{setting.name}", message, "give it another output.path"))
    return problems


def reading_of(recipe: Recipe) -> Hashable:
    """Return what of a recipe decides its inputs: all but the numbers of models that it names one by one."""
    exclude: Any = {"run": True, "method": True, "coefficients": True, "output": {"path", "part_size"}}
    rules = recipe.model_dump(mode="json", exclude=exclude)
    for line in rules["models"]:
        for number in ("weight", "density") if line["id"] else ():
            del line[number]
    of_method = [each.name for each in recipe.method.companions], recipe.first_is_base
    return json.dumps([rules, of_method], sort_keys=True)


def _op_of(recipe: Recipe) -> str:
    """Return a key that is equal for merges which fold alike: those that differ in lambda alone."""
    rules: Mapping[str, Any] = recipe.model_dump(mode="json", include={"method", "models"})
    method = {key: value for key, value in rules["method"].items() if key != "lambda"}
    return json.dumps([method, rules["models"]], sort_keys=True)
