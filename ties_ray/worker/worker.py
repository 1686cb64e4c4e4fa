"""One worker. It loads the stored plan once and then handles orders; an executor hosts it.

An order is a shard of a round, a fold at a barrier, or a flush of what is finished into a record.
"""

import itertools
import json
import os
import socket
import sys
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ties_ray import kernels
from ties_ray.errors import InputError, Problem
from ties_ray.executors import WorkerDied
from ties_ray.inputs.catalog import Earlier
from ties_ray.kernels import Kernels, flushes_to_zero
from ties_ray.kernels.buffers import Buffers, return_large_memory
from ties_ray.kernels.linalg import code_path
from ties_ray.layout.shards import Segment, Shard
from ties_ray.measures.effects import Effects, joined
from ties_ray.outputs import CondensingOutput, Placed
from ties_ray.planning.plan import Plan
from ties_ray.rounds import Folded, Merge, Record, Zeroed
from ties_ray.rounds._effects import Observer
from ties_ray.rounds._kth_largest import Pick
from ties_ray.rounds.merge import MergeRound
from ties_ray.rounds.threshold import recount
from ties_ray.state.manifest import Manifest, RangeChecksums
from ties_ray.state.pool_cache import PoolCache
from ties_ray.stores import Stores, scheme_of
from ties_ray.worker.batch import Batch
from ties_ray.worker.bench import WorkerBench
from ties_ray.worker.cache import Cache, RangeCache
from ties_ray.worker.checksums import Checksums
from ties_ray.worker.messages import ANSWER, ORDER, SETUP, Answer, Order, Setup, Traffic
from ties_ray.worker.read_ahead import ReadAhead
from ties_ray.worker.timing import Times
from ties_ray.worker.write_behind import WriteBehind


def make_worker(setup: str) -> "Worker":
    """Return the worker of a setup in JSON. Executors call this factory."""
    return Worker(SETUP.validate_json(setup))


