"""Searches: a sampler asks for candidates, workers score them in memory, and the best that is confirmed is merged.

All that a search keeps is its table. Scores are told to the sampler batch by batch, in the order asked. So the number
of workers, a kill and a resumption change no row.
"""

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from ties_ray.driver.crew import PACKAGES
from ties_ray.driver.tasks import Tasks
from ties_ray.errors import InputError, Problem, RecipeError, UnavailableError
from ties_ray.evaluations import AnyEvaluations, DataPin
from ties_ray.executors import Needs
from ties_ray.inputs.catalog import THREADS
from ties_ray.inputs.choice import chosen
from ties_ray.inputs.expand import BASE, Entry, expand
from ties_ray.operations import merging
from ties_ray.operations.candidate_host import ASK, SCORED, SETUP, Ask, HostSetup, Scored, numbers_in
from ties_ray.operations.candidates import MOST
from ties_ray.operations.selecting import selected
from ties_ray.planning.placement import placed
from ties_ray.planning.plan import Plan
from ties_ray.planning.together import whole
from ties_ray.recipe.parse import with_absolute_paths
from ties_ray.recipe.recipe import FoundBy, Json, Recipe
from ties_ray.recipe.search import Search, SearchRecipe
from ties_ray.recipe.settings import Setting, Sweep
from ties_ray.recipe.space import SearchedModel, Space, literal
from ties_ray.reports.records import MergeResult, Progress, Watch, find_result
from ties_ray.reports.search import SearchRecord, SearchResult, ranked
from ties_ray.state.search_table import FRESH, CandidateRow, Head, Key, SearchTable, Stage
from ties_ray.stores import Stores, absolute

WRITE_SECONDS = 1.0
"""Seconds between two writes of the table, at least. So much work a kill may cost, and the scores under way."""
FORM = 1
"""Version of what decides a search."""


@dataclass(frozen=True)
class SearchPlan:
    """What a search will do."""

    asked: SearchRecipe
    recipe: Recipe
    """The recipe as it stands, with an absolute output."""
    entries: tuple[Entry, ...]
    """All inputs of the recipe."""
    merge: Plan
    """The merge of the recipe as it stands."""
    head: Head
    space: Space
    """The space over all models."""

    @property
    def search(self) -> Search:
        """Return the section of the recipe."""
        return self.asked.search

    @property
    def executor(self) -> str:
        """Return where candidates are scored: in this process, in several, or on Ray."""
        named, run = self.recipe.run.executor, self.recipe.run
        if named == "auto" and placed(self.merge).executor == "ray" and (run.address or "RAY_ADDRESS" in os.environ):
            return "ray"
        if named in ("auto", "local"):
            return "local" if (run.workers or 1) == 1 else "processes"
        return named

    def record(self) -> SearchRecord:
        """Return the plan as a report."""
        search, stores = self.search, Stores(self.recipe.storage)
        there = SearchTable(stores, self.merge.output).read()
        done = [row for row in there[1].values() if row.stage == "search"] if there else []
        return SearchRecord(
            output=self.merge.output,
            search=self.head.search,
            table_uri=SearchTable(stores, self.merge.output).uri,
            axes=list(self.space.names),
            shares=self.space.shares,
            sampler=search.sampler.name,
            budget=search.budget,
            done=len(done) if there and there[0] == self.head else 0,
            batch=min(search.budget, search.sampler.batch_of(self.space.axes, search.budget)),
            evaluations=[each.label or each.name for each in search.evaluate],
            confirmations=[each.label or each.name for each in search.confirm or ()],
            best=search.best if search.confirm else 0,
            num_models=len(self.merge.merges[0].members),
            executor=self.executor,
            workers=self.recipe.run.workers,
            memory=whole(self.merge).slices,
            bytes_read=self.merge.merges[0].rounds[-1].bytes_read,
        )


