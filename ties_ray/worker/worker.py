"""One worker: joins store, format, method and kernels. An executor merely hosts it.

A worker loads the stored plan once and then handles orders: a shard of a round, a fold at a barrier, a flush. Models
are read ahead by a few threads into reused buffers, merged in recipe order, and parts are written behind.
"""

import itertools
import json
import math
import os
import socket
import sys
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ties_ray import kernels
from ties_ray.errors import FRESH_THEN, InputError, Problem
from ties_ray.excluding import COPIES, either, exclusion
from ties_ray.executors import WorkerDied
from ties_ray.inputs.catalog import Model
from ties_ray.inputs.constants import OVERFLOWS
from ties_ray.kernels import BINS, Encoded, Factors, Kernels, Stored, flushes_to_zero
from ties_ray.kernels.buffers import Buffers, zeros
from ties_ray.kernels.lowrank import norm2_of
from ties_ray.layout.footprint import NEEDS, Footprint, Sources
from ties_ray.layout.reads import runs_of
from ties_ray.layout.shards import COUNTS, MODEL_GROUP, Segment, Shard, elements_in
from ties_ray.methods import Context, Threshold
from ties_ray.outputs import CondensingOutput, ElementwiseOutput, Placed
from ties_ray.planning.plan import Plan, PlannedResult, PlannedRound, is_resident, method_round
from ties_ray.rounds.kth_largest import WHOLE, Counts, Pick, Scope, add, pack, pick_high, pick_low
from ties_ray.safetensors import DTYPE_BITS
from ties_ray.state.manifest import Folded, Manifest, Matrix, Record, Seen, Survey, Written
from ties_ray.state.pool_cache import PoolCache, identity
from ties_ray.stores import Stores, join, scheme_of
from ties_ray.tensors import Parameter
from ties_ray.worker.cache import Cache, Shelf
from ties_ray.worker.messages import ANSWER, ORDER, SETUP, Answer, Order, Setup
from ties_ray.worker.read_ahead import Ledger, ReadAhead, Room, Wanted, WriteBehind, dealt
from ties_ray.worker.slices import Slices
from ties_ray.worker.timing import Times

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
RECORD_SHARDS = 256
RECORD_SECONDS = 10.0
"""A record is written after this many shards or seconds, whichever comes first: what a lost worker costs at most."""


class Block(NamedTuple):
    """What is merged at a time: a run of elements of one parameter, its base and the models' slices."""

    parameter: int
    start: int
    stop: int
    base: Tensor
    """1-D fp32, or fp64 where the base is stored in F64; nothing but a length where nobody needs the base."""
    slices: Slices


class Batch:
    """What is finished but not yet in a record; one shard's work joins it whole or, if it fails, not at all."""

    def __init__(self) -> None:
        self.since = time.monotonic()
        self.shards: list[int] = []
        self.parts: list[Written] = []
        self.counts: list[Counts] = []
        self.tables: dict[Scope, Tensor] = {}
        self.statistics: Counter[str] = Counter()
        self.zeroed: Counter[tuple[int, str]] = Counter()
        self.matrices: list[Matrix] = []
        self.surveys: list[Survey] = []

    def table(self, scope: Scope, device: torch.device) -> Tensor:
        """Return the dense counts of a scope (int64, BINS), zero at first."""
        if scope not in self.tables:
            on_gpu = device.type != "cpu"
            self.tables[scope] = torch.zeros(BINS, dtype=torch.int64, device=device) if on_gpu else zeros(BINS)
        return self.tables[scope]

    def harvest(self) -> None:
        """Turn the dense counts into sparse ones."""
        self.counts.extend(filter(None, (pack(scope, table.cpu().numpy()) for scope, table in self.tables.items())))
        self.tables.clear()

    def absorb(self, shard: "Batch") -> None:
        """Add the work of a finished shard."""
        if not self.shards:
            self.since = time.monotonic()
        self.shards += shard.shards
        self.parts += shard.parts
        self.counts += shard.counts
        self.statistics.update(shard.statistics)
        self.zeroed.update(shard.zeroed)
        self.matrices += shard.matrices
        self.surveys += shard.surveys
        for scope, table in shard.tables.items():
            filled = table.nonzero().squeeze(1)  # of bf16 deltas some 1,500: only their pages are touched
            self.table(scope, table.device).index_add_(0, filled, table[filled])

    def record(self, round_: int, uploads: Sequence[str]) -> Record:
        """Return the batch as it is stored; uploads: of each weight file, once they have begun."""
        self.harvest()
        return Record(
            round=round_,
            shards=tuple(self.shards),
            parts=tuple(self.parts),
            uploads=tuple((file, uploads[file]) for file in sorted({part.file for part in self.parts})),
            counts=tuple(self.counts),
            statistics=dict(self.statistics),
            zeroed=tuple((member, name, count) for (member, name), count in self.zeroed.items()),
            matrices=tuple(self.matrices),
            surveys=tuple(self.surveys),
        )


def make_worker(setup: str) -> "Worker":
    """Return the worker of a setup in JSON: the factory that executors are given."""
    return Worker(SETUP.validate_json(setup))