class Worker:
    """Handles orders, one at a time. It keeps clients, buffers and findings between them."""

    def __init__(self, setup: Setup, plan: Plan | None = None) -> None:
        """plan: the plan to follow; by default the stored plan with the setup's digest."""
        torch.set_num_threads(1)  # two threads that spin can be 20 times slower than one
        self._stores = Stores(setup.storage)
        self._manifest = Manifest(self._stores, setup.folder)
        self._plan = plan or self._stored_plan(setup)
        self._times = Times(profiled=setup.profiled)
        self._kernels = self._loaded(setup.device)
        self._bases = Buffers()
        self._reads = self._reader()
        self._writes = WriteBehind(self._stores, self._times, pinned=self._on_gpu)
        self._benches: dict[int, WorkerBench] = {}
        self._read_first: dict[int, tuple[RangeChecksums, ...]] = {}
        self._token = uuid.uuid4().hex[:12]
        self._name = f"{socket.gethostname()} {os.getpid()} {self._token[:4]}" if setup.profiled else ""
        self._num_records = 0
        self._block = 0
        self._batch: Batch | None = None
        self._recorded = Answer()
        """The last record, until an answer tells of it: the order that wrote it may still fail."""
        self._bytes_compared = 0
        self._traffic = Traffic()
        self._totals: defaultdict[tuple[str, str], float] = defaultdict(float)

    def _stored_plan(self, setup: Setup) -> Plan:
        plan = self._manifest.read_plan(0, setup.digest)
        if plan is None:
            remedy = "use a folder that all nodes share, or a bucket"
            raise InputError(Problem(setup.folder, "this worker does not see the output folder", remedy))
        return plan

    def _reader(self) -> ReadAhead:
        run, merge = self._plan.recipe.run, self._plan.merges[0]
        room = merge.sources.room_for_slices()
        return ReadAhead(
            self._stores,
            merge.sources.formats,
            self._times,
            ahead=self._plan.ahead,
            gap=self._plan.sizes.gap,
            cache=Cache(int(run.cache)),
            range_cache=RangeCache(room, int(run.disk_cache), run.disk_folder),
            pinned=self._on_gpu,
        )

    def _loaded(self, device: Literal["cpu", "cuda"]) -> Kernels:
        try:
            return kernels.load(device, self._plan.recipe.run.arithmetic)
        except LookupError as error:
            where = f"run.device: {device} ({socket.gethostname()})"
            remedy = "pip install 'ties-ray[gpu]' where there is a GPU and its driver, or choose run.device: cpu"
            raise InputError(Problem(where, str(error), remedy)) from None

    @property
    def _on_gpu(self) -> bool:
        return self._kernels.device.type == "cuda"

    def _bench(self, result: int = 0) -> WorkerBench:
        if result not in self._benches:
            merge, folder = self._plan.merges[result], self._plan.recipe.run.pool_cache
            formats = merge.sources.formats
            pool = PoolCache(self._stores, folder, formats, self._plan.arithmetic) if folder else None
            self._benches[result] = WorkerBench(
                merge, self._plan.output, self._manifest, self._kernels, self._reads, self._writes, pool, self._bases
            )
        return self._benches[result]

    # -- orders

    def run(self, message: str) -> str:
        """Handle an order in JSON and return the answer in JSON."""
        order = ORDER.validate_json(message)
        started = time.monotonic()
        try:
            name = self._plan.merges[order.result].rounds[order.round].name
            with self._times.spent("work", f"{name}: {order.action} {order.index}"), self._gpu_watched():
                answer = self._handle(order)
        except BaseException:
            self._log(order, "refused", time.monotonic() - started)
            raise
        metered = self._metered(answer)
        self._count(metered)
        self._log(order, "done", time.monotonic() - started)
        return ANSWER.dump_json(metered).decode()

    @contextmanager
    def _gpu_watched(self) -> Iterator[None]:
        """Turn a GPU's errors into ours. Most of them cost its context, and so the process."""
        try:
            yield
        except torch.cuda.OutOfMemoryError as error:
            problem = f"the GPU has too little memory: {str(error).partition('. ')[0]}"
            remedy = "lower run.memory, or have fewer workers share a GPU (run.gpus_per_worker)"
            raise InputError(Problem("run.memory", problem, remedy)) from error
        except RuntimeError as error:
            if self._on_gpu and "CUDA" in str(error):
                raise WorkerDied(f"its GPU is of no use any more: {error}") from error
            raise

    def _handle(self, order: Order) -> Answer:
        if order.action in ("shard", "fold"):
            self._follow(order)
        if order.action == "hello":
            self._check_sight()
        elif order.action == "fold":
            self._fold(order)
        elif order.action == "flush":
            try:
                self._flush()
            except BaseException:
                self._batch = None  # the driver takes it for lost, and has it done again
                raise
        else:
            self._shard(order)
        answer, self._recorded = self._recorded, Answer()
        return answer

    def _follow(self, order: Order) -> None:
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
        if recipe.method.uses_lapack or isinstance(recipe.output, CondensingOutput):
            return_large_memory()
            here = code_path(self._kernels.device)
            _demand_lapack_of(self._plan.catalog.earlier, here)
            if (agree(here) or here) != here:
                problem = "computes other bits than it does for the rest of this merge"
                remedy = "use one type of CPU and one version of torch for all of it, or merge again with --fresh"
                raise InputError(Problem("this worker's LAPACK", problem, remedy))

    def _shard(self, order: Order) -> None:
        bench = self._bench(order.result)
        merge, index = bench.merge, order.round
        round_, kind = merge.rounds[index], merge.kind(index)
        place = order.result, index, kind.group(merge, order.index)
        if self._batch and (self._batch.place != place or self._batch.is_full(merge.sizes.record_shards)):
            self._flush()  # where this fails, the batch stays and only the shard is tried again
        if round_.block != self._block:
            self._reads.forget()  # a buffer is as large as the largest block
            self._bases.forget()
            self._block = round_.block
        bench.recalled = frozenset(order.recalled)
        shard, tally, zeroed = kind.shard(merge, round_, order.index), kind.tally(bench), Counter[tuple[int, str]]()
        first = index == merge.first_read() and len(merge.rounds) > index + 1
        earlier = self._manifest.read_checksums(order.index) if first else self._earlier_reads(merge, index, shard)
        self._reads.checksums = Checksums(earlier, keeps=first or round_.passes > 1)
        self._reads.keeps = any(later.bytes_again for later in merge.rounds[index + 1 :])
        observer = Observer(self._kernels)
        bench.observer = None if self._on_gpu else observer
        try:
            kind.work(bench, index, shard, tally, zeroed)
        except BaseException:
            self._writes.abandon()
            raise
        finally:
            bench.observer = None
        if first and self._reads.checksums.new:
            self._manifest.write_checksums(order.index, (*earlier, *self._reads.checksums.new))
        self._bytes_compared += self._reads.checksums.compared
        if self._batch is None:
            self._batch = Batch(*place[1:], kind.tally(bench), result=order.result)
        self._batch.absorb(order.index, tally, zeroed, observer.effects(order.index))

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
        self._manifest.write_folded(
            bench.merge, order.round, order.index, Folded(finding, tuple(zeroed), joined(effects))
        )

    def _flush(self) -> None:
        """Write the finished shards into a record. The batch stays where that fails."""
        batch = self._batch
        if batch is None:
            return
        name = f"{batch.shards[0]:08d}-{self._token}-{self._num_records:06d}.json"
        self._num_records += 1
        record: Record[object] = batch.record()
        self._manifest.write_record(self._plan.merges[batch.place[0]], name, record)
        self._recorded = Answer(record=name, round=batch.round, shards=tuple(batch.shards))
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
        return self._totals

    def _count(self, answer: Answer) -> None:
        totals = self._totals
        for metric in ("bytes_read", "bytes_written", "requests", "retries"):
            totals[metric, ""] += getattr(answer.traffic, metric)
        read, write = answer.seconds["wait_read"], answer.seconds["wait_write"]
        totals["seconds", "read"] += read
        totals["seconds", "write"] += write
        totals["seconds", "merge"] += max(0.0, answer.seconds["work"] - read - write)

    def _log(self, order: Order, outcome: str, seconds: float) -> None:
        """Count a shard, and log the order where the recipe asks for it."""
        if order.action == "shard":
            self._totals["shards", outcome] += 1
        if self._plan.recipe.run.log == "json":
            line = {
                "time": round(time.time(), 3), "run_id": self._plan.run_id, "process": os.getpid(),
                "action": order.action, "round": self._plan.merges[order.result].rounds[order.round].name,
                "shard": order.index, "outcome": outcome, "seconds": round(seconds, 3),
            }  # fmt: skip
            print(json.dumps(line), file=sys.stderr, flush=True)

    def _metered(self, answer: Answer) -> Answer:
        meters = [store.meter for store in self._stores.opened()]
        traffic = Traffic(
            bytes_read=self._reads.bytes_read,
            requests=self._reads.requests,
            bytes_kept=self._reads.bytes_kept,
            bytes_compared=self._bytes_compared,
            bytes_written=sum(meter.bytes_written for meter in meters),
            retries=sum(meter.retries for meter in meters),
        )
        seconds, spans = self._times.take()
        since, self._traffic = traffic.since(self._traffic), traffic
        return replace(answer, traffic=since, seconds=seconds, worker=self._name, spans=spans)


def _demand_lapack_of(earlier: Earlier | None, here: str) -> None:
    """Raise `InputError` where LAPACK has decided the state of an earlier merge, and computes other bits here."""
    if earlier and earlier.lapack not in ("", here):
        problem = f"computes other bits than it did for {earlier.output}"
        remedy = "use its type of CPU and version of torch, or merge all models in one recipe"
        raise InputError(Problem("this worker's LAPACK", problem, remedy))
