"""How long a merge takes: worked out from the plan and from what one worker achieves. Pure.

A worker reads, merges and writes at the same time, so that the slowest of the three sets the pace of a shard; the first
slices of each shard are waited for, and so is its last part. Of local files it reads and merges in turn, as if the
system held them (`Plan.copies`). What it does not know: workers that share a network card,
a disk or a core are as fast as one alone; nothing is lost, nothing is slow, and what a cache holds takes no time.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from ties_ray.planning.plan import Plan
from ties_ray.rounds import Merge, PlannedRound, kind_of

Bound = Literal["read", "merge", "write"]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rates(_Value):
    """What one worker achieves."""

    read: float
    """Bytes a second, by as many threads as a worker has."""
    write: float
    """Bytes a second."""
    request: float
    """Seconds until a small read is answered."""
    dense: dict[str, float]
    """By round, ns for each element of a model that is stored whole..."""
    factors: dict[str, float] = {}
    """...and for each element of a change that is stored as factors."""
    start: float = 0.0
    """Seconds until all workers are there."""


class RoundPrediction(_Value):
    """One round."""

    name: str
    seconds: float
    bound: Bound
    """What sets the pace."""


class Prediction(_Value):
    """A whole merge."""

    workers: int
    seconds: float
    """In all, the start included."""
    rounds: list[RoundPrediction]

    @property
    def bound(self) -> Bound:
        """What sets the pace of the longest round."""
        return max(self.rounds, key=lambda one: one.seconds).bound


class Forecast(_Value):
    """What was measured, and what follows from it for some numbers of workers."""

    rates: Rates
    predictions: list[Prediction]


class Work(NamedTuple):
    """What all shards of a round together have to do."""

    bytes_read: int
    requests: int
    dense: int
    """Pairs of an element and a model that stores the parameter whole."""
    factors: int
    """Pairs of an element and a model that stores the parameter as factors."""
    bytes_written: int
    slices: int
    """Reads ahead of the merge in one shard: blocks times models."""
    parts: int
    """Parts that a shard writes."""


def work_of(plan: Plan, workers: int) -> list[Work]:
    """Return the work of each round."""
    merge = plan.merges[0]
    kept = workers * (merge.sources.room_for_slices() + int(plan.recipe.run.disk_cache))
    spared = min(1.0, kept / max(1, plan.bytes_read - plan.bytes_again))  # each holds what it has read first
    return [_work(plan, merge, round_, spared) for round_ in merge.rounds]


def _work(plan: Plan, merge: Merge, round_: PlannedRound, spared: float) -> Work:
    kind = kind_of(round_)
    load = kind.load(merge, round_)
    num_bytes, requests, again = (
        int(load.share * each) for each in (round_.bytes_read, round_.requests, round_.bytes_again)
    )
    dense, factors = _elements(merge, load.members)
    shards = max(1, round_.num_shards if kind.writes else merge.layout.num_ranges)
    blocks = -(-merge.layout.num_elements // shards // round_.block)
    parts = sum(map(merge.layout.num_parts, range(len(merge.result.files))))
    return Work(
        bytes_read=num_bytes - int(spared * again),
        requests=requests - int(spared * requests * again / max(1, num_bytes)),
        dense=dense * round_.passes,
        factors=factors * round_.passes,
        bytes_written=plan.bytes_written if kind.writes else 0,
        slices=max(1, blocks * load.streams),
        parts=-(-parts // max(1, round_.num_shards)) if kind.writes else 1,
    )


def _elements(merge: Merge, members: Iterable[int]) -> tuple[int, int]:
    """Return the merged elements of some members, stored whole and stored as factors."""
    numels = {parameter.name: parameter.numel for parameter in merge.catalog.parameters if parameter.merged}
    known: dict[int, tuple[int, int]] = {}
    dense = factors = 0
    for model in (merge.models[member] for member in members):
        if id(model.sources) not in known:
            totals = [0, 0]
            for name, source in model.sources.items():
                totals[source.encoding == "factors"] += numels.get(name, 0)
            known[id(model.sources)] = totals[0], totals[1]
        dense += known[id(model.sources)][0]
        factors += known[id(model.sources)][1]
    return dense, factors


def predictable(plan: Plan) -> bool:
    """Return whether anything is known of all rounds: of condensing matrices nothing is before one is done."""
    return all(kind_of(round_).relative_cost(round_) is not None for round_ in plan.merges[0].rounds)


def predict(plan: Plan, rates: Rates, workers: int, left: Sequence[int] | None = None) -> Prediction | None:
    """Return how long a merge takes, or what is left of it: so many shards of each round.

    None where it is not `predictable`.
    """
    if not predictable(plan):
        return None
    left = [one.num_shards for one in plan.merges[0].rounds] if left is None else left
    rounds = []
    for one, load, shards in zip(plan.merges[0].rounds, work_of(plan, workers), left, strict=True):
        read = max(load.bytes_read / rates.read, load.requests * rates.request / plan.ahead)
        ns = load.dense * rates.dense.get(one.name, 0.0) + load.factors * rates.factors.get(one.name, 0.0)
        stages: dict[Bound, tuple[float, float]] = {  # seconds of all shards, and of the first or last piece of each
            "read": (read, read * min(1.0, plan.ahead / load.slices)),
            "merge": (ns / 1e9, ns / 1e9 / load.slices),
            "write": (load.bytes_written / rates.write, load.bytes_written / rates.write / load.parts),
        }
        in_turn: list[list[Bound]] = [["read", "merge"], ["write"]] if plan.copies else [["read"], ["merge"], ["write"]]
        slowest = max(in_turn, key=lambda some: sum(stages[stage][0] for stage in some))
        bound = max(slowest, key=lambda stage: stages[stage][0])
        seconds = sum(whole if stage in slowest else piece for stage, (whole, piece) in stages.items())
        waves = math.ceil(shards / workers)
        rounds.append(RoundPrediction(name=one.name, seconds=seconds / max(1, one.num_shards) * waves, bound=bound))
    return Prediction(workers=workers, seconds=rates.start + sum(one.seconds for one in rounds), rounds=rounds)


class Progressed(NamedTuple):
    """What some shards of a round took, added up."""

    shards: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    """Seconds of their workers."""
    waited: float = 0.0
    """Seconds of these in which they waited for storage."""

    def plus(self, more: "Progressed") -> "Progressed":
        """Return the sum of both."""
        return Progressed(
            self.shards + more.shards,
            self.bytes_read + more.bytes_read,
            self.bytes_written + more.bytes_written,
            self.seconds + more.seconds,
            self.waited + more.waited,
        )


class ProgressForecast:
    """What the first shards of a round tell of the rest: measured where the work is done, and without a read more."""

    def __init__(self, plan: Plan, index: int, workers: int, num_left: int) -> None:
        """index: of the round, whose last `num_left` shards are to be done."""
        self._plan, self._index, self._workers, self._left = plan, index, workers, num_left
        self._done = Progressed()

    def add(self, done: Progressed) -> float | None:
        """Take in what was done; return how many seconds are left, once there are two shards of each worker."""
        self._done = self._done.plus(done)
        if self._done.shards < min(2 * self._workers, self._left):
            return None
        later = [one.num_shards for one in self._plan.merges[0].rounds[self._index + 1 :]]
        left = [*[0] * self._index, max(0, self._left - self._done.shards), *later]
        found = predict(self._plan, observed(self._plan, self._index, self._done), self._workers, left)
        return None if found is None else found.seconds


def observed(plan: Plan, index: int, done: Progressed) -> Rates:
    """Return the rates that some shards of a round show; those of the other rounds' kernels follow by their kinds.

    A worker that reads ahead has read at least as fast as it worked. One that copies by itself read while it waited.
    Writing counts likewise. Where nothing was written yet, it is taken to be as fast as reading.
    """
    rounds = plan.merges[0].rounds
    work = work_of(plan, workers=1)[index]
    pairs = (work.dense + work.factors) * done.shards / rounds[index].num_shards
    seconds = max(1e-9, done.seconds)
    cost = kind_of(rounds[index]).relative_cost(rounds[index]) or 1.0
    unit = max(0.0, seconds - done.waited) * 1e9 / max(1.0, pairs) / cost
    relative = {round_.name: kind_of(round_).relative_cost(round_) for round_ in rounds}
    ns = {name: unit * each for name, each in relative.items() if each is not None}
    read = max(1, done.bytes_read) / (max(1e-9, done.waited) if plan.copies else seconds)
    written = done.bytes_written / seconds if work.bytes_written else 0.0  # of the weights, not of a few records
    return Rates(read=read, write=written or read, request=0.0, dense=ns, factors=ns)