def plan(asked: SearchRecipe) -> SearchPlan:
    """Return what a search will do. It reads the headers of models, and the data of evaluations.

    Raises `RecipeError` and `InputError` with all problems.
    """
    recipe, search = asked.recipe(), asked.search
    if "{run_id}" in recipe.output.path:
        message = "the search keeps its table in the output, and {run_id} is not known yet"
        raise RecipeError(Problem("output.path", message, "name a folder"))
    sampler = search.sampler
    if sampler.library and not find_spec(sampler.library):
        message = f"the sampler {sampler.name} needs {sampler.library}"
        raise RecipeError(Problem("search.sampler", message, f"pip install 'ties-ray[{sampler.extra}]'"))
    recipe = recipe.model_copy(
        update={"output": recipe.output.model_copy(update={"path": absolute(recipe.output.path)})}
    )
    merge, stores = merging.plan(recipe), Stores(recipe.storage)
    with ThreadPoolExecutor(THREADS) as threads:
        entries = tuple(entry for entry in expand(recipe, stores, threads).entries if entry.id != BASE)
    space = Space(search, recipe, asked.common, _searched(entries))
    if problems := sampler.problems(space.axes, search.budget):
        raise RecipeError(problems)
    if search.select and search.select.k > len(entries):
        message = f"keeps {search.select.k} models of {len(entries)}"
        raise RecipeError(Problem("search.select.k", message, "lower `k`"))
    data, others = (_data(each, stores, search.seed) for each in (search.evaluate, search.confirm or ()))
    _demand_other_data(search, data, others)
    head = Head(
        search=_digest(asked, merge, data),
        sampler=sampler.model_dump(mode="json"),
        seed=search.seed,
        axes=list(space.names),
        evaluate=[each.shown() for each in search.evaluate],
        data=data,
    )
    return SearchPlan(asked, recipe, entries, merge, head, space)


def _data(evaluations: AnyEvaluations | tuple[()], stores: Stores, seed: int) -> list[DataPin]:
    return [pin for each in evaluations for pin in each.prepared(stores, seed).pins]


def _demand_other_data(search: Search, data: Sequence[DataPin], others: Sequence[DataPin]) -> None:
    """Raise `InputError` where the data that confirm are those that are searched."""
    searched = {pin.sha256: pin.uri for pin in data}
    remedy = "confirm on data that the search does not see"
    problems = [
        Problem(
            "search.confirm", f"{pin.uri} has the content of {searched[pin.sha256]}, which `evaluate` reads", remedy
        )
        for pin in others
        if pin.sha256 in searched
    ]
    if any(each == other for each in search.confirm or () for other in search.evaluate):
        problems.append(Problem("search.confirm", "holds an evaluation of `evaluate`", remedy))
    if problems:
        raise InputError(problems)


def _digest(asked: SearchRecipe, merge: Plan, data: Sequence[DataPin]) -> str:
    """Return the digest of all that decides the rows of the table, but for the budget and what is confirmed."""
    section = asked.search.model_dump(mode="json", exclude={"budget", "confirm", "best"})
    decisive = [FORM, merge.run_id, section, [pin.sha256 for pin in data]]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def search(asked: SearchRecipe, *, fresh: bool = False, watch: Watch = lambda progress: None) -> SearchResult:
    """Search, or continue an interrupted search, and merge the best; return the table.

    fresh: forget the table, and what the output holds. Raises a `MergeError`. Scores are kept, and the same call goes
    on from them. A larger budget goes on, too.
    """
    started = time.monotonic()
    watch(merging.READING_HEADERS)
    return carry_out(plan(asked), started=started, fresh=fresh, watch=watch)


def carry_out(planned: SearchPlan, *, started: float, fresh: bool, watch: Watch) -> SearchResult:
    """Carry out the plan of a search."""
    with _Searching(planned, watch, fresh=fresh) as under_way:
        models = under_way.select()
        under_way.explore(models)
        best = under_way.confirm()
    origin = _found_by(planned, under_way, best)
    merged = _merge_best(planned, under_way.row("search", best).values, origin, watch, fresh=fresh)
    return SearchResult(
        output=planned.merge.output,
        search=planned.head.search,
        table_uri=under_way.table.uri,
        rows=ranked(under_way.rows, planned.search.budget),
        chosen=best,
        improvement=under_way.improvement(best),
        evaluated=under_way.evaluated,
        workers_lost=under_way.workers_lost,
        evaluation_seconds=round(under_way.seconds, 3),
        seconds=round(time.monotonic() - started, 3),
        merge=merged,
    )


