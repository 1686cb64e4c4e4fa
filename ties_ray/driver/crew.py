"""Starts the workers of a run through an executor, and has them carry out orders."""

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ties_ray.driver.dispatch import Stage
from ties_ray.driver.meters import Meters
from ties_ray.driver.places import Places
from ties_ray.driver.schedule import Failure, Schedule
from ties_ray.errors import InputError, InterruptedMerge, MergeError, Problem, UnavailableError
from ties_ray.executors import Executor, Needs
from ties_ray.planning.forecast import ProgressForecast
from ties_ray.planning.plan import Plan
from ties_ray.rounds import Slow
from ties_ray.worker.messages import SETUP, SETUPS, Order, Setup, Together

PACKAGES = ("ties-ray", "torch", "numpy", "numba")
"""Packages that must have one version on all workers, since the arithmetic rests on them."""
DEPTH = 2
"""Shards that a worker has at a time: one under way, and one that follows at once."""


@dataclass(frozen=True)
class Orders:
    """The orders of a stage: one for each of its costs."""

    name: str
    order: Callable[[int], Order | Together]
    costs: tuple[int, ...]
    done: frozenset[int] = frozenset()
    """Orders that are finished already."""
    records: bool = False
    """True: an order is finished when a record holds it. False: it is finished when it is answered."""
    slow: Slow = "wait"
    prefer: tuple[int | None, ...] | None = None
    """The worker that each order should go to."""
    activity: str = ""
    """What the stage does, in a word or two."""
    writes: bool = False
    """Whether it writes the parts of the result."""
    forecast: ProgressForecast | None = None
    """What its answers say about the end of the run."""


class Done(NamedTuple):
    """The outcome of a stage whose orders are all carried out."""

    shards_by_record: dict[str, tuple[int, ...]]
    """The shards of each record, by the record's name."""
    owners: tuple[int | None, ...]
    """The worker that has carried out each order."""


class Crew:
    """The workers of one executor."""

    def __init__(self, executor: Executor, meters: Meters, patience: float) -> None:
        """patience: seconds until a worker without an answer is given up."""
        self.places = Places(0)
        self._executor = executor
        self._meters = meters
        self._patience = patience
        self._stages = 0
        self._num_merges = 1
        self._worked_before: float | None = None
        """The workers' seconds of work until they had started; None while there are none."""

    @property
    def size(self) -> int:
        """The number of workers, of which some may be yet to come."""
        return self.places.size

    def start(self, plan: Plan, setups: Sequence[Setup], num_workers: int | None, *, beside: int = 0) -> None:
        """Start the workers. Raises a `MergeError` where none starts.

        setups: one for each merge that the workers carry out together. num_workers: None for as many as the executor
        has room for. beside: bytes that a worker takes beside what the plan says.
        """
        run = plan.recipe.run
        needs = Needs(
            num_workers=num_workers,
            memory=plan.memory + beside,
            gpus=run.gpus,
            sharers=plan.sharers,
            address=run.address,
            deadline=run.deadline,
            versions=tuple((package, importlib.metadata.version(package)) for package in PACKAGES),
            labels=(("run", plan.run_id), ("output", plan.output)),
            announce=self._meters.announce,
        )
        self._num_merges = len(setups)
        if self._num_merges == 1:
            factory, setup = "ties_ray.worker.worker:make_worker", SETUP.dump_json(setups[0])
        else:
            factory, setup = "ties_ray.worker.together:make_worker", SETUPS.dump_json(tuple(setups))
        size = self._executor.start(factory, setup.decode(), needs)
        losses = self._meters.places.losses  # of another crew, whose work has to be done again
        self.places = Places(size, self._executor.empty_places(), losses=losses, deadline=run.deadline)
        self._meters.places = self.places
        self._worked_before = self._meters.seconds["work"]
        self.work(Orders("start", lambda _: self._to_all("hello"), costs=(1,) * self.size, activity="starting"))

    def _to_all(self, action: Literal["hello", "flush"]) -> Order | Together:
        """Return the message that all merges of a worker get."""
        if self._num_merges == 1:
            return Order(action)
        return Together(tuple((number, Order(action)) for number in range(self._num_merges)))

    def stop(self) -> None:
        """Stop all workers, and add up their idle seconds."""
        if self._worked_before is not None:
            work = self._meters.seconds["work"] - self._worked_before
            self._meters.seconds["idle"] += max(0.0, self.places.worker_seconds() - work)
            self._worked_before = None
        self._executor.stop()

    def work(self, orders: Orders) -> Done:
        """Carry out the orders of a stage. Raises the error that a worker's failure stands for."""
        name, activity = orders.name, orders.activity
        schedule = Schedule(
            orders.costs, self.size, done=orders.done, lost=self.places.empty, prefer=orders.prefer, depth=DEPTH
        )
        self._stages += 1
        stage = Stage(
            schedule,
            self._executor,
            self.places,
            orders.order,
            first_ticket=self._stages << 40,
            records=orders.records,
            slow=orders.slow,
            patience=self._patience,
            announce=self._meters.announce,
            flush=self._to_all("flush"),
        )
        with self._meters.times.spent("work", name):
            while not schedule.finished:
                self._meters.tell(name, schedule, activity=activity)
                for answer in stage.step():
                    self._meters.add(answer)
                if schedule.failure:
                    raise _error(schedule.failure, name)
        self._meters.end_stage()
        self._meters.shards_again += schedule.num_retries
        self._meters.tell(name, schedule, activity=activity)
        return Done(stage.shards_by_record, schedule.owners)


def _error(failure: Failure, stage: str) -> MergeError:
    """Return the error of the run. It names the shard unless the fault lies in the user's input."""
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
