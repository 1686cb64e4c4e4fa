"""What many workers cost the driver, and how well its schedule uses them: the real stage, executor and clock simulated.

    python -m benchmarks.scale [--shards 100000] [--workers 512]

The first table is the driver's CPU a shard (and its memory), less what the simulation itself takes: of one round, and
of all that `drive.py` does in the rounds of a merge. The second is the
schedule's: utilisation is the time that workers spent on what counted, of all their time until the end of the round;
`ideal` is the makespan over that of perfectly divided work on the same workers, none of them lost.
"""

import gc
import heapq
import itertools
import math
import random
import time
import tracemalloc
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import click

from benchmarks import measure
from benchmarks.planning import large_catalog
from ties_ray.driver.crew import DEPTH, Crew
from ties_ray.driver.dispatch import Stage
from ties_ray.driver.meters import Meters
from ties_ray.driver.places import Places
from ties_ray.driver.run import MergeRun
from ties_ray.driver.schedule import Schedule
from ties_ray.executors import Answered, Event, Executor, Lost, Needs, Ready
from ties_ray.layout.sizes import SIZES
from ties_ray.planning.plan import Plan
from ties_ray.planning.planner import make_plan
from ties_ray.recipe.parse import validate
from ties_ray.rounds import Folded, Merge, Record
from ties_ray.rounds.merge import Parts, Written
from ties_ray.state.manifest import Manifest
from ties_ray.stores import Part, Stores
from ties_ray.worker.batch import RECORD_SECONDS
from ties_ray.worker.messages import ANSWER, ORDER, Answer, Order, Traffic


class World(NamedTuple):
    """What workers are like; times in seconds."""

    workers: int = 512
    shards: int = 20_000
    median: float = 4.0
    """Of a shard on a usual worker..."""
    sigma: float = 0.3
    """...and the deviation of the logarithm."""
    slow: int = 0
    """Workers that take five times as long."""
    hang: int = 0
    """Workers that never end one of their first ten shards."""
    heavy: int = -1
    """A shard that takes a hundred times as long, whoever does it."""
    lost_after: float = 0.0
    """Mean time until a worker dies; 0: never."""
    back_after: float = 30.0
    record: float = 0.1
    """What writing a record takes."""
    repeats: bool = True
    """As in the merge; in counting rounds the worker of a shard that hangs is given up instead."""
    patience: float = 1800.0


@dataclass
class _Worker:
    speed: float
    dies: float
    hangs_at: int
    queue: deque[tuple[int, Order]] = field(default_factory=deque)
    life: int = 0
    """Raised with every loss, so that what the former worker would have told is not told."""
    busy: bool = False
    away: bool = False
    batch: dict[int, float] = field(default_factory=dict)
    """Seconds that each finished shard took, until they are in a record."""
    since: float = 0.0
    done: int = 0