class Worker:
    """Handles orders, one at a time; keeps clients, buffers and counts between them."""

    def __init__(self, setup: Setup, plan: Plan | None = None) -> None:
        """plan: what to do, where that is not what lies in the manifest's folder under the setup's digest."""
        torch.set_num_threads(1)  # one thread a worker: two that spin can be 20 times slower than one
        self._stores = Stores(setup.storage)
        self._manifest = Manifest(self._stores, setup.folder)
        found = plan or self._manifest.read_plan(0, setup.digest)
        if found is None:
            raise InputError(
                Problem(
                    setup.folder,
                    "this worker does not see the output folder",
                    "use a folder that all nodes share, or a bucket",
                )
            )
        self._follow(found)
        self._times = Times(profiled=setup.profiled)
        self._uploads: dict[str, str] = {}
        self._kernels = self._loaded(setup.device)
        folder = found.recipe.run.pool_cache
        self._pool = PoolCache(self._stores, folder) if folder else None
        self._reads = self._reader()
        self._writes = WriteBehind(self._stores, self._times, pinned=self._on_gpu)
        self._bases = Buffers()
        self._known: dict[int, dict[int, Folded]] = {}
        self._picked: dict[tuple[str, int], dict[Scope, Pick]] = {}
        self._scratch: tuple[int, Tensor] | None = None
        self._recalled: frozenset[int] = frozenset()
        self._seen: dict[int, tuple[Seen, ...]] = {}
        self._token = uuid.uuid4().hex[:12]
        self._name = f"{socket.gethostname()} {os.getpid()} {self._token[:4]}" if setup.profiled else ""
        self._num_records = 0
        self._round = 0
        self._batch = Batch()
        self._answer = Answer()
        """Tells of the last record until an answer gets through: the order that wrote it may fail yet."""
        self._bytes_compared = 0
        self._totals = (0, 0, 0, 0, 0, 0)
        self._totals_told: defaultdict[tuple[str, str], float] = defaultdict(float)

    def _reader(self) -> ReadAhead:
        run = self._plan.recipe.run
        shelf = Shelf(self._sources.room_for_slices(), int(run.disk_cache), run.disk_folder)
        cache = Cache(int(run.cache))
        return ReadAhead(
            self._stores,
            self._formats,
            self._times,
            ahead=self._plan.ahead,
            cache=cache,
            shelf=shelf,
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

    def _follow(self, plan: Plan) -> None:
        self._plan = plan
        self._sources = Sources(plan.recipe, plan.catalog, plan.result.models)
        self._models = self._sources.models
        self._formats = self._sources.formats
        self._footprints: dict[tuple[int, tuple[int, ...]], Footprint] = {}

    def run(self, message: str) -> str:
        """Handle an order in JSON and return the answer in JSON."""
        order = ORDER.validate_json(message)
        started = time.monotonic()
        try:
            what = f"{self._result.rounds[order.round].name}: {order.action} {order.index}"
            with self._times.spent("work", what), self._gpu_watched():
                answer = self._handle(order)
        except BaseException:
            self._tell(order, "refused", time.monotonic() - started)
            raise
        metered = self._metered(answer)
        self._measure(metered)
        self._tell(order, "done", time.monotonic() - started)
        return ANSWER.dump_json(metered).decode()

    @contextmanager
    def _gpu_watched(self) -> Iterator[None]:
        """Turn what a GPU fails with into what it means: after most errors its context, and so the process, is lost."""
        try:
            yield
        except torch.cuda.OutOfMemoryError as error:
            what = f"the GPU has too little memory: {str(error).partition('. ')[0]}"
            remedy = "lower run.memory, or have fewer workers share a GPU (run.gpus_per_worker)"
            raise InputError(Problem("run.memory", what, remedy)) from error
        except RuntimeError as error:
            if self._on_gpu and "CUDA" in str(error):
                raise WorkerDied(f"its GPU is of no use any more: {error}") from error
            raise

    def _handle(self, order: Order) -> Answer:
        if order.action in ("shard", "fold") and order.revision != self._plan.revision:
            found = self._manifest.read_plan(order.revision, order.digest)
            if found is None:
                raise InputError(Problem(self._manifest.folder, "the stored plan has gone", "run the command again"))
            self._follow(found)
        if order.action == "hello":
            self._check_sight()
        elif order.action == "fold":
            self._fold(order)
        elif order.action == "flush":
            try:
                self._flush()
            except BaseException:
                self._batch = Batch()  # who asked takes it for lost, and has it done again
                raise
        else:
            if self._is_full() or self._is_of_another_kind(order):
                self._flush()  # if this fails the batch stays, and only the shard is tried again
            if self._result.rounds[order.round].block != self._result.rounds[self._round].block:
                self._reads.forget()  # a buffer is as large as the largest block that was asked for
                self._bases.forget()
            self._round = order.round
            self._recalled = frozenset(order.known)
            self._shard(order)
        answer, self._answer = self._answer, Answer()
        return answer

    # -- for whoever watches

    def totals(self) -> Mapping[tuple[str, str], float]:
        """Return what was counted so far, by metric (`orders.METRICS`) and label."""
        return self._totals_told

    def _measure(self, answer: Answer) -> None:
        told = self._totals_told
        told["bytes_read", ""] += answer.bytes_read
        told["bytes_written", ""] += answer.bytes_written
        told["requests", ""] += answer.requests
        told["retries", ""] += answer.retries
        read, write = answer.seconds["wait_read"], answer.seconds["wait_write"]
        told["seconds", "read"] += read
        told["seconds", "write"] += write
        told["seconds", "merge"] += max(0.0, answer.seconds["work"] - read - write)

    def _tell(self, order: Order, outcome: str, seconds: float) -> None:
        """Count a shard, and write a line about the order where the recipe asks for a log."""
        if order.action == "shard":
            self._totals_told["shards", outcome] += 1
        if self._plan.recipe.run.log == "json":
            line = {
                "time": round(time.time(), 3), "run_id": self._plan.run_id, "process": os.getpid(),
                "action": order.action, "round": self._result.rounds[order.round].name, "shard": order.index,
                "outcome": outcome, "seconds": round(seconds, 3),
            }  # fmt: skip
            print(json.dumps(line), file=sys.stderr, flush=True)

    # -- what a barrier knows

    def _folded(self, round_: int, groups: Iterable[int]) -> dict[int, Folded]:
        known = self._known.setdefault(round_, {})
        missing = [group for group in groups if group not in known]
        if missing:
            known.update(self._manifest.read_folded(round_, self._plan, missing))
        gone = [group for group in missing if group not in known]
        if gone:  # without thresholds everything would be kept, and nobody would see it
            what = f"what the barrier after round {round_} stored of group {gone[0]} has gone"
            raise InputError(Problem(self._manifest.folder, what, "merge again with --fresh"))
        return known

    def _groups(self) -> range:
        return range(-(-len(self._models) // MODEL_GROUP))

    def _picks(self, kind: str, group: int) -> dict[Scope, Pick]:
        """Return the picks of a group that the round of this kind led to."""
        if (kind, group) not in self._picked:
            rounds = [index for index, round_ in enumerate(self._result.rounds) if round_.kind == kind]
            picks = [pick for index in rounds for pick in self._folded(index, [group])[group].picks]
            self._picked[kind, group] = {(pick.member, pick.parameter): pick for pick in picks}
        return self._picked[kind, group]

    def _statistics(self) -> dict[str, int]:
        """Return what the method's own rounds have gathered."""
        return {
            name: value
            for index, round_ in enumerate(self._result.rounds[: self._round])
            if round_.kind == "gather"
            for name, value in self._folded(index, [0])[0].statistics.items()
        }

    def _need(self) -> Threshold:
        need = self._plan.recipe.method.needs(self._result.members)
        assert need, "only a threshold has counting rounds"
        return need

    @property
    def _first_round(self) -> int:
        """The round that keeps the checksums of what it reads; a survey reads factors alone, each model by itself."""
        return 1 if self._result.rounds[0].kind == "survey" else 0

    @property
    def _result(self) -> PlannedResult:
        return self._plan.result

    # -- orders

    def _check_sight(self) -> None:
        """Show that this worker computes as the arithmetic says, and that its node sees the local inputs as planned."""
        if flushes_to_zero():
            raise InputError(
                Problem(
                    "this worker's CPU",
                    "flushes denormal numbers to zero, which changes results",
                    "unset what asks for it (DAZ/FTZ)",
                )
            )
        for model in (self._plan.catalog.base, *self._models):
            for pin in model.objects[:1]:
                if scheme_of(pin.uri) == "local":
                    self._stores.of(pin.uri).read(pin, 0, memoryview(bytearray(8)))

    def _shard(self, order: Order) -> None:
        if self._result.rounds[order.round].kind == "merge":
            self._learn_of_uploads()
        round_ = self._result.rounds[order.round]
        shard = self._plan.layout.shard(round_.kind, order.index, len(self._models))
        work = {
            "survey": self._survey,
            "gather": self._gather,
            "condense": self._condense,
            "merge": self._merge,
        }.get(round_.kind, self._count)
        done = Batch()
        first = order.round == self._first_round and len(self._result.rounds) > order.round + 1
        known = self._manifest.read_seen(order.index) if first else self._seen_before(shard)
        self._reads.ledger = Ledger(known, keeps=first or round_.passes > 1)
        self._reads.keeps = any(later.bytes_again for later in self._result.rounds[order.round + 1 :])
        try:
            work(round_, shard, done)
        except BaseException:
            self._writes.abandon()
            raise
        if first and self._reads.ledger.new:
            self._manifest.write_seen(order.index, (*known, *self._reads.ledger.new))
        self._bytes_compared += self._reads.ledger.compared
        done.shards.append(order.index)
        self._batch.absorb(done)

    def _learn_of_uploads(self) -> None:
        """Read the ids of the uploads, which begin just before the round that writes."""
        if not self._uploads:
            self._uploads = self._manifest.read_uploads()

    def _seen_before(self, shard: Shard) -> tuple[Seen, ...]:
        """Return what the first round has read of what a shard of a later one reads."""
        if self._round <= self._first_round:
            return ()
        layout, first = self._plan.layout, self._result.rounds[self._first_round]
        counting = first.kind in COUNTS
        groups = range(shard.models[0] // MODEL_GROUP, -(-shard.models[1] // MODEL_GROUP)) if counting else (0,)
        ranges = layout.ranges_over(layout.segments(shard))
        wanted = [group * layout.num_ranges + one for group in groups for one in sorted(ranges)]
        missing = [index for index in wanted if index not in self._seen]
        found = dict(zip(missing, self._reads.each(self._manifest.read_seen, missing), strict=True))
        self._seen = {index: found[index] if index in found else self._seen[index] for index in wanted}
        return tuple(itertools.chain.from_iterable(self._seen.values()))

    def _fold(self, order: Order) -> None:
        """Add up the counts of a group of models, and store where their thresholds lie."""
        round_ = self._result.rounds[order.round]
        records = self._manifest.read_records(order.round, self._plan, order.records)
        if round_.kind == "gather":
            totals: dict[str, int] = defaultdict(int)
            for record in records:
                for name, value in record.statistics.items():
                    totals[name] += value
            folded = Folded(statistics=dict(totals))
        elif round_.kind == "survey":
            folded = Folded(surveys=tuple(sorted(one for record in records for one in record.surveys)))
        elif round_.kind == "condense":
            everything = list(records)
            matrices = sorted((one for record in everything for one in record.matrices), key=lambda one: one.parameter)
            zeroed = tuple(one for record in everything for one in record.zeroed)
            folded = Folded(matrices=tuple(matrices), zeroed=zeroed)
        else:
            counts = (count for record in records for count in record.counts)
            try:
                folded = Folded(picks=tuple(self._pick(round_, order.index, counts, frozenset(order.known))))
            except InputError:
                raise
            except ValueError as error:
                what = f"the counts of a record are not what a worker writes: {error}"
                raise InputError(Problem(self._manifest.folder, what, "merge again with --fresh")) from error
        self._manifest.write_folded(order.round, order.index, folded)

    def recounted(self, member: int) -> list[Pick]:
        """Return where the thresholds of a member lie, counted from its values alone; writes nothing.

        For `verify --recount`. Raises what a merge raises, also where inputs are no longer those that were planned.
        """
        layout, group = self._plan.layout, member // MODEL_GROUP
        self._recalled = frozenset(range(len(self._models))) - {member}
        picks: list[Pick] = []
        for index, round_ in enumerate(self._result.rounds):
            if round_.kind in COUNTS:
                self._round, done = index, Batch()
                for position in range(layout.num_ranges):
                    number = group * layout.num_ranges + position
                    self._reads.ledger = Ledger(())
                    self._count(round_, layout.shard(round_.kind, number, len(self._models)), done)
                done.harvest()
                picks = list(self._pick(round_, group, done.counts, frozenset()))
                self._picked[round_.kind, group] = {(pick.member, pick.parameter): pick for pick in picks}
        return [pick for pick in picks if pick.member == member]

    def _summed(self, counts: Iterable[Counts]) -> Callable[[Scope], dict[Scope, NDArray[np.int64]]]:
        """Return what gives the table of a scope, if anything was counted there."""
        if self._need().scope == "global":  # a table a model of the group, whatever the number of records
            sums = add(counts)
            return lambda scope: {scope: sums[scope]} if scope in sums else {}
        by_scope: dict[Scope, list[Counts]] = defaultdict(list)
        for count in counts:
            by_scope[count.member, count.parameter].append(count)
        return lambda scope: add(by_scope[scope])

    def _pick(
        self, round_: PlannedRound, group: int, counts: Iterable[Counts], known: frozenset[int]
    ) -> Iterator[Pick]:
        need = self._need()
        tables = self._summed(counts)
        members = range(group * MODEL_GROUP, min((group + 1) * MODEL_GROUP, len(self._models)))
        parameters = self._plan.catalog.parameters
        merged = [index for index, parameter in enumerate(parameters) if parameter.merged]
        first = self._picks("count_high", group) if round_.kind == "count_low" else {}
        scopes = [
            (member, index)
            for member in members
            if need.densities[member] < 1
            for index in ([WHOLE] if need.scope == "global" else merged)
            if index == WHOLE or self._stands_for(member, parameters[index])
        ]
        for scope in scopes:
            table = tables(scope)
            if scope[1] == WHOLE and scope[0] not in known and table:
                self._remember(f"low-{first[scope].high}" if first else "high", pack(scope, table[scope]))
            if round_.kind == "count_high":
                size = self._result.sizes[scope[0]] if scope[1] == WHOLE else parameters[scope[1]].numel
                yield from pick_high(need, {scope[1]: size}, [scope], table)
            else:
                yield from pick_low([first[scope]], table)

    def _remember(self, what: str, counts: Counts | None) -> None:
        """Leave what was found of a model in the pool cache, if the recipe names one."""
        name = self._identity(self._models[counts.member]) if counts else None
        if self._pool and name and counts:
            self._pool.write(name, what, counts)

    def _identity(self, model: Model) -> str | None:
        """Return what names a model in the pool cache, if the recipe names one."""
        return identity(model, self._formats[model.format], self._plan.arithmetic) if self._pool else None

    def _stands_for(self, member: int, parameter: Parameter) -> bool:
        """Return whether a parameter belongs to a member's task vector, if only as zeros."""
        model = self._models[member]
        return self._formats[model.format].whole or parameter.name in model.sources

    # -- shards

    def _blocks(
        self, round_: PlannedRound, segments: Iterable[Segment], members: Sequence[int], done: Batch
    ) -> Generator[Block, None, None]:
        """Yield the blocks of some segments with the slices of some members; each is gone when the next comes."""
        resident = is_resident(self._plan.recipe, round_)
        parameters, segments = self._plan.catalog.parameters, list(segments)
        alone, widest = self._sources.alone, max(self._sources.widths)
        runs = list(runs_of(segments, round_.block, round_.run, lambda one: parameters[one].name not in alone))
        together = self._kept_together(segments if round_.run else (), members)
        wanted = itertools.chain.from_iterable(self._wanted(round_, run, members, together) for run in runs)
        room = Room(round_.run * widest, self._sources.filled(round_.block) * widest)
        with closing(self._reads.stream(wanted, room, self._kernels.take)) as stream:
            blocks = (block for run in runs for block in zip(run, dealt(stream, len(run)), strict=True))
            for block, coming in blocks:
                parameter, start, stop = block
                group = self._sources.together(self._footprint(parameter, members))
                begin, end = self._base_range(round_, block, members)
                rows = self._decoded(next(coming), parameters[parameter], stop - start)
                base = rows[start - begin : stop - begin] if begin < end else rows
                slices = Slices(
                    self._kernels, base, start, len(members), map(partial(self._completed, rows, base), coming),
                    passes=round_.passes, resident=resident, together=group,
                )  # fmt: skip
                yield Block(parameter, start, stop, base, slices)
                slices.close()
                self._judge(slices.not_finite, members, parameter, done)

    def _kept_together(self, segments: Iterable[Segment], members: Sequence[int]) -> dict[str, list[Parameter]]:
        """Return, for each parameter with factors, those whose factors are read with its own where they are kept."""
        models, parameters = [self._models[member] for member in members], self._plan.catalog.parameters
        found = dict.fromkeys(parameters[segment.parameter] for segment in segments)
        factored = (one for one in found if one.name in self._sources.factored)
        return {one.name: some for some in self._sources.kept_together(factored, models) for one in some}

    def _base_range(self, round_: PlannedRound, block: Segment, members: Sequence[int]) -> tuple[int, int]:
        """Return which of the base's elements a block needs: none, its own, or the rows that it touches whole."""
        index, start, stop = block
        parameter = self._plan.catalog.parameters[index]
        own = "slice" if round_.kind == "merge" and self._plan.recipe.output.reads_base else "nothing"
        need = max(own, self._footprint(index, members).base, key=NEEDS.index)
        if need == "rows":
            width = parameter.numel // parameter.shape[0]
            return start - start % width, stop + -stop % width
        return (start, stop) if need == "slice" else (start, start)

    def _footprint(self, index: int, members: Sequence[int]) -> Footprint:
        """Return what some members store for a parameter; asked for every block of it."""
        key = index, tuple(members)
        if key not in self._footprints:
            models = [self._models[member] for member in members]
            self._footprints[key] = self._sources.footprint(self._plan.catalog.parameters[index], models)
        return self._footprints[key]

    def _completed(self, rows: Tensor, base: Tensor, stored: Stored | None) -> Stored | None:
        """Return a slice with all that its change needs: of DoRA the scales of its rows, of rows that the model lacks
        the base's values."""
        if isinstance(stored, Encoded) and len(stored.data) < len(base):
            dtype = torch.promote_types(stored.data.dtype, base.dtype)
            return Encoded(torch.cat((stored.data.to(dtype), base[len(stored.data) :].to(dtype))))
        if isinstance(stored, Factors) and stored.magnitude is not None:
            return stored._replace(scales=self._kernels.row_scales(stored, rows))
        return stored

    def _decoded(self, encoded: Stored | None, parameter: Parameter, length: int) -> Tensor:
        """Return a slice of the base as fp32, or fp64 where it is stored in F64; refuse what is not finite."""
        if encoded is None:
            return torch.zeros(1, device=self._kernels.device).expand(length)  # a base that nobody reads
        assert isinstance(encoded, Encoded), "a base is stored whole"
        dtype = torch.float64 if encoded.data.dtype == torch.float64 else torch.float32
        size, device = len(encoded.data), self._kernels.device
        decoded = torch.empty(size, dtype=dtype, device=device) if self._on_gpu else self._bases.empty(size, dtype)
        count = self._kernels.decode(encoded.data, decoded)
        if count:
            where = f"{self._plan.catalog.base.uri}: {parameter.name}"
            remedy = f"repair the base, or {self._excluding(parameter.name)}; {FRESH_THEN}"
            raise InputError(Problem(where, f"the base holds {count} values that are NaN or Inf", remedy))
        return decoded

    def _wanted(
        self,
        round_: PlannedRound,
        run: Sequence[Segment],
        members: Sequence[int],
        together: Mapping[str, Sequence[Parameter]],
    ) -> Iterator[list[Wanted | None]]:
        """Yield what is read for a run of blocks: of the base, then of each model."""
        yield [self._of_base(round_, block, members) for block in run]
        for _ in range(round_.passes):
            for model in (self._models[member] for member in members):
                yield [self._of_model(model, block, members, together) for block in run]

    def _of_base(self, round_: PlannedRound, block: Segment, members: Sequence[int]) -> Wanted | None:
        name, base = self._plan.catalog.parameters[block.parameter].name, self._plan.catalog.base
        begin, end = self._base_range(round_, block, members)
        return Wanted(base, base.sources[name], begin, end) if begin < end else None

    def _of_model(
        self, model: Model, block: Segment, members: Sequence[int], together: Mapping[str, Sequence[Parameter]]
    ) -> Wanted | None:
        parameter = self._plan.catalog.parameters[block.parameter]
        source = model.sources.get(parameter.name)
        if source is None:
            return None
        kept = self._sources.kept(self._footprint(block.parameter, members))
        factors = self._sources.factors(model, together.get(parameter.name, [parameter]))
        return Wanted(model, source, block.start, block.stop, kept, factors)

    def _count(self, round_: PlannedRound, shard: Shard, done: Batch) -> None:
        counted = self._counted(round_, shard)
        for members, segments in itertools.groupby(shard.segments, lambda segment: counted(segment.parameter)):
            if members:  # else the base is not read either, as the plan says
                self._count_some(round_, list(segments), members, done)

    def _counted(self, round_: PlannedRound, shard: Shard) -> Callable[[int], tuple[int, ...]]:
        """Return what tells of a parameter which members are counted there: those with a threshold yet to be found."""
        need, group = self._need(), shard.models[0] // MODEL_GROUP
        picks = self._picks("count_high", group) if round_.kind == "count_low" else None

        def is_open(member: int, parameter: int) -> bool:
            if need.densities[member] == 1 or member in self._recalled:
                return False
            index = WHOLE if need.scope == "global" else parameter
            return picks is None or not picks.get((member, index), _NO_PICK).settled

        return lambda parameter: tuple(member for member in range(*shard.models) if is_open(member, parameter))

    def _count_some(
        self, round_: PlannedRound, segments: Sequence[Segment], members: Sequence[int], done: Batch
    ) -> None:
        need = self._need()
        picks = self._picks("count_high", members[0] // MODEL_GROUP) if round_.kind == "count_low" else {}
        counted = WHOLE
        with closing(self._blocks(round_, segments, members, done)) as blocks:
            for block in blocks:
                if need.scope == "tensor" and block.parameter != counted:
                    done.harvest()
                    counted = block.parameter
                for position, encoded in block.slices.models():
                    if encoded is None:
                        continue  # a delta of zero lies in the lowest bin, and ranks count from the top
                    scope = (members[position], counted)
                    table = done.table(scope, self._kernels.device)
                    if scope in picks:
                        bad = self._kernels.count_low(encoded, block.base, picks[scope].high, table)
                    else:
                        bad = self._kernels.count_high(encoded, block.base, table)
                    block.slices.not_finite[position] += bad

    def _survey(self, round_: PlannedRound, shard: Shard, done: Batch) -> None:
        """Look at all factors of one model."""
        (member,) = range(*shard.models)
        model = self._models[member]
        numels = {parameter.name: parameter.numel for parameter in self._plan.catalog.parameters if parameter.merged}
        wanted = [
            [Wanted(model, source, 0, numels[name])]
            for name, source in model.sources.items()
            if name in numels and source.encoding == "factors"
        ]
        norm2, not_finite = 0.0, 0
        with closing(self._reads.stream(wanted)) as coming:
            for (one,) in coming:
                if isinstance(one, Factors):
                    norm2 += norm2_of(one)
                    stored = [each for each in (one.left, one.right, one.magnitude) if each is not None]
                    not_finite += sum(int((~each.isfinite()).sum()) for each in stored)
        found = Survey(member, norm2 if math.isfinite(norm2) else 0.0, not_finite)
        done.surveys.append(found)
        name = self._identity(model)
        if self._pool and name:
            self._pool.write(name, "survey", found)

    def _gather(self, round_: PlannedRound, shard: Shard, done: Batch) -> None:
        own = method_round(self._plan.recipe, round_)
        with closing(self._blocks(round_, shard.segments, range(*shard.models), done)) as blocks:
            for block in blocks:
                done.statistics.update(own.run(block.slices, self._context(block)).statistics)

    def _merge(self, round_: PlannedRound, shard: Shard, done: Batch) -> None:
        layout = self._plan.layout
        file = self._result.files[shard.file]
        uri = join(self._plan.output, file.name)
        header = len(file.header).to_bytes(8, "little") + file.header.encode("ascii")
        parts = {number: list(elements_in(layout, shard.file, number)) for number in range(*shard.parts)}
        with closing(self._blocks(round_, layout.segments(shard), range(*shard.models), done)) as blocks:
            for number, pieces in parts.items():
                start, stop = layout.part(shard.file, number)
                part = self._writes.buffer(stop - start)
                head = header[start:stop]
                part.numpy()[: len(head)] = np.frombuffer(head, np.uint8)
                for placed, first, last in pieces:
                    begin, size = placed.start - start, DTYPE_BITS[placed.tensor.dtype] // 8
                    self._fill(blocks, placed, first, last, part[begin + first * size : begin + last * size])
                self._writes.write(part, shard.file, uri, self._uploads[file.name], number + 1, start)
            next(blocks, None)  # a block is judged when the next is asked for
        done.parts += self._writes.drain()

    def merged(self, placed: Placed, runs: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
        """Yield the bytes (1-D uint8) of runs of elements of a tensor, as the last round writes them; writes nothing.

        For `verify --sample`. Raises what a merge raises, also where inputs are no longer those that were planned.
        """
        self._round = len(self._result.rounds) - 1
        round_, everyone = self._result.rounds[-1], range(len(self._models))
        parameter = self._plan.layout.by_name[placed.tensor.parameter]
        merged = placed.tensor.origin == "merged"
        segments = [Segment(parameter, first, last) for first, last in runs] if merged else []
        shard = Shard(models=(0, len(everyone)), segments=tuple(segments))
        self._reads.ledger = Ledger(self._seen_before(shard) if segments else ())
        with closing(self._blocks(round_, segments, everyone, Batch())) as blocks:
            for first, last in runs:
                out = torch.empty((last - first) * DTYPE_BITS[placed.tensor.dtype] // 8, dtype=torch.uint8)
                self._fill(blocks, placed, first, last, out)
                yield out
            next(blocks, None)  # a block is judged when the next is asked for

    def _fill(self, blocks: Iterator[Block], placed: Placed, first: int, last: int, out: Tensor) -> None:
        """Write elements [first, last) of a tensor into its bytes of a part."""
        if placed.tensor.origin == "scratch":
            values = self._assembled(placed)[first:last]
            out.copy_(values.view(torch.uint8))
            return
        if placed.tensor.origin == "base":
            base = self._plan.catalog.base
            source = base.sources[placed.tensor.parameter]
            for read in self._formats[base.format].reads(source, first, last):  # none where there are no elements
                self._reads.read(base.objects[read.object], read.start, out)
            return
        values = out.view(TORCH_DTYPES[placed.tensor.dtype])
        while first < last:
            block = next(blocks)
            length = block.stop - block.start
            self._merge_block(block, placed, values[:length])
            values = values[length:]
            first += length

    def _merged(self, block: Block) -> Tensor:
        """Return the merged delta of a block."""
        own = method_round(self._plan.recipe, self._result.rounds[-1])
        merged = own.run(block.slices, self._context(block)).merged
        if merged is None or merged.dtype != torch.float32 or merged.shape != block.base.shape:
            raise TypeError(f"method {self._plan.recipe.method.name}: the last round owes the merged delta, fp32, 1-D")
        return merged

    def _merge_block(self, block: Block, placed: Placed, out: Tensor) -> None:
        merged = self._merged(block)
        output = self._plan.recipe.output
        assert isinstance(output, ElementwiseOutput)
        overflow = output.values(block.base, merged, out, self._kernels)
        if overflow:
            what = f"{overflow} merged values are finite but overflow {placed.tensor.dtype}"
            of_base = int((block.base.abs() >= OVERFLOWS.get(placed.tensor.dtype, math.inf)).sum())
            wider = "choose a wider output.dtype" if placed.tensor.dtype != "F64" else ""
            smaller = "" if of_base else self._smaller()
            if of_base and output.reads_base:
                what += f", as {of_base} of the base's do"
            advice = (wider, smaller, self._excluding(placed.tensor.parameter))
            raise InputError(Problem(placed.tensor.name, what, f"{either(advice)}; {FRESH_THEN}"))

    def _smaller(self) -> str:
        """Return the remedy of a smaller lambda, where the method has one."""
        return "choose a smaller method.lambda" if hasattr(self._plan.recipe.method, "lambda_") else ""

    def _excluding(self, name: str) -> str:
        """Return the remedy of copying a parameter from the base."""
        return exclusion([name], (one.name for one in self._plan.catalog.parameters), COPIES)

    # -- matrices

    def _condense(self, round_: PlannedRound, shard: Shard, done: Batch) -> None:
        """Merge one matrix and put its best factors into scratch."""
        (segment,) = shard.segments
        parameter = self._plan.catalog.parameters[segment.parameter]
        output = self._plan.recipe.output
        assert isinstance(output, CondensingOutput)
        factors = self._factors(parameter)
        if factors:
            condensed = output.combine(parameter, factors)
        else:
            matrix = torch.empty(parameter.numel)
            with closing(self._blocks(round_, shard.segments, range(*shard.models), done)) as blocks:
                for block in blocks:
                    matrix[block.start : block.stop] = self._merged(block)
            if not matrix.isfinite().all():
                what = f"{int((~matrix.isfinite()).sum())} merged values are not finite"
                remedy = f"{either((self._smaller(), self._excluding(parameter.name)))}; {FRESH_THEN}"
                raise InputError(Problem(parameter.name, what, remedy))
            condensed = output.condense(parameter, matrix.view(parameter.shape))
        crc = self._manifest.write_scratch(segment.parameter, condensed.data.view(torch.uint8).numpy().data)
        errors2 = dict(zip(output.ranks, condensed.errors2, strict=True))
        done.matrices.append(Matrix(segment.parameter, crc, condensed.norm2, errors2))

    def _factors(self, parameter: Parameter) -> list[tuple[float, Factors]]:
        """Return (coefficient, factors of the whole change) of each model where a merge needs no more, else none."""
        if not self._sources.rank_sum(self._plan.recipe, self._result.members, parameter):
            return []
        found = [model.sources.get(parameter.name) for model in self._models]
        coefficients = self._plan.recipe.method.coefficients(self._result.members, [one is not None for one in found])
        wanted = [
            [Wanted(model, source, 0, parameter.numel) if source else None]
            for model, source in zip(self._models, found, strict=True)
        ]
        with closing(self._reads.stream(wanted)) as coming:
            factors = [
                (coefficient, one)
                for coefficient, (one,) in zip(coefficients or (), coming, strict=True)
                if isinstance(one, Factors)
            ]
        finite = all(bool(one.left.isfinite().all() and one.right.isfinite().all()) for _, one in factors)
        return factors if finite else []  # else the blocks are merged, and say what is wrong, and where

    def _assembled(self, placed: Placed) -> Tensor:
        """Return the elements of a tensor that comes from scratch."""
        layout, last = self._plan.layout, len(self._result.rounds) - 1
        index = layout.by_name[placed.tensor.parameter]
        if self._scratch is None or self._scratch[0] != index:
            matrices = {matrix.parameter: matrix for matrix in self._folded(last - 1, [0])[0].matrices}
            data = bytearray(self._manifest.read_scratch(matrices[index]))
            self._scratch = index, torch.frombuffer(data, dtype=torch.float32)
        parameter = self._plan.catalog.parameters[index]
        output = self._plan.recipe.output
        assert isinstance(output, CondensingOutput)
        return output.assemble(placed.tensor, parameter, self._scratch[1])

    def _context(self, block: Block) -> Context:
        parameter = self._plan.catalog.parameters[block.parameter]
        picks = [self._picks("count_low", member // MODEL_GROUP) for member in range(len(self._models))]
        return Context(
            parameter=parameter,
            start=block.start,
            stop=block.stop,
            members=self._result.members,
            present=tuple(parameter.name in model.sources for model in self._models),
            thresholds=tuple(
                (own.get((member, WHOLE)) or own.get((member, block.parameter)) or _NO_PICK).bits
                for member, own in enumerate(picks)
            ),
            statistics=self._statistics(),
            kernels=self._kernels,
        )

    # -- what is not finite

    def _judge(self, counts: Sequence[int], members: Sequence[int], parameter: int, done: Batch) -> None:
        """Refuse values that are not finite, with the count over the whole parameter, or note what was zeroed."""
        for member, count in zip(members, counts, strict=True):
            if count and self._plan.recipe.allow.nan != "zero":
                model, known = self._models[member], self._plan.catalog.parameters[parameter]
                total = self._count_not_finite(member, parameter)
                raise InputError(Problem(
                    f"model {model.id} ({model.uri}): {known.name}", f"{total} values are NaN or Inf",
                    "repair or drop the model, or `allow: {nan: zero}` (their change is zero), or"
                    f" {self._excluding(known.name)}; {FRESH_THEN}",
                ))  # fmt: skip
            if count:
                done.zeroed[member, self._plan.catalog.parameters[parameter].name] += count

    def _count_not_finite(self, member: int, parameter: int) -> int:
        known = self._plan.catalog.parameters[parameter]
        segments = [Segment(parameter, 0, known.numel)]
        total = 0
        with closing(self._blocks(self._result.rounds[-1], segments, [member], Batch())) as blocks:
            for block in blocks:
                for _, stored in block.slices.models():
                    if stored:
                        out = torch.empty(len(block.base), device=self._kernels.device)
                        total += self._kernels.delta(stored, block.base, out)
        return total

    # -- records

    def _is_full(self) -> bool:
        batch = self._batch
        return len(batch.shards) >= RECORD_SHARDS or time.monotonic() - batch.since >= RECORD_SECONDS

    def _is_of_another_kind(self, order: Order) -> bool:
        """Return whether a shard can't share a record with the batch: another round, or other models are counted."""
        return bool(self._batch.shards) and self._kind_of(self._round, self._batch.shards[0]) != self._kind_of(
            order.round, order.index
        )

    def _kind_of(self, round_: int, shard: int) -> tuple[int, int]:
        """Return what all shards of a record share: the round and, where it counts, the group of models."""
        counting = self._result.rounds[round_].kind in COUNTS
        return round_, shard // self._plan.layout.num_ranges if counting else 0

    def _flush(self) -> None:
        """Write what is done into a record; keep it if that fails."""
        batch = self._batch
        if not batch.shards:
            return
        name = f"{batch.shards[0]:08d}-{self._token}-{self._num_records:06d}.json"
        self._num_records += 1
        uploads = [self._uploads.get(file.name, "") for file in self._result.files]
        self._manifest.write_record(name, batch.record(self._round, uploads))
        self._answer = Answer(record=name, round=self._round, shards=tuple(batch.shards))
        self._batch = Batch()

    def _metered(self, answer: Answer) -> Answer:
        meters = [store.meter for store in self._stores.opened()]
        totals = (
            self._reads.bytes_read,
            sum(meter.bytes_written for meter in meters),
            self._reads.requests,
            self._reads.bytes_kept,
            self._bytes_compared,
            sum(meter.retries for meter in meters),
        )
        seconds, spans = self._times.take()
        since = [now - then for now, then in zip(totals, self._totals, strict=True)]
        self._totals = totals
        return replace(
            answer,
            bytes_read=since[0],
            bytes_written=since[1],
            requests=since[2],
            bytes_kept=since[3],
            bytes_compared=since[4],
            retries=since[5],
            seconds=seconds,
            worker=self._name,
            spans=spans,
        )


_NO_PICK = Pick(member=0, parameter=WHOLE, bin=-1, rank=0, kept_above=0)
