"""One worker. It loads the stored plan once and then handles orders; an executor hosts it.

An order is a shard of a round, a fold at a barrier, or a flush of what is finished into a record.
"""

import itertools
import json
import os
import socket
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ties_ray import runtime
from ties_ray.errors import InputError, Problem
from ties_ray.inputs.catalog import Earlier
from ties_ray.kernels import flushes_to_zero
from ties_ray.kernels.buffers import return_large_memory
from ties_ray.kernels.linalg import code_path
from ties_ray.layout.shards import Segment, Shard
from ties_ray.measures.effects import Effects, joined
from ties_ray.outputs import Placed
from ties_ray.planning.plan import Plan
from ties_ray.rounds import Folded, Merge, Record, Tally, Zeroed
from ties_ray.rounds._effects import Observer
from ties_ray.rounds._kth_largest import Pick
from ties_ray.rounds.merge import MergeRound
from ties_ray.rounds.threshold import recount
from ties_ray.state.manifest import Manifest, RangeChecksums
from ties_ray.state.pool_cache import PoolCache
from ties_ray.stores import Stores, scheme_of
from ties_ray.worker.batch import Batch
from ties_ray.worker.bench import WorkerBench
from ties_ray.worker.checksums import Checksums
from ties_ray.worker.messages import ANSWER, ORDER, SETUP, Answer, Order, Setup, Traffic
from ties_ray.worker.tools import Tools, gpu_watched, make_tools
from ties_ray.worker.totals import Totals


class Finished(NamedTuple):
    """A shard that is done, and not yet in a batch."""

    tally: Tally[Any]
    zeroed: Counter[tuple[int, str]]
    effects: tuple[Effects, ...]
    checksums: Checksums
    """Those of what was read."""


WITH_LARGE_TENSORS = frozenset({"units", "ranks"})
"""Kinds of rounds in which tensors of whole parameters, or of all models, come and go."""


def make_worker(setup: str) -> "Worker":
    """Return the worker of a setup in JSON. Executors call this factory."""
    return Worker(SETUP.validate_json(setup))