class Simulated(Executor):
    """Workers in virtual time: a shard takes a random time, a record is written as `work.py` does it."""

    name = "simulated"

    def __init__(self, world: World, seed: int, *, folds: tuple[Manifest, Plan] | None = None) -> None:
        """folds: where folds store that every threshold is settled, for merges of whole rounds."""
        self._folds = folds
        self.now = 0.0
        self.cpu = 0.0
        """Seconds that this simulation took itself."""
        self.records: dict[str, dict[int, float]] = {}
        """Of every record that was written, the seconds of each shard."""
        self._world = world
        self._random = random.Random(seed)
        self._coming: list[tuple[float, int, int, int, Event | None]] = []
        """What happens: (time, order, worker, its life, event or None for the worker's death)."""
        self._number = itertools.count()
        self.workers = [self._born(worker) for worker in range(world.workers)]

    def _born(self, worker: int) -> _Worker:
        world, draw = self._world, self._random
        dies = self.now + draw.expovariate(1 / world.lost_after) if world.lost_after else 0.0
        slow = worker < world.slow
        hangs_at = draw.randrange(10) if world.slow <= worker < world.slow + world.hang else -1
        return _Worker(5.0 if slow else 1.0, dies, hangs_at)

    def start(self, factory: str, setup: str, needs: Needs) -> int:
        """Say how many there are, and let the first ones live until they die."""
        for number, worker in enumerate(self.workers):
            self._live(number, worker)
        return len(self.workers)

    def _live(self, number: int, worker: _Worker) -> None:
        if worker.dies:
            self._at(worker.dies, number, None)

    def submit(self, worker: int, ticket: int, message: str) -> None:
        """Put an order into a worker's queue."""
        began = time.process_time()
        one = self.workers[worker]
        if not one.away:
            one.queue.append((ticket, ORDER.validate_json(message)))
            self._go_on(worker)
        self.cpu += time.process_time() - began

    def wait(self, timeout: float) -> list[Event]:
        """Go to the next event, or by `timeout`."""
        began = time.process_time()
        end, told = self.now + timeout, list[Event]()
        while not told and self._coming and self._coming[0][0] <= end:
            self.now, _, worker, life, event = heapq.heappop(self._coming)
            told += self._happen(worker, life, event)
        self.now = self.now if told else end
        self.cpu += time.process_time() - began
        return told

    def give_up(self, worker: int) -> None:
        """Forget a worker."""
        self._forget(worker)

    def revive(self, worker: int) -> None:
        """Have it back after a while."""
        self._at(self.now + self._world.back_after, worker, Ready(worker))

    def stop(self) -> None:
        """Nothing is left to end."""

    def _at(self, when: float, worker: int, event: Event | None) -> None:
        heapq.heappush(self._coming, (when, next(self._number), worker, self.workers[worker].life, event))

    def _happen(self, worker: int, life: int, event: Event | None) -> Iterator[Event]:
        one = self.workers[worker]
        if life != one.life:
            return
        if event is None:
            oldest = one.queue[0][0] if one.queue else None
            self._forget(worker)
            yield Lost(worker, oldest, "preempted")
        elif isinstance(event, Ready):
            one.away, one.dies = False, self._born(worker).dies
            self._live(worker, one)
            yield event
        else:
            one.queue.popleft()
            one.busy = False
            self._go_on(worker)
            yield event

    def _forget(self, worker: int) -> None:
        one = self.workers[worker]
        one.life, one.away, one.busy, one.hangs_at = one.life + 1, True, False, -1
        one.queue.clear()
        one.batch.clear()

    def _go_on(self, worker: int) -> None:
        """Begin with the next order, if the worker is free; what it will answer is known at once."""
        one = self.workers[worker]
        if one.busy or not one.queue:
            return
        ticket, order = one.queue[0]
        one.busy = True
        seconds, answer = 0.0, Answer()
        old = one.batch and self.now - one.since >= RECORD_SECONDS
        if order.action == "flush" or old or len(one.batch) >= SIZES.record_shards:
            seconds, answer = self._world.record, self._record(worker, one)
        if order.action == "fold" and self._folds:
            manifest, plan = self._folds
            manifest.write_folded(plan.merges[0], order.round, order.index, Folded(()))
        if order.action == "shard":
            if one.done == one.hangs_at:
                return
            work = one.speed * self._random.lognormvariate(0, self._world.sigma) * self._world.median
            work *= 100 if order.index == self._world.heavy else 1
            one.since = one.since if one.batch else self.now + seconds + work
            one.batch[order.index] = work
            one.done += 1
            seconds += work
        told = replace(answer, traffic=Traffic(bytes_read=2**28, bytes_written=2**26, requests=33), seconds={
            "work": seconds, "wait_read": seconds / 7, "wait_write": seconds / 9})  # fmt: skip
        self._at(self.now + seconds, worker, Answered(worker, ticket, ANSWER.dump_json(told).decode()))

    def _record(self, worker: int, one: _Worker) -> Answer:
        name = f"{next(iter(one.batch), 0):08d}-{worker:012d}-{len(self.records):06d}.json"
        self.records[name] = dict(one.batch)
        one.batch.clear()
        return Answer(record=name, shards=tuple(self.records[name]))


class Story(NamedTuple):
    """What became of one round."""

    makespan: float
    ideal: float
    """The makespan over that of perfectly divided work."""
    utilisation: float
    recorded: tuple[int, ...]
    """Shards in the records that count, in the order of the records."""
    failure: str
    """Why the round was not finished: `poisoned`, ...; empty where it was."""
    again: int
    """Tasks given back after a loss, and repeats."""
    lost: int
    cpu: float
    """Seconds of the driver."""
    steps: int


def simulate(world: World, seed: int = 0) -> Story:
    """Work one round off, as `drive.py` does."""
    executor = Simulated(world, seed)
    executor.start("", "", Needs(world.workers, 0))
    began = time.process_time()
    schedule = Schedule([1] * world.shards, world.workers, depth=DEPTH)
    stage = Stage(
        schedule, executor, Places(world.workers, clock=lambda: executor.now),
        lambda shard: Order("shard", round=2, index=shard), first_ticket=3 << 40,
        records=True, slow="repeat" if world.repeats else "replace", patience=world.patience,
        clock=lambda: executor.now,
    )  # fmt: skip
    steps = 0
    while not schedule.finished and not schedule.failure:
        stage.step()
        steps += 1
    cpu = time.process_time() - began - executor.cpu
    useful: dict[int, float] = {}
    for name in stage.shards_by_record:
        for shard, seconds in executor.records[name].items():
            useful.setdefault(shard, seconds)
    speeds = [1 / worker.speed for worker in executor.workers]
    work = world.shards * world.median * math.exp(world.sigma**2 / 2)
    return Story(
        makespan=executor.now,
        ideal=executor.now / (work / sum(speeds)),
        utilisation=sum(useful.values()) / world.workers / executor.now,
        recorded=tuple(shard for shards in stage.shards_by_record.values() for shard in shards),
        failure=schedule.failure.reason if schedule.failure else "",
        again=schedule.num_retries,
        lost=schedule.num_losses,
        cpu=cpu,
        steps=steps,
    )


WORLDS = {
    "no faults": World(),
    "no faults, shards very unequal (sigma 1)": World(sigma=1.0),
    "8 workers 5 times slower": World(slow=8),
    "4 workers hang": World(hang=4),
    "each worker lost once in 10 min": World(lost_after=600.0),
    "all of it": World(slow=8, hang=4, lost_after=600.0),
}


