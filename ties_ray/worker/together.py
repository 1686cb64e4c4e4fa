"""One worker for several merges: it does a shard for each of them, and reads their inputs once.

Each merge has a worker of its own here, with its plan, its manifest and its batch. They share tools. Only slices, folds
and outcomes that rest on the same values are shared, so every merge gets the bytes that it gets alone.
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from ties_ray import runtime
from ties_ray.errors import InputError
from ties_ray.worker.checksums import Checksums
from ties_ray.worker.messages import SETUPS, TOGETHER, Answer, Order
from ties_ray.worker.worker import Finished, Worker, record_name


def make_worker(setups: str) -> "SharedWorker":
    """Return the worker of several setups in JSON. Executors call this factory."""
    first, *others = SETUPS.validate_json(setups)
    worker = Worker(first)
    return SharedWorker((worker, *(Worker(setup, tools=worker.tools) for setup in others)))


class SharedWorker:
    """Handles the orders of several merges together, one shard at a time."""

    def __init__(self, workers: tuple[Worker, ...]) -> None:
        """workers: one for each merge. They share their tools."""
        self._workers = workers
        self._shards: list[int] = []
        """The shards that no record holds yet."""
        self._round = 0
        self._token = runtime.token_hex(6)
        self._num_records = 0
        self._recorded = Answer()
        """The last record, until an answer tells of it."""

    def run(self, message: str) -> str:
        """Handle orders in JSON and return one answer in JSON."""
        orders = [(self._workers[index], order) for index, order in TOGETHER.validate_json(message).orders]
        worker, order = orders[0]
        return worker.answered(order, lambda: self._handle(order.action, orders))

    def _handle(self, action: str, orders: Sequence[tuple[Worker, Order]]) -> Answer:
        if action == "shard":
            self._shard(orders)
        elif action == "flush":
            try:
                self._flush()
            except BaseException:
                self._forget()  # the driver takes them for lost, and has them done again
                raise
        else:
            for worker, order in orders:
                worker.handle(order)
        answer, self._recorded = self._recorded, Answer()
        return answer

    def totals(self) -> Mapping[tuple[str, str], float]:
        """Return all counts by metric (`messages.METRICS`) and label."""
        totals: Counter[tuple[str, str]] = Counter()
        for worker in self._workers:
            totals.update(worker.totals())
        return totals

    def _shard(self, orders: Sequence[tuple[Worker, Order]]) -> None:
        for worker, order in orders:
            worker.follow(order)
        if any(worker.is_record_due(order) for worker, order in orders):
            self._flush()
        held, checksums = self._workers[0].tools.held, Checksums()
        held.begin()
        outcomes: dict[Hashable, Finished] = {}
        finished = []
        for worker, order in orders:
            held.begin_merge()
            key = worker.work_key(order)
            with _named(worker):
                done = worker.work(order, checksums, outcomes.get(key) if key is not None else None)
            outcomes[key] = done
            finished.append(done)
        for (worker, order), done in zip(orders, finished, strict=True):
            worker.keep(order, done)
        self._shards.append(orders[0][1].index)
        self._round = orders[0][1].round

    def _flush(self) -> None:
        """Write the finished shards into a record of each merge, under one name. They stay where that fails."""
        if self._shards:
            name = record_name(self._shards, self._token, self._num_records)
            self._num_records += 1
            for worker in self._workers:
                worker.write_record(name)
            self._recorded = Answer(record=name, round=self._round, shards=tuple(self._shards))
            self._forget()

    def _forget(self) -> None:
        self._shards = []
        for worker in self._workers:
            worker.forget()


@contextmanager
def _named(worker: Worker) -> Iterator[None]:
    """Let errors of inputs and numbers say whose merge they end."""
    try:
        yield
    except InputError as error:
        problems = [problem._replace(where=f"{worker.output}: {problem.where}") for problem in error.problems]
        raise InputError(problems) from error