class Worker:
    """Handles orders, one at a time. It keeps clients, buffers and findings between them."""

    def __init__(self, setup: Setup, plan: Plan | None = None, tools: Tools | None = None) -> None:
        """plan: the plan to follow; by default the stored plan with the setup's digest. tools: by default its own."""
        torch.set_num_threads(1)  # two threads that spin can be 20 times slower than one
        self._stores = tools.stores if tools else Stores(setup.storage)
        self._manifest = Manifest(self._stores, setup.folder)
        self._plan = plan or self._stored_plan(setup)
        self.tools = tools or make_tools(setup, self._plan, self._stores)
        self._times, self._kernels, self._bases = self.tools.times, self.tools.kernels, self.tools.bases
        self._reads, self._writes = self.tools.reads, self.tools.writes
        self._benches: dict[int, WorkerBench] = {}
        self._read_first: dict[int, tuple[RangeChecksums, ...]] = {}
        self._token = runtime.token_hex(6)
        self.output = self._plan.output
        self._name = f"{socket.gethostname()} {os.getpid()} {self._token[:4]}" if setup.profiled else ""
        self._num_records = 0
        self._batch: Batch | None = None
        self._recorded = Answer()
        """The last record, until an answer tells of it: the order that wrote it may still fail."""
        self._totals = Totals()

    def _stored_plan(self, setup: Setup) -> Plan:
        plan = self._manifest.read_plan(0, setup.digest)
        if plan is None:
            remedy = "use a folder that all nodes share, or a bucket"
            raise InputError(Problem(setup.folder, "this worker does not see the output folder", remedy))
        return plan

    @property
    def _on_gpu(self) -> bool:
        return self._kernels.asynchronous

    def _bench(self, result: int = 0) -> WorkerBench:
        if result not in self._benches:
            merge, folder = self._plan.merges[result], self._plan.recipe.run.pool_cache
            formats = merge.sources.formats
            pool = PoolCache(self._stores, folder, formats, self._plan.arithmetic) if folder else None
            self._benches[result] = WorkerBench(
                merge, self._plan.output, self._manifest, self._kernels, self._reads, self._writes, pool, self._bases,
                self.tools.held,
            )  # fmt: skip
        return self._benches[result]

    # -- orders

    def run(self, message: str) -> str:
        """Handle an order in JSON and return the answer in JSON."""
        order = ORDER.validate_json(message)
        return self.answered(order, lambda: self.handle(order))

    def answered(self, order: Order, handle: Callable[[], Answer]) -> str:
        """Return the answer in JSON, with what it has cost. handle: carries out the order."""
        started = runtime.monotonic()
        try:
            name = self._plan.merges[order.result].rounds[order.round].name
            with self._times.spent("work", f"{name}: {order.action} {order.index}"), gpu_watched(on_gpu=self._on_gpu):
                answer = handle()
        except BaseException:
            self._log(order, "refused", runtime.monotonic() - started)
            raise
        metered = self._metered(answer)
        self._totals.add(metered)
        self._log(order, "done", runtime.monotonic() - started)
        return ANSWER.dump_json(metered).decode()

    def handle(self, order: Order) -> Answer:
        """Carry out an order."""
        if order.action in ("shard", "fold"):
            self.follow(order)
        if order.action == "hello":
            self._check_sight()
        elif order.action == "fold":
            self._fold(order)
        elif order.action == "flush":
            try:
                self._flush()
            except BaseException:
                self.forget()  # the driver takes it for lost, and has it done again
                raise
        else:
            self._shard(order)
        answer, self._recorded = self._recorded, Answer()
        return answer

    def follow(self, order: Order) -> None:
        """Read the order's revision of the plan, where it differs from the one at hand."""
        if order.revision != self._plan.revision:
            plan = self._manifest.read_plan(order.revision, order.digest)
            if plan is None:
                raise InputError(Problem(self._manifest.folder, "the stored plan has gone", "run the command again"))
            self._plan = plan
            self._benches.clear()

    def _check_sight(self) -> None:
        """Check that this CPU computes as the arithmetic says, and that this node sees the local inputs as planned."""
        if flushes_to_zero():
            problem = "flushes denormal numbers to zero, which changes results"
            raise InputError(Problem("this worker's CPU", problem, "unset what asks for it (DAZ/FTZ)"))
        kinds = {round_.kind for merge in self._plan.merges for round_ in merge.rounds}
        if kinds & WITH_LARGE_TENSORS or self._plan.recipe.method.companions:
            return_large_memory()
        self.check_lapack(self._manifest.agree_on_lapack)
        merge = self._plan.merges[0]
        for model in (merge.catalog.base, *merge.models):
            for pin in (pin for each in model.inputs for pin in each.objects[:1]):
                if scheme_of(pin.uri) == "local":
                    self._stores.of(pin.uri).read(pin, 0, memoryview(bytearray(8)))

    def check_lapack(self, agree: Callable[[str], str | None]) -> None:
        """Check that LAPACK computes here as it does for the whole run, where the run uses it.

        agree: gets how it computes here; returns how it computes for the run, None where nobody knows.
        """
        recipe = self._plan.recipe
        if recipe.uses_lapack:
            return_large_memory()
            here = code_path(self._kernels.device)
            _demand_lapack_of(self._plan.catalog.earlier, here)
            if (agree(here) or here) != here:
                problem = "computes other bits than it does for the rest of this merge"
                remedy = "use one type of CPU or GPU and one version of torch for it, or merge again with --fresh"
                raise InputError(Problem("this worker's LAPACK", problem, remedy))

    def _shard(self, order: Order) -> None:
        if self.is_record_due(order):
            self._flush()  # where this fails, the batch stays and only the shard is tried again
        self.keep(order, self.work(order))

    def is_record_due(self, order: Order) -> bool:
        """Return whether what is finished must go into a record before a shard is done."""
        merge = self._plan.merges[order.result]
        place = order.result, order.round, merge.kind(order.round).group(merge, order.index)
        return bool(self._batch and (self._batch.place != place or self._batch.is_full(merge.sizes.record_shards)))

    def work(self, order: Order, checksums: Checksums | None = None, twin: "Finished | None" = None) -> "Finished":
        """Do a shard. It counts once it is kept.

        checksums: those of what another merge has read for this shard. twin: another merge's outcome, which is this
        one's too.
        """
        bench = self._bench(order.result)
        merge, index = bench.merge, order.round
        round_, kind = merge.rounds[index], merge.kind(index)
        if round_.block != self.tools.block:
            self._reads.forget()  # a buffer is as large as the largest block
            self._bases.forget()
            self.tools.block = round_.block
        bench.recalled = frozenset(order.recalled)
        shard, zeroed = kind.shard(merge, round_, order.index), Counter[tuple[int, str]]()
        first = index == merge.first_read() and len(merge.rounds) > index + 1
        earlier = self._manifest.read_checksums(order.index) if first else self._earlier_reads(merge, index, shard)
        checksums = checksums or Checksums()
        checksums.expect(earlier, keeps=first or round_.passes > 1)
        finished = twin or Finished(kind.tally(bench), zeroed, (), checksums)
        if not twin:
            self._reads.checksums, later = checksums, merge.rounds[index + 1 :]
            self._reads.keeps = any(each.bytes_again for each in later)
            finished = finished._replace(effects=self._observed(bench, order, shard, finished))
        if first and checksums.new:
            self._manifest.write_checksums(order.index, (*earlier, *checksums.new))
        return finished

    def work_key(self, order: Order) -> Hashable:
        """Return what a shard's outcome rests on (`RoundKind.work_key`)."""
        bench = self._bench(order.result)
        bench.recalled = frozenset(order.recalled)
        kind = bench.merge.kind(order.round)
        shard = kind.shard(bench.merge, bench.merge.rounds[order.round], order.index)
        return kind.work_key(bench, order.round, shard)

    def _observed(self, bench: WorkerBench, order: Order, shard: Shard, finished: "Finished") -> tuple[Effects, ...]:
        """Do a shard's work; return its effects."""
        observer = Observer(self._kernels)
        bench.observer = None if self._on_gpu else observer
        before = finished.checksums.compared
        try:
            bench.merge.kind(order.round).work(bench, order.round, shard, finished.tally, finished.zeroed)
        except BaseException:
            self._writes.abandon()
            raise
        finally:
            bench.observer = None
        self.tools.bytes_compared += finished.checksums.compared - before
        return observer.effects(order.index)

    def keep(self, order: Order, finished: "Finished") -> None:
        """Add a finished shard to those that a record will hold."""
        bench = self._bench(order.result)
        kind = bench.merge.kind(order.round)
        if self._batch is None:
            group = kind.group(bench.merge, order.index)
            self._batch = Batch(order.round, group, kind.tally(bench), result=order.result)
        self._batch.absorb(order.index, finished.tally, finished.zeroed, finished.effects)

    def _earlier_reads(self, merge: Merge, index: int, shard: Shard) -> tuple[RangeChecksums, ...]:
        """Return the checksums that the first round has stored of what a shard of a later round reads."""
        first = merge.first_read()
        if index <= first:
            return ()
        shards = merge.kind(first).shards_over(merge, merge.rounds[first], shard)
        missing = [number for number in shards if number not in self._read_first]
        read = dict(zip(missing, self._reads.each(self._manifest.read_checksums, missing), strict=True))
        self._read_first = {number: read[number] if number in read else self._read_first[number] for number in shards}
        return tuple(itertools.chain.from_iterable(self._read_first.values()))

    def _fold(self, order: Order) -> None:
        """Fold the records of one group into a barrier's finding, and store it."""
        bench = self._bench(order.result)
        bench.recalled = frozenset(order.recalled)
        zeroed: list[Zeroed] = []
        effects: list[Effects] = []

        def findings() -> Iterator[object]:
            for record in self._manifest.read_records(bench.merge, order.round, order.records):
                zeroed.extend(record.zeroed)
                effects.extend(record.effects)
                yield record.finding

        try:
            finding = bench.merge.kind(order.round).fold(bench, order.round, order.index, findings())
        except InputError:
            raise
        except ValueError as error:
            problem = f"a record is not what a worker writes: {error}"
            raise InputError(Problem(self._manifest.folder, problem, "merge again with --fresh")) from error
        folded = Folded(finding, tuple(zeroed), joined(effects))
        self._manifest.write_folded(bench.merge, order.round, order.index, folded)

    def _flush(self) -> None:
        """Write the finished shards into a record. The batch stays where that fails."""
        if self._batch is None:
            return
        name, shards = record_name(self._batch.shards, self._token, self._num_records), tuple(self._batch.shards)
        self._num_records += 1
        self.write_record(name)
        self._recorded = Answer(record=name, round=self._batch.round, shards=shards)
        self.forget()

    def write_record(self, name: str) -> None:
        """Write the finished shards into a record of this name, if there are any."""
        if self._batch is not None:
            record: Record[object] = self._batch.record()
            self._manifest.write_record(self._plan.merges[self._batch.place[0]], name, record)

    def forget(self) -> None:
        """Forget the finished shards."""
        self._batch = None

    # -- for `verify`

    def merged(self, placed: Placed, runs: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
        """Yield the bytes (1-D uint8) of runs of elements of a tensor, as a merge writes them. It writes nothing.

        Raises what a merge raises, also where the inputs have changed since they were planned.
        """
        bench = self._bench()
        merge, last = bench.merge, len(bench.merge.rounds) - 1
        parameter = merge.layout.by_name[placed.tensor.parameter]
        earlier: tuple[RangeChecksums, ...] = ()
        if placed.tensor.origin == "merged":
            segments = tuple(Segment(parameter, first, stop) for first, stop in runs)
            earlier = self._earlier_reads(merge, last, Shard(models=(0, len(merge.models)), segments=segments))
        self._reads.checksums = Checksums(earlier)
        yield from MergeRound().sample(bench, placed, runs)

    def recounted(self, member: int) -> list[Pick]:
        """Return the picks of a member, counted from its values alone. It writes nothing."""
        bench = self._bench()
        bench.recalled = frozenset(range(len(bench.merge.models))) - {member}
        self._reads.checksums = Checksums()
        return recount(bench, member)

    # -- metrics

    def totals(self) -> Mapping[tuple[str, str], float]:
        """Return all counts by metric (`messages.METRICS`) and label."""
        return self._totals.by_metric

    def _log(self, order: Order, outcome: str, seconds: float) -> None:
        """Count a shard, and log the order where the recipe asks for it."""
        if order.action == "shard":
            self._totals.by_metric["shards", outcome] += 1
        if self._plan.recipe.run.log == "json":
            print(_log_line(self._plan, order, outcome, seconds), file=sys.stderr, flush=True)

    def _metered(self, answer: Answer) -> Answer:
        meters = [store.meter for store in self._stores.opened()]
        traffic = Traffic(
            bytes_read=self._reads.bytes_read,
            requests=self._reads.requests,
            bytes_kept=self._reads.bytes_kept,
            bytes_compared=self.tools.bytes_compared,
            bytes_written=sum(meter.bytes_written for meter in meters),
            retries=sum(meter.retries for meter in meters),
        )
        seconds, spans = self._times.take()
        since, self.tools.traffic = traffic.since(self.tools.traffic), traffic
        return replace(answer, traffic=since, seconds=seconds, worker=self._name, spans=spans)


def _demand_lapack_of(earlier: Earlier | None, here: str) -> None:
    """Raise `InputError` where LAPACK has decided the state of an earlier merge, and computes other bits here."""
    if earlier and earlier.lapack not in ("", here):
        problem = f"computes other bits than it did for {earlier.output}"
        remedy = "use its type of CPU or GPU and its version of torch, or merge all models in one recipe"
        raise InputError(Problem("this worker's LAPACK", problem, remedy))


def record_name(shards: Sequence[int], token: str, number: int) -> str:
    """Return a record's name, which no other worker gives. number: records that this worker has written."""
    return f"{shards[0]:08d}-{token}-{number:06d}.json"


def _log_line(plan: Plan, order: Order, outcome: str, seconds: float) -> str:
    line = {
        "time": round(runtime.time(), 3), "run_id": plan.run_id, "process": os.getpid(), "action": order.action,
        "round": plan.merges[order.result].rounds[order.round].name, "shard": order.index, "outcome": outcome,
        "seconds": round(seconds, 3),
    }  # fmt: skip
    return json.dumps(line)