class Distant(Manifest):
    """A manifest in a store that takes a while to answer."""

    def read_record(self, merge: Merge, round_: int, name: str) -> Record[Any]:
        """Return one record, 10 ms later."""
        time.sleep(0.01)
        return super().read_record(merge, round_, name)


def records_read(plan: Plan, shards: int) -> tuple[int, float, float]:
    """Return how many records of 256 shards with their parts there are, and CPU and all seconds of reading them.

    Shards beyond those of the plan are its first ones again.
    """
    manifest, merge = Distant(Stores({}), "memory://scale/records"), plan.merges[0]
    last = len(merge.rounds) - 1
    planned = merge.rounds[last].num_shards
    for first in range(0, shards, SIZES.record_shards):
        own = [shard % planned for shard in range(first, min(first + SIZES.record_shards, shards))]
        parts = Parts(tuple(part for shard in own for part in _parts(merge, shard)), tuple(_uploads(merge)))
        manifest.write_record(merge, f"{first:08d}-{0:012x}-000000.json", Record(last, tuple(own), parts))
    names = manifest.record_names(last)
    began, cpu = time.monotonic(), time.process_time()
    read = list(manifest.read_records(merge, last, names))
    return len(read), time.process_time() - cpu, time.monotonic() - began


def _parts(merge: Merge, shard: int) -> Iterator[Written]:
    covered = merge.layout.merge_shard(shard, 0)
    for number in range(*covered.parts):
        start, stop = merge.layout.part(covered.file, number)
        yield Written(covered.file, Part(number + 1, stop - start, "9b" * 16, "1a2b3c4d"), "1a2b3c4d")


def _uploads(merge: Merge) -> Iterator[tuple[int, str]]:
    return ((file, "upload") for file in range(len(merge.result.files)))


def whole_merge(num_models: int, workers: int) -> tuple[Plan, float]:
    """Return the plan, and CPU seconds of the driver, of all rounds of a merge of models of 70B parameters."""
    names = [f"s3://models/{number}" for number in range(num_models)]
    recipe = {"base": "s3://models/base", "models": names, "method": "ties", "output": f"memory://scale/{num_models}"}
    plan = make_plan(validate(recipe), large_catalog(num_models, 1))
    stores = Stores({})
    manifest = Manifest(stores, Manifest.folder_of(plan.output, plan.run_id))
    meters = Meters(lambda progress: None, None)
    run = MergeRun(plan, stores, manifest, meters, lambda: None, resumed=False)
    executor = Simulated(World(workers=workers), 0, folds=(manifest, plan))
    crew = Crew(executor, meters, plan.recipe.run.patience)
    began = time.process_time()
    crew.start(plan, [run.setup(profiled=False)], None)
    run.execute(crew)
    return plan, time.process_time() - began - executor.cpu


def driver_cost(shards: int, workers: int, models: int) -> None:
    """Print what a round of so many shards costs the driver, and what all rounds of a merge."""
    measure.table(("what", "shards", "workers", "driver CPU s", "ms a shard", "MB at the peak"))
    for kind, repeats in (("counting", False), ("merge", True)):
        world = World(workers=workers, shards=shards, repeats=repeats)
        story = simulate(world)
        gc.collect()
        measure.row((f"a round: {kind}", shards, workers, story.cpu, story.cpu / shards * 1e3, _peak(world)))
    plan, seconds = whole_merge(models, workers)
    done = plan.num_shards
    measure.row((f"all rounds: {models} models of 70B", done, workers, seconds, seconds / done * 1e3, "-"))
    count, cpu, took = records_read(plan, shards)
    measure.row((f"reading {count} records, 10 ms away: {took:.1f} s", shards, "-", cpu, cpu / shards * 1e3, "-"))


def _peak(world: World) -> float:
    """Return what the driver holds at the most for a tenth of the shards, times ten, in MB."""
    tracemalloc.start()
    simulate(world._replace(shards=world.shards // 10))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak * 10 / 1e6


@click.command()
@click.option("--shards", default=100_000, show_default=True)
@click.option("--workers", default=512, show_default=True)
@click.option("--models", default=1000, show_default=True, help="of 70B parameters, in the merge of which all is done")
@click.option("--simulated", default=20_000, show_default=True, help="shards of each simulated round")
@click.option("--seed", default=0, show_default=True)
def main(shards: int, workers: int, models: int, simulated: int, seed: int) -> None:
    """Measure the driver and simulate the schedule."""
    driver_cost(shards, workers, models)
    measure.table(("workers", "round", "makespan s", "times ideal", "utilisation", "shards again", "lost"))
    for name, world in WORLDS.items():
        for repeats in (False, True):
            story = simulate(world._replace(workers=workers, shards=simulated, repeats=repeats), seed)
            kind = "merge" if repeats else "counting"
            measure.row((name, kind, story.makespan, story.ideal, story.utilisation, story.again, story.lost))


if __name__ == "__main__":
    main()
