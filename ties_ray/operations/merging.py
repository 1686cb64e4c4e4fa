"""The stages in order, on an executor: the one module that knows all of them.

recipe -> catalog -> plan -> rounds (shards | barrier) ... -> finalize -> result
"""

import importlib.metadata
import json
import math
import platform
import struct
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ties_ray import plugins
from ties_ray.driver import resume
from ties_ray.driver.dispatch import Slow, Stage
from ties_ray.driver.publish import (
    as_loaded,
    complete_uploads,
    demand_no_foreign,
    demand_space,
    publish_documents,
    publish_result,
    read_documents,
)
from ties_ray.driver.schedule import Failure, Schedule
from ties_ray.errors import FRESH_THEN, InputError, InterruptedMerge, MergeError, Problem, UnavailableError
from ties_ray.executors import Executor, Needs
from ties_ray.inputs.catalog import Catalog, Model, read_catalog
from ties_ray.layout.shards import COUNTS, MODEL_GROUP
from ties_ray.libraries.loaders import opened_by, remarks, unloadable
from ties_ray.outputs import CondensingOutput
from ties_ray.planning.forecast import DEAR, Forecast, Pace, Work, predict, predictable
from ties_ray.planning.plan import Plan, PlannedRound, make_plan, narrowed, settle, without
from ties_ray.recipe.recipe import Recipe
from ties_ray.reports.records import (
    InputProvenance,
    MergeResult,
    Progress,
    Provenance,
    TrimReport,
    Truncation,
    Watch,
)
from ties_ray.rounds.kth_largest import WHOLE
from ties_ray.state import lease
from ties_ray.state.manifest import FRESH, Folded, Manifest, Record, Survey
from ties_ray.state.pool_cache import PoolCache
from ties_ray.stores import CAN_ONLY_BE_READ, WRITE_ELSEWHERE, Stores, WritableStore, absolute, join
from ties_ray.worker.messages import SETUP, Answer, Order, Setup
from ties_ray.worker.timing import ACTIVITIES, Times, Trace

PACKAGES = ("ties-ray", "torch", "numpy", "numba")
"""What must be of one version on all workers: the arithmetic rests on these."""
TRIES = 3
"""How often a merge is taken up again, at most, because the store has forgotten an upload."""
DEPTH = 2
"""Shards a worker has at a time: one to do, one to follow at once."""
SLOW: dict[str, Slow] = {
    "merge": "repeat", "count_high": "replace", "count_low": "replace", "gather": "replace", "survey": "wait",
    "condense": "wait",
}  # fmt: skip
"""What becomes of slow shards: a part written twice is the same part, a shard counted twice would be counted twice."""


def plan(recipe: Recipe) -> Plan:
    """Return what a merge would do; reads headers only. Raises `RecipeError` and `InputError` with all problems."""
    stores = Stores(recipe.storage)
    output = recipe.output.model_copy(update={"path": absolute(recipe.output.path)})
    made = make_plan(recipe.model_copy(update={"output": output}), read_catalog(recipe, stores))
    if not isinstance(stores.of(made.output), WritableStore):
        what = f"{made.output} {CAN_ONLY_BE_READ}"
        raise InputError(Problem("output.path", what, WRITE_ELSEWHERE))
    folder = as_loaded(made, read_documents(made, stores, texts=True))
    problems = unloadable(folder)
    if problems:
        raise InputError(problems)
    return replace(made, notes=(*made.notes, *(remarks(folder) if made.recipe.output.reads_base else ())))


def forecast(made: Plan) -> Forecast | None:
    """Return how long a merge would take one worker, and more of them; reads and merges for about a second.

    None where nothing can be said: of a GPU, only a worker that has it knows. Raises what reading the inputs raises.
    """
    if made.recipe.run.device != "cpu" or not predictable(made):
        return None
    from ties_ray.worker import rates  # imports torch and the compiled kernels

    found = rates.measure(made, Stores(made.recipe.storage))
    asked = made.recipe.run.workers
    several = (1, 8, 64) if asked is None else sorted({1, asked})
    return Forecast(rates=found, predictions=[one for n in several if (one := predict(made, found, n))])


