"""The stages in order, on an executor: the one module that knows all of them.

recipe -> catalog -> plan -> rounds (shards | barrier) ... -> finalize -> result
"""

import importlib.metadata
import platform
import statistics
import struct
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from ties_ray import lease, plugins
from ties_ray.catalog import Catalog, Model, read_catalog
from ties_ray.errors import InputError, InterruptedMerge, MergeError, Problem, UnavailableError
from ties_ray.executors import Answered, Event, Executor, Lost, Needs, Ready, Refused
from ties_ray.finalize import complete_uploads, publish_documents, publish_result
from ties_ray.manifest import FOLDER, Manifest, Record, find_runs
from ties_ray.plan import MODEL_GROUP, Plan, PlannedRound, make_plan
from ties_ray.recipe import Recipe
from ties_ray.report import (
    RESULT_NAME,
    InputProvenance,
    MergeResult,
    Progress,
    Provenance,
    TrimReport,
    Watch,
    find_result,
)
from ties_ray.schedule import Failure, Schedule
from ties_ray.statistics import WHOLE
from ties_ray.stores import Part, Stores, absolute, join
from ties_ray.work import ANSWER, ORDER, SETUP, Answer, Order, Setup

PACKAGES = ("ties-ray", "torch", "numpy", "numba")
"""What must be of one version on all workers: the arithmetic rests on these."""
SLOW_FACTOR = 3.0
SLOW_SECONDS = 5.0
"""A shard that takes so many times as long as the median, and so much longer, is given to an idle worker as well."""
DEPTH = 2
"""Shards a worker has at a time: one to do, one to follow at once."""


def plan(recipe: Recipe) -> Plan:
    """Return what a merge would do; reads headers only. Raises `RecipeError` and `InputError` with all problems."""
    stores = Stores(recipe.storage)
    output = recipe.output.model_copy(update={"path": absolute(recipe.output.path)})
    made = make_plan(recipe.model_copy(update={"output": output}), read_catalog(recipe, stores))
    if not stores.of(made.output).writable:
        what = f"{made.output} can only be read"
        raise InputError(Problem("output.path", what, "write to a local folder or an s3:// bucket"))
    return made


def merge(recipe: Recipe, *, fresh: bool = False, watch: Watch = lambda progress: None) -> MergeResult:
    """Merge, or continue an interrupted merge, or recognise a finished one; return the result record.

    fresh: forget what the output holds of earlier runs. Raises a `MergeError`; what is done is kept.
    """
    started = time.monotonic()
    return carry_out(plan(recipe), started=started, fresh=fresh, watch=watch)


def carry_out(wanted: Plan, *, started: float, fresh: bool, watch: Watch) -> MergeResult:
    """Do what a plan of this process says, as `merge` does; started: when the call began, by the monotonic clock."""
    stores = Stores(wanted.recipe.storage)
    watch(Progress("start", 0, 0, 0, wanted.bytes_read))
    finished = None if fresh else find_result(stores, wanted.output)
    if finished is not None and finished.run_id == wanted.run_id:
        _demand_files(stores, wanted.output, finished)
        return finished.model_copy(update={"reused": True})
    taken_over: list[str] = []
    with lease.acquire(stores, wanted.output, taken_over.append) as held:
        run = _open(wanted, stores, fresh=fresh)
        run.add_notes(taken_over)
        run.watch = watch
        run.execute(_executor(wanted.recipe))
        return run.publish(started, held.check)


def _executor(recipe: Recipe) -> Executor:
    return plugins.load("executors", recipe.run.executor, Executor)()


# -- what the output holds already