@dataclass
class _Searching:
    """A search under way: its table, and the workers, which start when a score is missing."""

    planned: SearchPlan
    watch: Watch
    fresh: bool = False
    evaluated: int = 0
    workers_lost: int = 0
    seconds: float = 0.0
    """Seconds of workers that candidates took."""
    rows: dict[Key, CandidateRow] = field(default_factory=dict)
    _tasks: Tasks | None = None
    _written: float = 0.0
    _unwritten: bool = False
    _num_rows: int = 0
    """Rows of the search within the budget."""
    _best: CandidateRow | None = None
    _leave: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "_Searching":
        self.table = SearchTable(Stores(self.planned.recipe.storage), self.planned.merge.output)
        there = None if self.fresh else self.table.read()
        if self.fresh:
            self.table.forget()
        if there and there[0] != self.planned.head:
            message = f"is the table of another search, {there[0].search}; this one is {self.planned.head.search}"
            raise InputError(Problem(self.table.uri, message, FRESH))
        self.rows = there[1] if there else {}
        for row in self.rows.values():
            self._note(row)
        return self

    def __exit__(self, *error: object) -> None:
        self._leave.close()
        if self._unwritten and not isinstance(error[1], UnavailableError):
            self._write()

    def row(self, stage: Stage, number: int) -> CandidateRow:
        """Return a row of the table."""
        return self.rows[stage, number]

    def merit(self, stage: Stage, number: int) -> float | None:
        """Return the merit of a candidate; None where it has none."""
        row = self.rows.get((stage, number))
        return row.merit if row else None

    def select(self) -> list[Entry]:
        """Return the models that the search begins with."""
        select, entries = self.planned.search.select, list(self.planned.entries)
        if select is None:
            return entries
        if select.by == "score":
            self._score("select", {n: {"models": {"only": [literal(each.id)]}} for n, each in enumerate(entries)})
            merits = [self.merit("select", number) for number in range(len(entries))]
        else:
            merits = selected(self.planned.recipe, entries, select, self.planned.search.seed, self.watch)
        order = sorted(range(len(entries)), key=lambda n: (merits[n] is None, -(merits[n] or 0.0), n))
        return [entries[number] for number in sorted(order[: select.k])]

    def explore(self, models: Sequence[Entry]) -> None:
        """Score the recipe as it stands, and the candidates that the sampler asks for."""
        planned, search = self.planned, self.planned.search
        names = _searched(models)
        space = planned.space
        if len(models) < len(planned.entries):
            space = Space(search, planned.recipe, planned.asked.common, names)
        kept = {"only": [literal(entry.id) for entry in models]} if len(models) < len(planned.entries) else {}
        draw, asked = search.sampler.begin(space.axes, search.seed), 0
        untuned: dict[int, dict[str, Any]] = {0: {}}
        while asked < search.budget and (points := draw.ask(search.budget - asked)):
            batch = points[: search.budget - asked]
            values = {asked + 1 + n: _with_models(space.values(point), kept) for n, point in enumerate(batch)}
            self._score("search", untuned | values)
            untuned = {}
            if len(batch) == len(points):
                draw.tell(points, [_loss(self.merit("search", number)) for number in values])
            asked += len(batch)
            if self._best is None:
                reason = self.row("search", 0).failed
                raise InputError(Problem("search", f"no candidate has a score: {reason}", "mend that first"))

    def confirm(self) -> int:
        """Return the number of the best candidate, by its confirmed score where there is one."""
        search, scored = self.planned.search, self.scored()
        if not search.confirm:
            return scored[0]
        best = [*(number for number in scored if number)][: search.best]
        if 0 in scored:
            best.append(0)
        self._score("confirm", {number: self.row("search", number).values for number in best})
        confirmed = [number for number in best if self.merit("confirm", number) is not None]
        if not confirmed:
            reason = self.row("confirm", best[0]).failed
            raise InputError(Problem("search.confirm", f"no candidate has a score: {reason}", "mend that first"))
        return max(confirmed, key=lambda number: (self.merit("confirm", number) or 0.0, -best.index(number)))

    def improvement(self, best: int) -> float | None:
        """Return how much better a candidate is than the recipe as it stands."""
        stage: Stage = "confirm" if self.planned.search.confirm else "search"
        after, before = self.merit(stage, best), self.merit(stage, 0)
        return None if after is None or before is None else after - before

    def scored(self) -> list[int]:
        """Return the numbers of the candidates with a score, the best first."""
        within = [number for stage, number in self.rows if stage == "search" and number <= self.planned.search.budget]
        merits = {number: merit for number in within if (merit := self.merit("search", number)) is not None}
        return sorted(merits, key=lambda number: (-merits[number], number))

    def _score(self, stage: Stage, batch: Mapping[int, Mapping[str, Any]]) -> None:
        """Have all candidates of a batch in the table."""
        asks = {}
        for number, values in batch.items():
            row, values = self.rows.get((stage, number)), json.loads(json.dumps(values))
            if row is None:
                asks[number] = values
            elif row.values != values:
                message = f"candidate {number} of `{stage}` is not the one that the sampler asks"
                where = f"{self.table.uri} ({message}; was it made by another version of its library?)"
                raise InputError(Problem(where, "can't be continued", FRESH))
        if not asks:
            return
        messages = {n: ASK.dump_json(Ask(stage=stage, number=n, values=values)).decode() for n, values in asks.items()}
        left = len(asks)
        for answers in self._workers().carry_out(messages):
            for number, answer in answers:
                self._take(stage, number, asks[number], SCORED.validate_json(answer))
            left -= len(answers)
            self._write_if_due()
            self._report(stage, len(batch) - left, len(batch))

    def _take(self, stage: Stage, number: int, values: dict[str, Any], scored: Scored) -> None:
        search = self.planned.search
        merit = None
        if not scored.failed:
            shares = search.shares or (1.0,) * len(scored.merits)
            merit = sum(share * each for share, each in zip(shares, scored.merits, strict=True))
            weights = numbers_in(values.get("models", {}).get("weights", {}))
            if search.l1 and weights and stage == "search":
                merit -= search.l1 * statistics.fmean(map(abs, weights))
        self.rows[stage, number] = CandidateRow(
            stage=stage, number=number, values=values, merit=merit, scores=scored.scores, failed=scored.failed
        )
        self.evaluated += 1
        self.seconds += scored.seconds
        self._unwritten = True
        self._note(self.rows[stage, number])

    def _note(self, row: CandidateRow) -> None:
        """Count a row, and remember the best."""
        if row.stage == "search" and row.number <= self.planned.search.budget:
            self._num_rows += 1
            if row.merit is not None and (self._best is None or row.merit > (self._best.merit or 0.0)):
                self._best = row

    def _write_if_due(self) -> None:
        if self._unwritten and time.monotonic() - self._written >= WRITE_SECONDS:
            self._write()

    def _write(self) -> None:
        self.table.write(self.planned.head, self.rows.values())
        self._written, self._unwritten = time.monotonic(), False

    def _report(self, stage: Stage, done: int, of: int) -> None:
        scores = [f"{label} {value:.6g}" for label, value in (self._best.scores if self._best else {}).items()]
        best = f", best so far: candidate {self._best.number} with {', '.join(scores)}" if self._best else ""
        if stage == "search":
            done, of = self._num_rows, self.planned.search.budget + 1
        activity = {"select": "scoring single models", "search": "searching", "confirm": "confirming"}[stage]
        workers = self._tasks.size if self._tasks else 0
        self.watch(Progress(stage, done, of, 0, 0, activity=activity + best, workers=workers))

    def _workers(self) -> Tasks:
        """Return the workers; start them at the first call."""
        if self._tasks is None:
            planned, run = self.planned, self.planned.recipe.run
            setup = HostSetup(
                recipe=_in_a_worker(planned.asked.common),
                evaluate=planned.search.evaluate,
                confirm=planned.search.confirm,
                seed=planned.search.seed,
                memory=_memory(planned),
            )
            self.watch(Progress("start", 0, 0, 0, 0, activity="starting workers, which read the models"))
            self._tasks = self._leave.enter_context(
                Tasks(
                    planned.executor,
                    "ties_ray.operations.candidate_host:make_host",
                    SETUP.dump_json(setup).decode(),
                    _needs(planned, run.workers, self._announce),
                )
            )
        return self._tasks

    def _announce(self, line: str) -> None:
        self.workers_lost += line.startswith("worker")
        self.watch(Progress("search", 0, 0, 0, 0, activity="searching", event=line))