def merge(
    recipe: Recipe, *, fresh: bool = False, watch: Watch = lambda progress: None, profile: Path | None = None
) -> MergeResult:
    """Merge, or continue an interrupted merge, or recognise a finished one; return the result record.

    fresh: forget what the output holds of earlier runs. profile: a file for what every worker did when, in Chrome's
    trace event format. Raises a `MergeError`; what is done is kept.
    """
    started = time.monotonic()
    return carry_out(plan(recipe), started=started, fresh=fresh, watch=watch, profile=profile)


def carry_out(wanted: Plan, *, started: float, fresh: bool, watch: Watch, profile: Path | None = None) -> MergeResult:
    """Do what a plan of this process says, as `merge` does; started: when the call began, by the monotonic clock."""
    with Trace(profile) if profile else nullcontext() as trace:
        return _carry_out(wanted, started, watch, trace, fresh=fresh)


def _carry_out(wanted: Plan, started: float, watch: Watch, trace: Trace | None, *, fresh: bool) -> MergeResult:
    stores = Stores(wanted.recipe.storage)
    watch(Progress("start", 0, 0, 0, wanted.bytes_read))
    finished = None if fresh else resume.finished(wanted, stores)
    if finished:
        return finished.model_copy(update={"waiting": list(wanted.catalog.waiting)})
    taken_over: list[str] = []
    with lease.acquire(stores, wanted.output, taken_over.append) as held:
        finished = None if fresh else resume.finished(wanted, stores)  # by the run that held the lease until now
        if finished:
            return finished.model_copy(update={"waiting": list(wanted.catalog.waiting)})
        opened, manifest, resumed = resume.open_run(wanted, stores, fresh=fresh)
        demand_space(opened, stores)
        opened = replace(opened, notes=(*opened.notes, *taken_over))
        run = MergeRun(opened, stores, manifest, resumed=resumed, watch=watch, trace=trace)
        for left in reversed(range(TRIES)):
            try:
                run.execute(_executor(wanted.recipe))
                return run.publish(started, held.check)
            except InterruptedMerge:
                if not left or run.uploads_are_known():
                    raise
        raise AssertionError("the last try returns or raises")


def _executor(recipe: Recipe) -> Executor:
    return plugins.load("executors", recipe.run.executor, Executor)()