def _open(wanted: Plan, stores: Stores, *, fresh: bool) -> "MergeRun":
    """Return a new run, or one to continue; refuse a folder that holds something else."""
    output = wanted.output
    runs = find_runs(stores, output)
    mine = [generation for run_id, generation in runs if run_id == wanted.run_id]
    if fresh:
        _forget(stores, output, runs)
        return _begin(wanted, stores, max(mine, default=0) + 1)
    result = find_result(stores, output)
    others = sorted({run_id for run_id, _ in runs if run_id != wanted.run_id})
    remedy = "choose another folder (a path with {run_id} gives each merge its own), or replace it with --fresh"
    if result is not None:
        raise InputError(Problem(output, f"holds the result of another merge, run {result.run_id}", remedy))
    if others:
        changed = _what_changed(wanted, Manifest(stores, Manifest.folder_of(output, *runs[-1])).read_plan())
        what = f"holds an unfinished merge, run {others[-1]}, which differs from this one: {changed}"
        raise InputError(Problem(output, what, remedy))
    if mine:
        manifest = Manifest(stores, Manifest.folder_of(output, wanted.run_id, mine[-1]))
        stored = manifest.read_plan()
        if stored:
            return MergeRun(_with_run_settings(stored, wanted), stores, manifest, resumed=True)
    else:
        listing = stores.of(output).list(output)
        names = [uri.rsplit("/", 1)[-1] for uri in (*(pin.uri for pin in listing.files), *listing.folders)]
        foreign = [name for name in names if name != FOLDER]
        if foreign:
            raise InputError(Problem(output, f"holds something else: {', '.join(foreign[:5])}", remedy))
    return _begin(wanted, stores, max(mine, default=0) + 1)


def _begin(wanted: Plan, stores: Stores, generation: int) -> "MergeRun":
    manifest = Manifest(stores, Manifest.folder_of(wanted.output, wanted.run_id, generation))
    manifest.write_plan(wanted)
    return MergeRun(wanted, stores, manifest, resumed=False)


def _demand_files(stores: Stores, output: str, result: MergeResult) -> None:
    sizes = {pin.uri.rsplit("/", 1)[-1]: pin.size for pin in stores.of(output).list(output).files}
    gone = [file.name for file in result.files if sizes.get(file.name) != file.size]
    if gone:
        what = f"the result record is there, but not as it says: {', '.join(gone[:5])}"
        raise InputError(Problem(output, what, "put the files back, or merge again with --fresh"))


def _forget(stores: Stores, output: str, runs: Sequence[tuple[str, int]]) -> None:
    """Remove earlier runs: first what makes their result look whole, then their uploads and manifests."""
    store = stores.of(output)
    store.delete(join(output, RESULT_NAME))
    for run_id, generation in runs:
        manifest = Manifest(stores, Manifest.folder_of(output, run_id, generation))
        stored = manifest.read_plan()
        if stored:
            store.delete(join(output, stored.recipe.output.door(stored.result.files)))
        for name, upload in manifest.read_uploads().items():
            store.abort_upload(join(output, name), upload)
        _delete_all(stores, manifest.folder)


def _delete_all(stores: Stores, folder: str) -> None:
    listing = stores.of(folder).list(folder)
    for inner in listing.folders:
        _delete_all(stores, inner)
    for pin in listing.files:
        stores.of(folder).delete(pin.uri)


def _what_changed(wanted: Plan, stored: Plan | None) -> str:
    if stored is None:
        return "its plan is not there"
    changes = []
    if stored.arithmetic != wanted.arithmetic:
        changes.append(f"arithmetic {stored.arithmetic} there, {wanted.arithmetic} here")
    fields = ("method", "exclude", "allow", "output")
    changes += [f"`{field}`" for field in fields if getattr(stored.recipe, field) != getattr(wanted.recipe, field)]
    before = {pin.uri: pin for model in (stored.catalog.base, *stored.catalog.models) for pin in model.objects}
    now = {pin.uri: pin for model in (wanted.catalog.base, *wanted.catalog.models) for pin in model.objects}
    changes += [f"input {uri}" for uri in sorted(before.keys() | now.keys()) if before.get(uri) != now.get(uri)][:3]
    return "; ".join(changes) or "models, weights or ids"