def _in_a_worker(common: Json) -> Json:
    """Return the recipe as a worker merges it: alone, on its thread, wherever it runs."""
    run = {key: value for key, value in (common.get("run") or {}).items() if key not in ("address", "gpus_per_worker")}
    return {**with_absolute_paths(common), "run": {**run, "executor": "local", "workers": 1}}


def _memory(planned: SearchPlan) -> int | None:
    """Return the most bytes for the models of a worker: workers of one machine share half of its memory."""
    if planned.executor != "processes":
        return None
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(MOST * machine) // (planned.recipe.run.workers or 1)


def _needs(planned: SearchPlan, workers: int | None, announce: Callable[[str], None]) -> Needs:
    from importlib import metadata

    run, room = planned.recipe.run, whole(planned.merge)
    return Needs(
        num_workers=workers or (None if planned.executor == "ray" else 1),
        memory=room.size + run.memory,
        gpus=run.gpus,
        address=run.address,
        deadline=run.deadline,
        versions=tuple((package, metadata.version(package)) for package in PACKAGES),
        labels=(("run", planned.head.search), ("output", planned.merge.output)),
        announce=announce,
    )


def _searched(entries: Iterable[Entry]) -> list[SearchedModel]:
    return [SearchedModel(entry.id, entry.uri, entry.weight, entry.density) for entry in entries]