def _split(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the workers' time by what it went for; the merge itself is what no wait explains."""
    merge = seconds["work"] - seconds["wait_read"] - seconds["wait_write"]
    return {name: round(value, 3) for name, value in {"merge": merge, **seconds}.items() if name != "work"}


# -- one run


class MergeRun:
    """A merge under way: rounds on an executor, barriers, publication."""

    def __init__(
        self, run_plan: Plan, stores: Stores, manifest: Manifest, *, resumed: bool, watch: Watch, trace: Trace | None
    ) -> None:
        self.watch = watch
        self._trace = trace
        self._times = Times(profiled=trace is not None)
        self._plan = self._begun = run_plan
        self._stores = stores
        self._manifest = manifest
        self._resumed = resumed
        self._seconds = dict.fromkeys((*ACTIVITIES, "idle"), 0.0)
        self._totals = Answer()
        self._shards_done_before = 0
        self._shards_again = 0
        self._workers_lost = 0
        self._quarantined: frozenset[int] = frozenset()
        self._pace: Pace | None = None
        """Of the round at hand, until it has told how long the run takes."""
        self._expected: float | None = None
        """When the run should end, by the monotonic clock."""
        self._uploads: dict[str, str] = {}
        self._known: dict[str, Record] = {}
        """The records of the last round that an interrupted run has left, as far as they count..."""
        self._new: list[str] = []
        """...and the names of those that this one has written."""
        self._owners: tuple[int | None, ...] = ()
        """The worker that carried each order of the last stage out."""
        self._readers: dict[int, int] = {}
        """The worker that has read a range of the merged parameters, and may have kept it."""
        self._tries = 0
        self._phase = 0

    def execute(self, executor: Executor) -> None:
        """Do all rounds; every one leaves its records and what the barrier makes of them in the manifest.

        Once more, it does what is not done yet, and what was written into uploads that the store has forgotten.
        """
        recipe = self._plan.recipe
        self._shards_done_before = 0
        self._tries += 1
        self._plan = self._begun  # what barriers made of it is worked out again from what they have stored
        self._told = 0, self._manifest.write_plan(self._plan)
        self._quarantined, self._readers = frozenset(), {}  # of an earlier try: these workers are new
        profiled = self._trace is not None
        setup = Setup(self._manifest.folder, recipe.storage, self._told[1], profiled=profiled, device=recipe.run.device)
        needs = Needs(
            num_workers=recipe.run.workers,
            memory=self._plan.memory,
            gpus=recipe.run.gpus,
            address=recipe.run.address,
            deadline=recipe.run.deadline,
            versions=tuple((package, importlib.metadata.version(package)) for package in PACKAGES),
        )
        try:
            self._num_workers = executor.start(
                "ties_ray.worker.worker:make_worker", SETUP.dump_json(setup).decode(), needs
            )
            self._executor = executor
            began, work = time.monotonic(), self._seconds["work"]
            self._work("start", lambda _: Order("hello"), costs=[1] * self._num_workers)
            for index, round_ in enumerate(self._plan.result.rounds):
                if index and self._plan.result.rounds[index - 1].kind == "survey":
                    self._judge(self._barrier(index - 1).surveys)
                if round_.kind == "merge":
                    self._settle(index)
                    self._uploads = self._begin_uploads(index)
                self._round(index, self._plan.result.rounds[index])
            whole = self._num_workers * (time.monotonic() - began)
            self._seconds["idle"] += max(0.0, whole - (self._seconds["work"] - work))
        finally:
            executor.stop()

    def _settle(self, index: int) -> None:
        """Give the output the rank that its matrices ask for, in the stored plan too; workers read it again."""
        output = self._plan.recipe.output
        if isinstance(output, CondensingOutput):
            matrices, ranks = self._barrier(index - 1).matrices, output.ranks
            if [one.parameter for one in matrices] != self._plan.layout.matrices:
                raise InputError(Problem(self._manifest.folder, "a condensed matrix is not recorded", FRESH))
            errors2 = [[one.errors2[rank] for rank in ranks] for one in matrices]
            self._follow(settle(self._plan, [one.norm2 for one in matrices], errors2))

    def _judge(self, surveys: Sequence[Survey]) -> None:
        """Refuse models for what a survey found of them, or go on without them where the recipe allows it."""
        recipe, models = self._plan.recipe, self._plan.catalog.models
        least, most = recipe.bounds.norm or (0.0, math.inf)
        wrong: dict[int, Problem] = {}
        for one in surveys:
            model = models[self._plan.result.models[one.member]]
            norm = math.sqrt(one.norm2)
            if one.not_finite:
                what = f"{one.not_finite:,} values of its factors are NaN or Inf"
                wrong[one.member] = Problem(
                    model.uri, what, f"repair or drop it, or `allow: {{nan: drop_model}}`; {FRESH_THEN}", "nan"
                )
            elif not least <= norm <= most:
                what = f"its change has the norm {norm:.6g}, outside bounds.norm ({least:g} to {most:g})"
                wrong[one.member] = Problem(
                    model.uri, what, f"drop it, or `allow: {{refused_model: drop}}`; {FRESH_THEN}", "norm"
                )
        drops = recipe.allow.refused_model == "drop"
        fatal = [one for one in wrong.values() if not drops and (one.code == "norm" or recipe.allow.nan is None)]
        if fatal or len(wrong) == len(surveys):
            raise InputError(fatal or wrong.values())
        if wrong:
            self._follow(without(self._plan, wrong))

    def _follow(self, plan: Plan, *, tell: bool = True) -> None:
        """Go on by another plan, which is stored; tell: workers read it when they hear of the new revision."""
        if plan is not self._plan:
            digest = self._manifest.write_plan(plan)
            self._plan = plan
            if tell:
                self._told = plan.revision, digest

    def _barrier(self, index: int) -> Folded:
        """Return what the barrier after a round has stored of all models together."""
        found = self._manifest.read_folded(index, self._plan, [0])
        if not found:
            what = f"what the barrier after round {index} stored is gone"
            raise InputError(Problem(self._manifest.folder, what, FRESH))
        return found[0]

    def _begin_uploads(self, last: int) -> dict[str, str]:
        """Return the upload of each weight file; begin those that are not there, or no longer known to the store."""
        store = self._stores.writer(self._plan.output)
        uploads = self._manifest.read_uploads()
        recorded: dict[tuple[int, str], set[int]] = {}
        for record in self._records_of(last).values():
            into = dict(record.uploads)
            for one in record.parts:
                recorded.setdefault((one.file, into[one.file]), set()).add(one.part.number)
        for index, file in enumerate(self._plan.result.files):
            uri, known = join(self._plan.output, file.name), uploads.get(file.name, "")
            if known and store.list_parts(uri, known) is not None:
                continue
            whole = len(recorded.get((index, known), ())) == self._plan.layout.num_parts(index)
            if not (whole and self._is_completed(uri, file.size)):
                uploads[file.name] = store.begin_upload(uri, file.size)
        self._manifest.write_uploads(uploads)
        for uri, upload in store.list_uploads(self._plan.output):
            if upload not in uploads.values():
                store.abort_upload(uri, upload)  # begun, and its id never noted: a kill, or the answer was lost
        return uploads

    def _is_completed(self, uri: str, size: int) -> bool:
        """Return whether an upload whose parts were all recorded was completed: the object is there."""
        try:
            return self._stores.of(uri).head(uri, 0)[0].size == size
        except FileNotFoundError:
            return False

    def uploads_are_known(self) -> bool:
        """Return whether the store knows all uploads, as far as they had begun; one that was completed counts too."""
        store = self._stores.writer(self._plan.output)
        return all(
            store.list_parts(uri, self._uploads[file.name]) is not None or self._is_completed(uri, file.size)
            for file in self._plan.result.files
            if file.name in self._uploads
            for uri in [join(self._plan.output, file.name)]
        )

    def _records_of(self, index: int) -> dict[str, Record]:
        """Return the records of a round that an interrupted run has left, or an earlier try of this one."""
        names = self._manifest.record_names(index) if self._resumed or self._tries > 1 else []
        return dict(zip(names, self._manifest.read_records(index, self._plan, names), strict=True))

    def _round(self, index: int, round_: PlannedRound) -> None:
        groups = self._groups(round_)
        left = self._narrow(index) if round_.kind == "count_low" else set()
        round_ = self._plan.result.rounds[index]
        if round_.kind != "merge" and len(self._manifest.read_folded(index, self._plan, groups)) == len(groups):
            self._shards_done_before += round_.num_shards
            return
        records = self._accepted(index, round_) or self._recalled(index, round_)
        known = [count.member for record in records.values() if not record.shards for count in record.counts]
        done = {shard for record in records.values() for shard in record.shards}
        self._shards_done_before += len(done)
        if round_.kind == "count_low":
            done |= {shard for shard in range(round_.num_shards) if self._group(round_, shard) not in left}
        shards = {name: record.shards for name, record in records.items()}
        costs = [max(1, round_.bytes_read // max(1, round_.num_shards))] * round_.num_shards
        of_group = {group: _of_group(known, group) for group in groups}

        def order(shard: int) -> Order:
            return self._order("shard", index, shard, known=of_group[self._group(round_, shard)])

        ranges = self._ranges(round_)
        prefer = [self._reader(one) for one in ranges]
        slow = SLOW[round_.kind]
        if self._expected is None and predictable(self._plan) and DEAR[round_.kind]:
            self._pace = Pace(self._plan, index, self._num_workers, round_.num_shards - len(done))
        shards |= self._work(round_.name, order, costs=costs, done=done, records=True, slow=slow, prefer=prefer)
        self._pace = None
        for one, owner in zip(ranges, self._owners, strict=True):
            if one is not None and owner is not None:
                self._readers[one] = owner
        if round_.kind == "merge":
            self._known, self._new = records, [name for name in shards if name not in records]
            return
        folds = []
        for group in groups:
            names = [name for name, own in shards.items() if own and self._group(round_, own[0]) == group]
            names += [name for name, own in shards.items() if not own and name.endswith(f"-{group}.json")]
            folds.append(self._order("fold", index, group, tuple(names), known=of_group[group]))
        self._work(f"{round_.name}: barrier", folds.__getitem__, costs=[1] * len(folds))

    def _narrow(self, index: int) -> set[int]:
        """Leave in the plan, and the stored one, what is still to be counted; return the groups where that is any."""
        groups = self._groups(self._plan.result.rounds[index - 1])
        known = self._manifest.read_folded(index - 1, self._plan, groups)
        picks = [pick for folded in known.values() for pick in folded.picks]
        left = {(pick.member, pick.parameter) for pick in picks if not pick.settled}
        self._follow(narrowed(self._plan, left), tell=False)  # shards keep their numbers, so workers need it not
        return {member // MODEL_GROUP for member, _ in left}

    def _ranges(self, round_: PlannedRound) -> list[int | None]:
        """Return a range of the merged parameters, the first, that each shard of a round reads of."""
        layout = self._plan.layout
        if round_.kind in (*COUNTS, "gather"):
            return [index % layout.num_ranges for index in range(round_.num_shards)]
        if round_.kind == "survey" or self._num_workers == 1:
            return [None] * round_.num_shards
        firsts = [layout.segments(layout.shard(round_.kind, index, 0))[:1] for index in range(round_.num_shards)]
        return [min(layout.ranges_over(first), default=None) for first in firsts]

    def _reader(self, range_: int | None) -> int | None:
        """Return the worker that a shard should go to: the one that has read of the range, or that is to be it.

        A range goes to one worker for all groups of models, since the merge reads it of all of them.
        """
        if range_ is None:
            return None
        return self._readers.get(range_, range_ * self._num_workers // self._plan.layout.num_ranges)

    def _order(
        self,
        action: Literal["shard", "fold"],
        round_: int,
        index: int,
        records: tuple[str, ...] = (),
        known: tuple[int, ...] = (),
    ) -> Order:
        return Order(action, round_, index, records, *self._told, known)

    def _recalled(self, index: int, round_: PlannedRound) -> dict[str, Record]:
        """Return records of what earlier merges have left in the pool cache, stored like a worker's, one a group."""
        folder = self._plan.recipe.run.pool_cache
        if folder is None or round_.kind not in ("survey", *COUNTS):
            return {}
        groups = self._groups(round_) if round_.kind == "count_low" else ()
        before = self._manifest.read_folded(index - 1, self._plan, groups)
        picks = {pick.member: pick for part in before.values() for pick in part.picks if pick.parameter == WHOLE}
        cache = PoolCache(self._stores, folder)
        surveys, counts = cache.recall(self._plan, round_.kind, picks)
        if cache.refused:
            what = f"{len(cache.refused)} findings in the pool cache are broken or not signed by this key"
            note = f"{what}, and were ignored: {', '.join(sorted(cache.refused)[:3])}"
            self._plan = replace(self._plan, notes=(*self._plan.notes, note))
        records = {}
        if surveys:  # a shard of a survey is a model
            records["known-0.json"] = Record(index, tuple(one.member for one in surveys), surveys=surveys)
        for group in {count.member // MODEL_GROUP for count in counts}:
            own = tuple(count for count in counts if count.member // MODEL_GROUP == group)
            records[f"known-{group}.json"] = Record(index, (), counts=own)
        for name, record in records.items():
            self._manifest.write_record(name, record)
        return records

    def _groups(self, round_: PlannedRound) -> range:
        return range(-(-len(self._plan.result.models) // MODEL_GROUP) if round_.kind in COUNTS else 1)

    def _group(self, round_: PlannedRound, shard: int) -> int:
        return shard // self._plan.layout.num_ranges if round_.kind in COUNTS else 0

    def _accepted(self, index: int, round_: PlannedRound) -> dict[str, Record]:
        """Return the records of an interrupted run that count: of overlapping ones the first, none of lost uploads."""
        accepted: dict[str, Record] = {}
        covered: set[int] = set()
        for name, record in self._records_of(index).items():
            if round_.kind == "merge":
                accepted[name] = self._as_uploaded(record)
            elif not covered & set(record.shards):
                accepted[name] = record
                covered |= set(record.shards)
        return {name: record for name, record in accepted.items() if record.shards or not record.uploads}

    def _as_uploaded(self, record: Record) -> Record:
        """Return a record without what it tells of uploads that the store has forgotten: others write that again."""
        files, layout = self._plan.result.files, self._plan.layout
        gone = {file for file, upload in record.uploads if self._uploads[files[file].name] != upload}
        lost = {placed.tensor.parameter for file in gone for placed in files[file].tensors}
        return replace(
            record,
            shards=tuple(shard for shard in record.shards if layout.merge_shard(shard, 0).file not in gone),
            parts=tuple(one for one in record.parts if one.file not in gone),
            zeroed=tuple(one for one in record.zeroed if one[1] not in lost),
        )

    def _work(
        self,
        name: str,
        order: Callable[[int], Order],
        *,
        costs: Sequence[int],
        done: Collection[int] = (),
        records: bool = False,
        slow: Slow = "wait",
        prefer: Sequence[int | None] | None = None,
    ) -> dict[str, tuple[int, ...]]:
        """Have as many orders carried out as there are costs; return the shards by record name.

        records: an order is finished when a record holds it, else as soon as it is answered.
        prefer: the worker that each order should go to.
        """
        schedule = Schedule(
            costs,
            self._num_workers,
            done=done,
            lost=self._quarantined,
            prefer=prefer,
            depth=DEPTH,
        )
        self._phase += 1
        stage = Stage(
            schedule,
            self._executor,
            order,
            first_ticket=self._phase << 40,
            records=records,
            slow=slow,
            patience=self._plan.recipe.run.patience,
        )
        with self._times.spent("work", name):
            while not schedule.finished:
                self._watch(name, schedule)
                for answer in stage.step():
                    self._add(answer)
                if schedule.failure:
                    raise _error(schedule.failure, name)
        if self._trace:
            self._trace.add("stages", self._times.take()[1])
        self._shards_again += schedule.num_retries
        self._workers_lost += schedule.num_losses
        self._quarantined = schedule.quarantined
        self._owners = schedule.owners
        self._watch(name, schedule)
        return stage.shards_by_record

    def _add(self, answer: Answer) -> None:
        self._totals = Answer(
            bytes_read=self._totals.bytes_read + answer.bytes_read,
            bytes_written=self._totals.bytes_written + answer.bytes_written,
            requests=self._totals.requests + answer.requests,
            bytes_kept=self._totals.bytes_kept + answer.bytes_kept,
            bytes_compared=self._totals.bytes_compared + answer.bytes_compared,
            retries=self._totals.retries + answer.retries,
        )
        if self._trace:
            self._trace.add(answer.worker, answer.spans)
        for name, value in answer.seconds.items():
            self._seconds[name] += value
        if self._pace:
            seconds = answer.seconds
            waited = seconds.get("wait_read", 0.0) + seconds.get("wait_write", 0.0)
            work = Work(1, answer.bytes_read, answer.bytes_written, seconds.get("work", 0.0), waited)
            if (left := self._pace.add(work)) is not None:
                self._pace, self._expected = None, time.monotonic() + left

    def _watch(self, stage: str, schedule: Schedule) -> None:
        read = self._totals.bytes_read + self._totals.bytes_kept
        self.watch(Progress(stage, schedule.num_done, schedule.num_tasks, read, self._plan.bytes_read))

    # -- after the last round

    def publish(self, started: float, check: Callable[[], None]) -> MergeResult:
        """Complete the uploads and write everything else; return the result record, which is written last.

        check: raises if the output is no longer ours; asked before anything becomes visible.
        """
        self.watch(Progress("publish", 0, 1, self._totals.bytes_read, self._plan.bytes_read))
        last = len(self._plan.result.rounds) - 1
        records = [*self._known.values(), *self._manifest.read_records(last, self._plan, self._new)]
        parts = [part for record in records for part in record.parts]
        truncation, lost = self._truncation(last)
        zeroed: dict[str, int] = {}
        for member, parameter, count in (*lost, *(one for record in records for one in record.zeroed)):
            key = f"{self._plan.result.members[member].id}: {parameter}"
            zeroed[key] = zeroed.get(key, 0) + count
        documents = read_documents(self._plan, self._stores)
        demand_no_foreign(self._plan, self._stores, documents)
        files = complete_uploads(self._plan, self._stores, self._uploads, parts, check)
        folder = as_loaded(self._plan, documents)
        opener = opened_by(folder, self._plan.library.name) or self._plan.library.opened_by
        result = MergeResult(
            status="done",
            run_id=self._plan.run_id,
            resumed=self._resumed,
            output=self._plan.output,
            opened_by=opener.replace("{output}", json.dumps(self._plan.output, ensure_ascii=False)[1:-1]),
            files=files,
            shards=sum(round_.num_shards for round_ in self._plan.result.rounds),
            shards_done_before=self._shards_done_before,
            shards_again=self._shards_again,
            workers_lost=self._workers_lost,
            retries=self._totals.retries,
            bytes_read=self._totals.bytes_read,
            requests=self._totals.requests,
            bytes_kept=self._totals.bytes_kept,
            bytes_compared=self._totals.bytes_compared,
            bytes_written=self._totals.bytes_written,
            worker_seconds=_split(self._seconds),
            trims=self._trims(),
            statistics=self._statistics(),
            zeroed=zeroed,
            truncation=truncation,
            waiting=list(self._plan.catalog.waiting),
            refused={one.uri: [str(problem) for problem in one.problems] for one in self._plan.catalog.refused},
            notes=[*self._plan.notes, *(note for store in self._stores.opened() for note in store.notes)],
            provenance=provenance(self._plan),
        )
        check()
        written = publish_documents(self._plan, self._stores, documents, result)
        predicted = None if self._expected is None else round(self._expected - started, 3)
        seconds = round(time.monotonic() - started, 3)
        result = result.model_copy(update={"documents": written, "seconds": seconds, "predicted_seconds": predicted})
        check()
        publish_result(self._plan, self._stores, result)
        if isinstance(self._plan.recipe.output, CondensingOutput):
            self._manifest.delete_scratch()
        self.watch(Progress("publish", 1, 1, self._totals.bytes_read, self._plan.bytes_read))
        return result

    def _truncation(self, last: int) -> tuple[Truncation | None, Sequence[tuple[int, str, int]]]:
        """Return what a rank cost, and what counted as zero while matrices were condensed."""
        output = self._plan.recipe.output
        if not isinstance(output, CondensingOutput):
            return None, ()
        folded = self._barrier(last - 1)
        rank = output.ranks[-1]
        norm2 = math.fsum(one.norm2 for one in folded.matrices)
        error2 = math.fsum(one.errors2[rank] for one in folded.matrices)
        names = [parameter.name for parameter in self._plan.catalog.parameters]
        each = {names[one.parameter]: _share(one.errors2[rank], one.norm2) for one in folded.matrices}
        truncation = Truncation(rank=rank, relative_error=_share(error2, norm2), matrices=each)
        return truncation, folded.zeroed

    def _folded(self, kind: str) -> list[tuple[int, PlannedRound]]:
        return [(index, round_) for index, round_ in enumerate(self._plan.result.rounds) if round_.kind == kind]

    def _trims(self) -> list[TrimReport]:
        parameters = self._plan.catalog.parameters
        reports = []
        for index, round_ in self._folded("count_low"):
            for folded in self._manifest.read_folded(index, self._plan, self._groups(round_)).values():
                for pick in folded.picks:
                    whole = pick.parameter == WHOLE
                    of_whole = self._plan.result.sizes[pick.member]
                    size = of_whole if whole else parameters[pick.parameter].numel
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
            found |= self._barrier(index).statistics
        return found


def _of_group(members: Sequence[int], group: int) -> tuple[int, ...]:
    return tuple(member for member in members if member // MODEL_GROUP == group)


def _share(error2: float, norm2: float) -> float:
    return math.sqrt(error2 / norm2) if norm2 else 0.0


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


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "nothing"  # which is enough where it is not used: `local` needs no Ray


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
            account=model.account,
        )

    return Provenance(
        ties_ray=importlib.metadata.version("ties-ray"),
        python=platform.python_version(),
        torch=importlib.metadata.version("torch"),
        numba=importlib.metadata.version("numba"),
        ray=_installed("ray"),
        arithmetic=run_plan.arithmetic,
        method=run_plan.recipe.method.model_dump(mode="json"),
        base=of(catalog.base),
        models=[of(model) for model in catalog.models],
    )