def _with_run_settings(stored: Plan, wanted: Plan) -> Plan:
    """Return the stored plan with this call's cluster settings; say which other settings are ignored."""
    ignored = [
        f"run.{name}" for name in ("memory",) if getattr(stored.recipe.run, name) != getattr(wanted.recipe.run, name)
    ]
    if stored.recipe.output.part_size != wanted.recipe.output.part_size:
        ignored.append("output.part_size")
    run = wanted.recipe.run.model_copy(update={"memory": stored.recipe.run.memory})
    recipe = stored.recipe.model_copy(update={"run": run, "storage": wanted.recipe.storage})
    notes = (*stored.notes, *(f"continued with the stored plan: {name} of this call is ignored" for name in ignored))
    return replace(stored, recipe=recipe, notes=notes)


# -- one run


class MergeRun:
    """A merge under way: rounds on an executor, barriers, publication."""

    def __init__(self, run_plan: Plan, stores: Stores, manifest: Manifest, *, resumed: bool) -> None:
        self.watch: Watch = lambda progress: None
        self._plan = run_plan
        self._stores = stores
        self._manifest = manifest
        self._resumed = resumed
        self._seconds: dict[str, float] = {}
        self._totals = Answer()
        self._shards_done_before = 0
        self._shards_again = 0
        self._workers_lost = 0
        self._uploads: dict[str, str] = {}
        self._phase = 0

    def add_notes(self, notes: Sequence[str]) -> None:
        """Add what happened on the way to the notes of the result."""
        self._plan = replace(self._plan, notes=(*self._plan.notes, *notes))

    def execute(self, executor: Executor) -> None:
        """Do all rounds; every one leaves its records and what the barrier makes of them in the manifest."""
        self._uploads = self._begin_uploads()
        recipe = self._plan.recipe
        setup = Setup(folder=self._manifest.folder, storage=recipe.storage)
        needs = Needs(
            num_workers=recipe.run.workers,
            memory=self._plan.memory,
            gpus=recipe.run.gpus_per_worker,
            address=recipe.run.address,
            deadline=recipe.run.deadline,
            versions=tuple((package, importlib.metadata.version(package)) for package in PACKAGES),
        )
        try:
            self._num_workers = executor.start("ties_ray.work:make_worker", SETUP.dump_json(setup).decode(), needs)
            self._executor = executor
            self._work("start", [Order("hello")] * self._num_workers, costs=[1] * self._num_workers)
            for index, round_ in enumerate(self._plan.result.rounds):
                self._round(index, round_)
        finally:
            executor.stop()

    def _begin_uploads(self) -> dict[str, str]:
        """Return the upload of each weight file; begin those that are not there, or no longer known to the store."""
        store = self._stores.of(self._plan.output)
        uploads = self._manifest.read_uploads()
        self._forgotten = set()
        for index, file in enumerate(self._plan.result.files):
            uri = join(self._plan.output, file.name)
            if file.name not in uploads or store.list_parts(uri, uploads[file.name]) is None:
                if self._is_completed(uri, file.size, uploads.get(file.name)):
                    continue
                uploads[file.name] = store.begin_upload(uri, file.size)
                self._forgotten.add(index)
        self._manifest.write_uploads(uploads)
        return uploads

    def _is_completed(self, uri: str, size: int, upload: str | None) -> bool:
        """Return whether a killed run had completed this upload already: all its parts recorded, the object there."""
        if upload is None:
            return False
        try:
            return self._stores.of(uri).head(uri, 0)[0].size == size
        except FileNotFoundError:
            return False

    def _round(self, index: int, round_: PlannedRound) -> None:
        groups = self._groups(round_)
        if round_.kind != "merge" and len(self._manifest.read_folded(index, groups)) == len(groups):
            self._shards_done_before += round_.num_shards
            return
        records = self._accepted(index, round_)
        done = {shard for record in records.values() for shard in record.shards}
        self._shards_done_before += len(done)
        shards = {name: record.shards for name, record in records.items()}
        costs = [max(1, round_.bytes_read // round_.num_shards)] * round_.num_shards
        orders = [Order("shard", index, shard) for shard in range(round_.num_shards)]
        # A part written twice is the same part; a shard counted twice would be counted twice.
        repeats = round_.kind == "merge"
        shards |= self._work(round_.name, orders, costs=costs, done=done, records=True, repeats=repeats)
        if round_.kind == "merge":
            self._records = list(shards)
            return
        folds = []
        for group in groups:
            names = [name for name, own in shards.items() if self._group(round_, own[0]) == group]
            folds.append(Order("fold", index, group, tuple(names)))
        self._work(f"{round_.name}: barrier", folds, costs=[1] * len(folds))

    def _groups(self, round_: PlannedRound) -> range:
        counting = round_.kind in ("count_high", "count_low")
        return range(-(-len(self._plan.result.models) // MODEL_GROUP) if counting else 1)

    def _group(self, round_: PlannedRound, shard: int) -> int:
        return shard // self._plan.layout.num_ranges if round_.kind in ("count_high", "count_low") else 0

    def _accepted(self, index: int, round_: PlannedRound) -> dict[str, Record]:
        """Return the records of an interrupted run that count: of overlapping ones the first, none of lost uploads."""
        accepted: dict[str, Record] = {}
        covered: set[int] = set()
        for name in self._manifest.record_names(index) if self._resumed else ():
            record = self._manifest.read_record(index, name)
            lost = any(file in self._forgotten for file, _ in record.parts)
            if lost or (round_.kind != "merge" and covered & set(record.shards)):
                continue
            accepted[name] = record
            covered |= set(record.shards)
        return accepted

    def _work(
        self,
        name: str,
        orders: Sequence[Order],
        *,
        costs: Sequence[int],
        done: Collection[int] = (),
        records: bool = False,
        repeats: bool = False,
    ) -> dict[str, tuple[int, ...]]:
        """Have the orders carried out; return the shards by record name.

        records: an order is finished when a record holds it, else as soon as it is answered.
        repeats: an order may be carried out twice, so that an idle worker can overtake a slow one.
        """
        schedule = Schedule(costs, self._num_workers, bytes_in_flight=sum(costs) + 1, done=done, depth=DEPTH)
        self._phase += 1
        stage = _Stage(
            schedule,
            self._executor,
            orders,
            first_ticket=self._phase << 40,
            records=records,
            repeats=repeats,
            patience=self._plan.recipe.run.patience,
        )
        while not schedule.finished:
            self._watch(name, schedule)
            for answer in stage.step():
                self._add(answer)
            if schedule.failure:
                raise _error(schedule.failure, name)
        self._shards_again += schedule.num_retries
        self._workers_lost += schedule.num_losses
        self._watch(name, schedule)
        return stage.shards_by_record

    def _add(self, answer: Answer) -> None:
        self._totals = Answer(
            bytes_read=self._totals.bytes_read + answer.bytes_read,
            bytes_written=self._totals.bytes_written + answer.bytes_written,
            requests=self._totals.requests + answer.requests,
            retries=self._totals.retries + answer.retries,
        )
        for name, value in answer.seconds.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + value

    def _watch(self, stage: str, schedule: Schedule) -> None:
        read = self._totals.bytes_read
        self.watch(Progress(stage, schedule.num_done, schedule.num_tasks, read, self._plan.bytes_read))

    # -- after the last round

    def publish(self, started: float, check: Callable[[], None]) -> MergeResult:
        """Complete the uploads and write everything else; return the result record, which is written last.

        check: raises if the output is no longer ours; asked before anything becomes visible.
        """
        self.watch(Progress("publish", 0, 1, self._totals.bytes_read, self._plan.bytes_read))
        last = len(self._plan.result.rounds) - 1
        parts: list[tuple[int, Part]] = []
        zeroed: dict[str, int] = {}
        for name in self._records:
            record = self._manifest.read_record(last, name)
            parts += record.parts
            for member, parameter, count in record.zeroed:
                key = f"{self._plan.result.members[member].id}: {parameter}"
                zeroed[key] = zeroed.get(key, 0) + count
        files = complete_uploads(self._plan, self._stores, self._uploads, parts, check)
        result = MergeResult(
            status="done",
            run_id=self._plan.run_id,
            resumed=self._resumed,
            output=self._plan.output,
            files=files,
            shards=sum(round_.num_shards for round_ in self._plan.result.rounds),
            shards_done_before=self._shards_done_before,
            shards_again=self._shards_again,
            workers_lost=self._workers_lost,
            retries=self._totals.retries,
            bytes_read=self._totals.bytes_read,
            requests=self._totals.requests,
            bytes_written=self._totals.bytes_written,
            worker_seconds=self._seconds,
            trims=self._trims(),
            statistics=self._statistics(),
            zeroed=zeroed,
            notes=list(self._plan.notes),
            provenance=provenance(self._plan),
        )
        check()
        publish_documents(self._plan, self._stores, result)
        result = result.model_copy(update={"seconds": round(time.monotonic() - started, 3)})
        check()
        publish_result(self._plan, self._stores, result)
        self.watch(Progress("publish", 1, 1, self._totals.bytes_read, self._plan.bytes_read))
        return result

    def _folded(self, kind: str) -> list[tuple[int, PlannedRound]]:
        return [(index, round_) for index, round_ in enumerate(self._plan.result.rounds) if round_.kind == kind]

    def _trims(self) -> list[TrimReport]:
        parameters = self._plan.catalog.parameters
        reports = []
        for index, round_ in self._folded("count_low"):
            for folded in self._manifest.read_folded(index, self._groups(round_)).values():
                for pick in folded.picks:
                    whole = pick.parameter == WHOLE
                    size = self._plan.layout.num_elements if whole else parameters[pick.parameter].numel
                    reports.append(
                        TrimReport(
                            model=self._plan.result.members[pick.member].id,
                            parameter=None if whole else parameters[pick.parameter].name,
                            threshold=struct.unpack("<f", struct.pack("<I", pick.bits))[0],
                            kept=pick.kept,
                            tied=pick.tied,
                            size=size,
                        )
                    )
        return reports

    def _statistics(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for index, _ in self._folded("gather"):
            found |= self._manifest.read_folded(index, [0])[0].statistics
        return found


class _Stage:
    """One stage's orders on their way: what the schedule says goes to the executor, what happens goes back to it."""

    def __init__(
        self,
        schedule: Schedule,
        executor: Executor,
        orders: Sequence[Order],
        *,
        first_ticket: int,
        records: bool,
        repeats: bool,
        patience: float,
    ) -> None:
        self.shards_by_record: dict[str, tuple[int, ...]] = {}
        self._schedule = schedule
        self._executor = executor
        self._orders = orders
        self._first = first_ticket  # so that late news of an earlier stage is not mistaken for ours
        self._records = records
        self._repeats = repeats
        self._patience = patience
        self._since: dict[int, tuple[int, float]] = {}
        """Worker and time of submission of every open ticket, oldest first."""
        self._signs: dict[int, float] = {}
        """When a worker last answered."""
        self._seconds: list[float] = []
        """How long the orders took."""
        self._repeated: set[int] = set()
        self._next_flush = -1
        self._flushing: dict[int, int] = {}
        """Workers asked to write a record, by ticket."""

    def step(self) -> list[Answer]:
        """Submit what can be, wait a moment, and take in what happened; return the answers."""
        for worker, ticket, task in self._schedule.assignments():
            self._submit(worker, ticket, self._orders[task])
        for worker in self._schedule.holding() if self._records else ():
            if worker not in self._flushing.values():
                self._flushing[self._next_flush] = worker
                self._submit(worker, self._next_flush, Order("flush"))
                self._next_flush -= 1
        self._overtake()
        self._give_up_hung()
        return [answer for event in self._executor.wait(1.0) if (answer := self._take(event))]

    def _overtake(self) -> None:
        """Give orders that take far longer than others did to idle workers as well."""
        if not self._repeats or len(self._seconds) < 3:
            return
        usual = statistics.median(self._seconds)
        late = time.monotonic() - SLOW_FACTOR * usual - SLOW_SECONDS
        slow = [
            (ticket, task)
            for ticket, (_, since) in self._since.items()
            if since < late and (task := self._schedule.task_of(ticket)) is not None and task not in self._repeated
        ]
        for worker, (ticket, task) in zip(self._schedule.idle(), slow, strict=False):
            self._repeated.add(task)
            self._submit(*self._schedule.repeat(ticket, worker)[:2], self._orders[task])

    def _give_up_hung(self) -> None:
        late = time.monotonic() - self._patience
        waiting = {worker: since for worker, since in reversed(list(self._since.values()))}
        for worker, since in waiting.items():
            if max(since, self._signs.get(worker, 0.0)) < late:
                self._executor.give_up(worker)
                self._lost(worker, f"no answer within {self._patience:g} s (run.patience)")

    def _lost(self, worker: int, reason: str) -> None:
        self._flushing = {known: other for known, other in self._flushing.items() if other != worker}
        self._since = {known: entry for known, entry in self._since.items() if entry[0] != worker}
        self._schedule.lost(worker, reason)
        self._executor.revive(worker)

    def _submit(self, worker: int, ticket: int, order: Order) -> None:
        self._since[ticket] = (worker, time.monotonic())
        self._executor.submit(worker, self._first + ticket, ORDER.dump_json(order).decode())

    def _take(self, event: Event) -> Answer | None:
        schedule = self._schedule
        match event:
            case Answered():
                return self._answered(event.worker, event.ticket - self._first, ANSWER.validate_json(event.answer))
            case Refused():
                ticket = event.ticket - self._first
                self._since.pop(ticket, None)
                if self._flushing.pop(ticket, None) is not None:  # no record, so what it holds is as good as lost
                    schedule.lost(event.worker, "; ".join(map(str, event.problems)))
                    schedule.ready(event.worker)
                schedule.refused(ticket, event.kind, event.problems, event.traceback)
            case Lost():
                self._lost(event.worker, event.reason)
            case Ready():
                schedule.ready(event.worker)
        return None

    def _answered(self, worker: int, ticket: int, answer: Answer) -> Answer:
        self._signs[worker] = time.monotonic()
        submitted = self._since.pop(ticket, None)
        if submitted and ticket >= 0:
            self._seconds.append(time.monotonic() - submitted[1])
        task = self._schedule.task_of(ticket)
        if task is None and self._flushing.pop(ticket, None) is None:
            return answer  # of a worker that was given up: its shards are done again, and its record is not used
        self._schedule.answered(ticket)
        if answer.record:
            self.shards_by_record[answer.record] = answer.shards
            self._schedule.recorded(worker, answer.shards)
        if task is not None and not self._records:
            self._schedule.recorded(worker, [task])
        return answer


def _error(failure: Failure, stage: str) -> MergeError:
    """Return what the run fails with, naming the shard where it is not the user's own input."""
    kinds: dict[str, type[MergeError]] = {"input": InputError, "unavailable": UnavailableError}
    kind = kinds.get(failure.kind)
    if kind:
        return kind(failure.problems)
    where = stage if failure.task is None else f"{stage}, shard {failure.task}"
    is_ours = failure.kind == "defect"
    remedy = "a defect of ties_ray or of a plugin: --debug shows where" if is_ours else "run again to continue"
    problems = [Problem(where, str(problem), remedy) for problem in failure.problems]
    error = MergeError(problems) if is_ours else InterruptedMerge(problems)
    error.shard = failure.task
    if failure.traceback:
        error.add_note(failure.traceback)
    return error


def provenance(run_plan: Plan) -> Provenance:
    """Return what a result is made of, and by what versions."""
    catalog: Catalog = run_plan.catalog

    def of(model: Model) -> InputProvenance:
        return InputProvenance(
            id=model.id,
            uri=model.uri,
            weight=model.weight,
            density=model.density,
            licence=model.licence,
            objects=[(pin.uri, pin.size, pin.etag, pin.version) for pin in model.objects],
        )

    return Provenance(
        ties_ray=importlib.metadata.version("ties-ray"),
        python=platform.python_version(),
        torch=importlib.metadata.version("torch"),
        numba=importlib.metadata.version("numba"),
        ray=importlib.metadata.version("ray"),
        arithmetic=run_plan.arithmetic,
        method=run_plan.recipe.method.model_dump(mode="json"),
        base=of(catalog.base),
        models=[of(model) for model in catalog.models],
    )