def _with_models(values: dict[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a candidate sets, with the models that were selected."""
    return {**values, "models": {**kept, **values.get("models", {})}} if kept else values


def _loss(merit: float | None) -> float | None:
    return None if merit is None else -merit


def _found_by(planned: SearchPlan, under_way: _Searching, best: int) -> FoundBy:
    search = planned.search

    def scores(stage: Stage, number: int) -> dict[str, float]:
        row = under_way.rows.get((stage, number))
        return row.scores if row else {}

    return FoundBy(
        search=planned.head.search,
        table=under_way.table.uri,
        number=best,
        candidates=len(under_way.scored()),
        sampler=search.sampler.name,
        seed=search.seed,
        scores=scores("search", best),
        untuned=scores("search", 0),
        confirmed=scores("confirm", best),
        confirmed_untuned=scores("confirm", 0),
    )


def _merge_best(
    planned: SearchPlan, values: Mapping[str, Any], origin: FoundBy, watch: Watch, *, fresh: bool
) -> MergeResult:
    """Merge the best candidate into the output. An earlier best of the same search is replaced."""
    setting = Setting(name="best", set=dict(values))
    sweep = Sweep(common=planned.asked.common, settings=(setting,))
    recipe, choice = sweep.recipe(setting), sweep.choice(setting)
    if choice is not None:
        recipe = chosen(recipe, planned.entries, choice, "models")
    recipe = recipe.model_copy(update={"found_by": origin})
    made = merging.plan(recipe)
    earlier = find_result(Stores(recipe.storage), made.output)
    ours = earlier is not None and earlier.found_by is not None and earlier.found_by.search == origin.search
    replaces = ours and earlier is not None and earlier.run_id != made.run_id
    return merging.carry_out(made, started=time.monotonic(), fresh=fresh or replaces, watch=watch)
