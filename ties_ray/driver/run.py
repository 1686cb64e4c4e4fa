"""Runs the rounds of a result in order, each with its barrier. A kill leaves its records to the next run."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

from ties_ray.driver.crew import Crew, Done, Orders
from ties_ray.driver.meters import Meters
from ties_ray.driver.uploads import Uploads
from ties_ray.errors import InputError, Problem
from ties_ray.planning.forecast import ProgressForecast, predictable
from ties_ray.planning.plan import Plan
from ties_ray.planning.planner import concluded
from ties_ray.rounds import Folded, Merge, Record, RoundKind
from ties_ray.state.manifest import FRESH, Manifest
from ties_ray.state.pool_cache import PoolCache
from ties_ray.stores import Stores
from ties_ray.worker.messages import Order, Setup

Stages = Generator[Orders, Done, None]
"""The orders of each stage of a run; it is sent their outcome."""


class MergeRun:
    """Runs the rounds of a merge. Each round leaves its records, and its barrier's findings, in the manifest."""

    def __init__(
        self,
        plan: Plan,
        stores: Stores,
        manifest: Manifest,
        meters: Meters,
        check: Callable[[], None],
        *,
        resumed: bool,
    ) -> None:
        """check: raises if another run holds the output. resumed: whether an earlier run has left records."""
        self.plan = self._begun = plan
        self.resumed = resumed
        self.uploads = Uploads(stores, manifest, plan.output, check)
        self._written: tuple[dict[str, Record[Any]], list[str]] = {}, []
        """The records of the round that writes: those that an earlier run has left, and the names of new ones."""
        self.shards_done_before = 0
        """Shards that needed no work, because of earlier runs."""
        self._result = 0
        self._stores = stores
        self._manifest = manifest
        self._meters = meters
        self._followed = 0, ""
        """Revision and digest of the plan that the workers follow."""
        self._readers: dict[int, int] = {}
        """The worker that has read a range of the merged parameters, and may have cached it."""
        self._tries = 0
        self._check = check

    @property
    def merge(self) -> Merge:
        """Return the result as the barriers so far have left it."""
        return self.plan.merges[self._result]

    def setup(self, *, profiled: bool) -> Setup:
        """Begin a try: store the plan that the run began with, and return the workers' setup.

        The barriers' findings change the plan again as the rounds follow.
        """
        self._check()
        self.plan = self._begun
        self._meters.bytes_planned = self.plan.bytes_read
        self._followed = 0, self._manifest.write_plan(self.plan)
        self._readers = {}
        self._barriers: dict[int, dict[int, Folded[Any]]] = {}
        self._tries += 1
        self.shards_done_before = 0
        recipe = self.plan.recipe
        return Setup(
            self._manifest.folder, recipe.storage, self._followed[1], profiled=profiled, device=recipe.run.device
        )

    def execute(self, crew: Crew) -> None:
        """Do all rounds. A second try does what is not done yet, and what the store has forgotten."""
        stages = self.stages(crew.size)
        with suppress(StopIteration):
            orders = next(stages)
            while True:
                self._meters.begin(orders.forecast)
                orders = stages.send(crew.work(orders))

    def stages(self, num_workers: int) -> Stages:
        """Yield the orders of each stage of all rounds, and take their outcome."""
        for index in range(len(self.merge.rounds)):
            kind = self.merge.kind(index)
            self._check()
            if kind.writes:
                self.uploads.begin(self.merge, self._left_records(index).values())
            yield from self._round(index, kind, num_workers)
            if kind.folded is not None:
                self._check()
                findings = self._findings(index)
                self._follow(concluded(self.plan, self._result, kind.conclude(self.merge, index, findings)))

    def records(self) -> list[Record[Any]]:
        """Return the records of the round that writes, once it is done."""
        left, new = self._written
        return [*left.values(), *self._manifest.read_records(self.merge, len(self.merge.rounds) - 1, new)]

    def _findings(self, index: int) -> dict[int, Any]:
        """Return a barrier's findings by group. Raises `InputError` where they are gone."""
        findings = {group: folded.finding for group, folded in self.barrier(index).items()}
        if len(findings) < self.merge.kind(index).num_groups(self.merge):
            message = f"what the barrier after round {index} stored is gone"
            raise InputError(Problem(self._manifest.folder, message, FRESH))
        return findings

    def barrier(self, index: int) -> dict[int, Folded[Any]]:
        """Return what the barrier after a round has stored, by group.

        A complete barrier is read once: it belongs to the plan before it, and the next plan may have fewer models.
        """
        if index in self._barriers:
            return self._barriers[index]
        groups = range(self.merge.kind(index).num_groups(self.merge))
        folded = self._manifest.read_folded(self.merge, index, groups)
        if len(folded) == len(groups):
            self._barriers[index] = folded
        return folded

    def _follow(self, plan: Plan) -> None:
        """Store another plan, and go on with it. Workers read it where more has changed than a round's reads."""
        if plan is self.plan:
            return
        digest = self._manifest.write_plan(plan)
        before, now = self.plan.results[self._result], plan.results[self._result]
        if (before.members, before.files) != (now.members, now.files) or plan.recipe != self.plan.recipe:
            self._followed = plan.revision, digest
        self.plan = plan
        self._meters.bytes_planned = plan.bytes_read

    def _round(self, index: int, kind: RoundKind[Any, Any], num_workers: int) -> Stages:
        merge, round_ = self.merge, self.merge.rounds[index]
        groups = range(kind.num_groups(merge))
        if kind.folded is not None and len(self.barrier(index)) == len(groups):
            self.shards_done_before += round_.num_shards
            return
        before = self._findings(index - 1) if index else {}
        records = self._accepted(index, kind) or self._recalled(index, kind, before)
        done = {shard for record in records.values() for shard in record.shards}
        self.shards_done_before += len(done)
        done |= set(kind.settled(merge, index, before))
        recalled = self._recalled_members(kind, records.values())

        def order(shard: int) -> Order:
            group = kind.group(merge, shard)
            return self._order("shard", index, shard, recalled=recalled.get(group, ()))

        forecast = None
        if predictable(self.plan) and kind.relative_cost(round_):
            forecast = ProgressForecast(self.plan, index, num_workers, round_.num_shards - len(done))
        ranges = self._ranges(index, kind, num_workers)
        finished = yield Orders(
            round_.name,
            order,
            costs=(max(1, round_.bytes_read // max(1, round_.num_shards)),) * round_.num_shards,
            done=frozenset(done),
            records=True,
            slow=kind.slow,
            prefer=tuple(self._reader(range_, num_workers) for range_ in ranges),
            activity=kind.activity,
            writes=kind.writes,
            forecast=forecast,
        )
        self._readers |= {
            range_: owner
            for range_, owner in zip(ranges, finished.owners, strict=True)
            if range_ is not None and owner is not None
        }
        shards = {name: record.shards for name, record in records.items()} | finished.shards_by_record
        if kind.folded is None:
            self._written = records, [name for name in shards if name not in records]
        else:
            yield from self._fold(index, kind, shards, recalled)

    def _fold(
        self,
        index: int,
        kind: RoundKind[Any, Any],
        shards: Mapping[str, tuple[int, ...]],
        recalled: Mapping[int, tuple[int, ...]],
    ) -> Stages:
        """Have the records of each group folded. shards: the shards of each record, by its name."""
        folds = []
        for group in range(kind.num_groups(self.merge)):
            names = [name for name, own in shards.items() if own and kind.group(self.merge, own[0]) == group]
            names += [name for name, own in shards.items() if not own and name.endswith(f"-{group}.json")]
            folds.append(self._order("fold", index, group, tuple(names), recalled.get(group, ())))
        name = self.merge.rounds[index].name
        yield Orders(f"{name}: barrier", folds.__getitem__, costs=(1,) * len(folds), activity=kind.activity)

    def _order(
        self,
        action: Literal["shard", "fold"],
        round_: int,
        index: int,
        records: tuple[str, ...] = (),
        recalled: tuple[int, ...] = (),
    ) -> Order:
        return Order(action, self._result, round_, index, records, *self._followed, recalled)

    # -- the reader of each range

    def _ranges(self, index: int, kind: RoundKind[Any, Any], num_workers: int) -> Sequence[int | None]:
        """Return the first range of the merged parameters that each shard of a round reads."""
        round_ = self.merge.rounds[index]
        if num_workers == 1:
            return [None] * round_.num_shards
        return [kind.first_range(self.merge, round_, shard) for shard in range(round_.num_shards)]

    def _reader(self, range_: int | None, num_workers: int) -> int | None:
        """Return the worker that a shard should go to: the one that has read its range, or that will read it.

        A range goes to one worker for all groups of models, since the merge reads the range of all models.
        """
        if range_ is None:
            return None
        return self._readers.get(range_, range_ * num_workers // self.merge.layout.num_ranges)

    # -- records of earlier runs

    def _left_records(self, index: int) -> dict[str, Record[Any]]:
        """Return the records of a round that an interrupted run has left, or an earlier try of this run."""
        names = self._manifest.record_names(index) if self.resumed or self._tries > 1 else []
        return dict(zip(names, self._manifest.read_records(self.merge, index, names), strict=True))

    def _accepted(self, index: int, kind: RoundKind[Any, Any]) -> dict[str, Record[Any]]:
        """Return the valid records of an interrupted run: the first of overlapping ones, and none of lost uploads."""
        accepted: dict[str, Record[Any]] = {}
        covered: set[int] = set()
        for name, record in self._left_records(index).items():
            if kind.writes:
                accepted[name] = self.uploads.as_uploaded(self.merge, record)
            elif not covered & set(record.shards):
                accepted[name] = record
                covered |= set(record.shards)
        return {name: record for name, record in accepted.items() if record.shards or not kind.writes}

    def _recalled(self, index: int, kind: RoundKind[Any, Any], before: Mapping[int, Any]) -> dict[str, Record[Any]]:
        """Store the findings of the pool cache as records, like a worker's, one a group; return them by name."""
        folder = self.plan.recipe.run.pool_cache
        if folder is None:
            return {}
        merge = self.merge
        pool = PoolCache(self._stores, folder, merge.sources.formats, merge.arithmetic)
        recalls = kind.recall(merge, index, before, pool)
        if pool.refused:
            message = f"{len(pool.refused)} findings in the pool cache are broken or not signed by this key"
            note = f"{message}, and were ignored: {', '.join(sorted(pool.refused)[:3])}"
            self.plan = replace(self.plan, notes=(*self.plan.notes, note))
        records = {
            f"known-{recalled.group}.json": Record[Any](index, recalled.shards, recalled.finding)
            for recalled in recalls
        }
        for name, record in records.items():
            self._manifest.write_record(merge, name, record)
        return records

    def _recalled_members(
        self, kind: RoundKind[Any, Any], records: Iterable[Record[Any]]
    ) -> dict[int, tuple[int, ...]]:
        """Return the members of recalled findings, by group."""
        size = self.plan.sizes.model_group
        groups: dict[int, tuple[int, ...]] = {}
        for record in records:
            for member in kind.recalled_members(record.finding) if not record.shards else ():
                groups[member // size] = (*groups.get(member // size, ()), member)
        return groups
