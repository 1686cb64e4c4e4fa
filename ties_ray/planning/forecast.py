"""How long a merge takes, by its plan and by the rates of one worker. Pure.

A worker reads, merges and writes at the same time, so the slowest of the three sets the time of a shard. It waits for
the first slices of each shard, and for its last part. A worker that copies local files reads and merges in turn
(`Plan.copies`).

The forecast assumes that workers don't slow each other down, though they may share a network card, a disk or a core.
It assumes that no worker is lost or slow, and that a cache answers at once.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from ties_ray.planning.plan import Plan
from ties_ray.rounds import Merge, PlannedRound, kind_of

Bound = Literal["read", "merge", "write"]
"""What takes a worker's time."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rates(_Value):
    """How fast one worker is."""

    read: float
    """Bytes that all threads of a worker read in a second."""
    write: float
    """Bytes that a worker writes in a second."""
    request: float
    """Seconds until a small read is answered."""
    dense: dict[str, float]
    """Nanoseconds for each element of a model that is stored whole, by round."""
    factors: dict[str, float] = {}
    """Nanoseconds for each element of a change that is stored as factors, by round."""
    start: float = 0.0
    """Seconds until all workers have started."""


class RoundPrediction(_Value):
    """How long one round takes."""

    name: str
    seconds: float
    bound: Bound
    """What takes most of the time."""


class Prediction(_Value):
    """How long a merge takes."""

    workers: int
    seconds: float
    """Seconds of the whole merge, the start included."""
    rounds: list[RoundPrediction]

    @property
    def bound(self) -> Bound:
        """What takes most of the time of the longest round."""
        return max(self.rounds, key=lambda round_: round_.seconds).bound


class Forecast(_Value):
    """The measured rates, and the predictions for some numbers of workers."""

    rates: Rates
    predictions: list[Prediction]


class Work(NamedTuple):
    """The work of all shards of a round."""

    bytes_read: int
    requests: int
    dense: int
    """Pairs of an element and a model that stores the parameter whole."""
    factors: int
    """Pairs of an element and a model that stores the parameter as factors."""
    bytes_written: int
    slices: int
    """Slices that one shard reads: blocks times models."""
    parts: int
    """Parts that a shard writes."""


def work_of(plan: Plan, workers: int) -> list[Work]:
    """Return the work of each round."""
    merge = plan.merges[0]
    caches = workers * (merge.sources.room_for_slices() + int(plan.recipe.run.disk_cache))
    spared = min(1.0, caches / max(1, plan.bytes_read - plan.bytes_again))  # a cache keeps what its worker read first
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
    """Return how many merged elements some members store, whole and as factors."""
    numels = {parameter.name: parameter.numel for parameter in merge.catalog.parameters if parameter.merged}
    counts: dict[int, tuple[int, int]] = {}
    dense = factors = 0
    for model in (merge.models[member] for member in members):
        if id(model.sources) not in counts:
            totals = [0, 0]
            for name, source in model.sources.items():
                totals[source.encoding == "factors"] += numels.get(name, 0)
            counts[id(model.sources)] = totals[0], totals[1]
        dense += counts[id(model.sources)][0]
        factors += counts[id(model.sources)][1]
    return dense, factors


def predictable(plan: Plan) -> bool:
    """Return whether the costs of all rounds are known. Those of condensing are unknown until a matrix is done."""
    return all(kind_of(round_).relative_cost(round_) is not None for round_ in plan.merges[0].rounds)


def predict(plan: Plan, rates: Rates, workers: int, left: Sequence[int] | None = None) -> Prediction | None:
    """Return how long a merge takes, None where it is not `predictable`.

    left: the shards of each round that are left to do; all by default.
    """
    if not predictable(plan):
        return None
    left = [round_.num_shards for round_ in plan.merges[0].rounds] if left is None else left
    rounds = []
    for round_, load, shards in zip(plan.merges[0].rounds, work_of(plan, workers), left, strict=True):
        read = max(load.bytes_read / rates.read, load.requests * rates.request / plan.ahead)
        ns = load.dense * rates.dense.get(round_.name, 0.0) + load.factors * rates.factors.get(round_.name, 0.0)
        stages: dict[Bound, tuple[float, float]] = {  # seconds of whole shards, and of their first or last pieces
            "read": (read, read * min(1.0, plan.ahead / load.slices)),
            "merge": (ns / 1e9, ns / 1e9 / load.slices),
            "write": (load.bytes_written / rates.write, load.bytes_written / rates.write / load.parts),
        }
        in_turn: list[list[Bound]] = [["read", "merge"], ["write"]] if plan.copies else [["read"], ["merge"], ["write"]]
        slowest = max(in_turn, key=lambda group: sum(stages[stage][0] for stage in group))
        bound = max(slowest, key=lambda stage: stages[stage][0])
        seconds = sum(whole if stage in slowest else piece for stage, (whole, piece) in stages.items())
        waves = math.ceil(shards / workers)
        seconds *= waves / max(1, round_.num_shards)
        rounds.append(RoundPrediction(name=round_.name, seconds=seconds, bound=bound))
    return Prediction(workers=workers, seconds=rates.start + sum(each.seconds for each in rounds), rounds=rounds)


LEAST = 0.5
"""The least share of their part of a round's reads that finished shards have read, for a forecast by them."""


class Progressed(NamedTuple):
    """What some shards of a round have taken."""

    shards: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    """Seconds of their workers."""
    waited: float = 0.0
    """Seconds among these in which they waited for storage."""

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
    """Forecasts the rest of a merge by the first shards of a round. It needs no extra read."""

    def __init__(self, plan: Plan, index: int, workers: int, num_left: int) -> None:
        """index: the index of the round. num_left: how many of its shards are left to do."""
        self._plan, self._index, self._workers, self._left = plan, index, workers, num_left
        self._done = Progressed()

    def add(self, done: Progressed) -> None:
        """Add finished shards."""
        self._done = self._done.plus(done)

    def seconds_left(self) -> float | None:
        """Return how many seconds are left; None until each worker has done two shards, and read its share.

        The first shards may hold only what no model changes, so that they show how fast nothing is read.
        """
        done, round_ = self._done, self._plan.merges[0].rounds[self._index]
        share = done.shards / max(1, round_.num_shards)
        if done.shards < min(2 * self._workers, self._left) or done.bytes_read < LEAST * share * round_.bytes_read:
            return None
        later = [round_.num_shards for round_ in self._plan.merges[0].rounds[self._index + 1 :]]
        left = [*[0] * self._index, max(0, self._left - self._done.shards), *later]
        rates = observed(self._plan, self._index, self._done)
        prediction = predict(self._plan, rates, self._workers, left)
        return None if prediction is None else prediction.seconds


def observed(plan: Plan, index: int, done: Progressed) -> Rates:
    """Return the rates that finished shards of a round show.

    The relative costs of the kinds of rounds give the rates of the other rounds' kernels. A worker that reads ahead has
    read at least as fast as it worked; a worker that copies local files has read while it waited. Writing counts
    likewise. It is taken to be as fast as reading until something is written.
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
    written = done.bytes_written / seconds if work.bytes_written else 0.0  # small records say nothing of weights
    return Rates(read=read, write=written or read, request=0.0, dense=ns, factors=ns)
