"""How long a merge takes: worked out from the plan and from what one worker achieves. Pure.

A worker reads, merges and writes at the same time, so that the slowest of the three sets the pace of a shard; the first
slices of each shard are waited for, and so is its last part. Of local files it reads and merges in turn, as if the
system held them (`Plan.copies`). What it does not know: workers that share a network card,
a disk or a core are as fast as one alone; nothing is lost, nothing is slow, and what a cache holds takes no time.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from ties_ray.inputs.catalog import Model
from ties_ray.layout.footprint import Sources
from ties_ray.layout.shards import COUNTS, MODEL_GROUP
from ties_ray.planning.plan import Plan

SHORT = {"F16", "BF16"}
"""Dtypes whose differences are exact in few enough bits (`kernels.BINS`)."""
Bound = Literal["read", "merge", "write"]
DEAR = {"survey": 0.0, "count_high": 1.0, "count_low": 0.6, "gather": 1.0, "merge": 1.0}
"""What a kind of round takes for an element of a model, by what counting the high bits takes (docs/performance.md)."""


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


class Load(NamedTuple):
    """What all shards of a round together have to do."""

    bytes_read: int
    requests: int
    dense: int
    """Pairs of an element and a model that stores the parameter whole..."""
    factors: int
    """...or as factors."""
    bytes_written: int
    slices: int
    """Reads ahead of the merge in one shard: blocks times models."""
    parts: int
    """Parts that a shard writes."""


def loads(plan: Plan, workers: int) -> list[Load]:
    """Return the load of each round."""
    sources = Sources(plan.recipe, plan.catalog, plan.result.models)
    kept = workers * (sources.room_for_slices() + int(plan.recipe.run.disk_cache))
    spared = min(1.0, kept / max(1, plan.bytes_read - plan.bytes_again))  # each holds what it has read first
    need = plan.recipe.method.needs(plan.result.members)
    numels = {parameter.name: parameter.numel for parameter in plan.catalog.parameters if parameter.merged}
    known: dict[int, tuple[int, int]] = {}

    def elements(members: Iterable[int]) -> tuple[int, int]:
        totals = [0, 0]
        for model in (sources.models[member] for member in members):
            if id(model.sources) not in known:
                of_one = [0, 0]
                for name, source in model.sources.items():
                    of_one[source.encoding == "factors"] += numels.get(name, 0)
                known[id(model.sources)] = of_one[0], of_one[1]
            totals = [total + more for total, more in zip(totals, known[id(model.sources)], strict=True)]
        return totals[0], totals[1]

    everyone = range(len(plan.result.members))
    trimmed = [member for member in everyone if need and need.densities[member] < 1]
    is_short = _short(sources)
    left = [member for member in trimmed if not is_short(sources.models[member])]
    parts = sum(map(plan.layout.num_parts, range(len(plan.result.files))))
    found = []
    for one in plan.result.rounds:
        merges = one.kind == "merge"
        dense, factors = elements({"count_high": trimmed, "count_low": left}.get(one.kind, everyone))
        if one.kind == "count_low":
            share = len(left) / max(1, len(trimmed))
            num_bytes, requests, again = (int(share * each) for each in (one.bytes_read, one.requests, one.bytes_again))
            one = one._replace(bytes_read=num_bytes, requests=requests, bytes_again=again)
        models = min(MODEL_GROUP, len(trimmed)) if one.kind in COUNTS else len(everyone)
        blocks = -(
            -plan.layout.num_elements // max(1, one.num_shards if merges else plan.layout.num_ranges) // one.block
        )
        found.append(
            Load(
                bytes_read=one.bytes_read - int(spared * one.bytes_again),
                requests=one.requests - int(spared * one.requests * one.bytes_again / max(1, one.bytes_read)),
                dense=dense * one.passes,
                factors=factors * one.passes,
                bytes_written=plan.bytes_written if merges else 0,
                slices=max(1, blocks * models),
                parts=-(-parts // max(1, one.num_shards)) if merges else 1,
            )
        )
    return found


def _short(sources: Sources) -> Callable[[Model], bool]:
    """Return what tells whether one count settles a model's threshold, as good as always: it and the base are short."""
    merged = {parameter.name for parameter in sources.catalog.parameters if parameter.merged}
    known: dict[int, bool] = {}

    def is_short(model: Model) -> bool:
        key = id(model.sources)
        if key not in known:
            refs = [ref for name, source in model.sources.items() if name in merged for ref in source.tensors]
            known[key] = all(ref.dtype in SHORT for ref in refs)
        return known[key]

    return lambda model: sources.formats[model.format].whole and is_short(sources.catalog.base) and is_short(model)


def predictable(plan: Plan) -> bool:
    """Return whether anything is known of all rounds: of condensing matrices nothing is before one is done."""
    return all(one.kind in DEAR for one in plan.result.rounds)


def predict(plan: Plan, rates: Rates, workers: int, left: Sequence[int] | None = None) -> Prediction | None:
    """Return how long a merge takes, or what is left of it: so many shards of each round.

    None where it is not `predictable`.
    """
    if not predictable(plan):
        return None
    left = [one.num_shards for one in plan.result.rounds] if left is None else left
    rounds = []
    for one, load, shards in zip(plan.result.rounds, loads(plan, workers), left, strict=True):
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


class Work(NamedTuple):
    """What some shards of a round took, added up."""

    shards: int
    bytes_read: int
    bytes_written: int
    seconds: float
    """Of their workers..."""
    waited: float
    """...and how many of these they waited for storage."""


class Pace:
    """What the first shards of a round tell of the rest: measured where the work is done, and without a read more."""

    def __init__(self, plan: Plan, index: int, workers: int, num_left: int) -> None:
        """index: of the round, whose last `num_left` shards are to be done."""
        self._plan, self._index, self._workers, self._left = plan, index, workers, num_left
        self._work = Work(0, 0, 0, 0.0, 0.0)

    def add(self, work: Work) -> float | None:
        """Take in what was done; return how many seconds are left, once there are two shards of each worker."""
        before = self._work
        self._work = Work(
            before.shards + work.shards,
            before.bytes_read + work.bytes_read,
            before.bytes_written + work.bytes_written,
            before.seconds + work.seconds,
            before.waited + work.waited,
        )
        if self._work.shards < min(2 * self._workers, self._left):
            return None
        later = [one.num_shards for one in self._plan.result.rounds[self._index + 1 :]]
        left = [*[0] * self._index, max(0, self._left - self._work.shards), *later]
        found = predict(self._plan, observed(self._plan, self._index, self._work), self._workers, left)
        return None if found is None else found.seconds


def observed(plan: Plan, index: int, work: Work) -> Rates:
    """Return the rates that some shards of a round show; of the other rounds' kernels by what is known of their kinds.

    Reading was at least as fast as the work in all, or took what was waited, where that is done in turn. So was
    writing, or, where nothing was written yet, as fast as that.
    """
    rounds = plan.result.rounds
    load = loads(plan, workers=1)[index]
    pairs = (load.dense + load.factors) * work.shards / rounds[index].num_shards
    seconds = max(1e-9, work.seconds)
    unit = max(0.0, seconds - work.waited) * 1e9 / max(1.0, pairs) / DEAR[rounds[index].kind]
    ns = {one.name: unit * DEAR[one.kind] for one in rounds if one.kind in DEAR}
    read = max(1, work.bytes_read) / (max(1e-9, work.waited) if plan.copies else seconds)
    written = work.bytes_written / seconds if load.bytes_written else 0.0  # of the weights, not of a few records
    return Rates(read=read, write=written or read, request=0.0, dense=ns, factors=ns)
