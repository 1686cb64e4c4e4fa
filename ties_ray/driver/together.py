"""Runs several merges with the same workers: a stage that all of them have is done once, shard by shard."""

from collections.abc import Mapping, Sequence
from contextlib import suppress

from ties_ray.driver.crew import Crew, Done, Orders
from ties_ray.driver.run import MergeRun
from ties_ray.worker.messages import Order, Together


def execute(runs: Sequence[MergeRun], crew: Crew) -> None:
    """Do all rounds of all merges. Stages that write come last, so that merges wait for each other there."""
    if len(runs) == 1:
        runs[0].execute(crew)
        return
    stages = [run.stages(crew.size) for run in runs]
    waiting = {index: next(each) for index, each in enumerate(stages)}
    while waiting:
        first = min(waiting, key=lambda index: (waiting[index].writes, index))
        alike = {index: orders for index, orders in waiting.items() if _are_alike(orders, waiting[first])}
        done = crew.work(_joined(alike))
        for index, orders in alike.items():
            del waiting[index]
            with suppress(StopIteration):
                waiting[index] = stages[index].send(_own(done, orders))


def _are_alike(first: Orders, second: Orders) -> bool:
    """Return whether two merges can do a stage together: their shards have the same numbers."""
    return (first.name, len(first.costs), first.records) == (second.name, len(second.costs), second.records)


def _joined(alike: Mapping[int, Orders]) -> Orders:
    """Return one stage for several merges. A shard is done for those that have not done it yet."""
    first = next(iter(alike.values()))
    everybodys = frozenset.intersection(*(orders.done for orders in alike.values()))

    def order(number: int) -> Together:
        own = {index: orders.order(number) for index, orders in alike.items() if number not in orders.done}
        return Together(tuple((index, each) for index, each in own.items() if isinstance(each, Order)))

    return Orders(
        first.name,
        order,
        first.costs,
        done=everybodys,
        records=first.records,
        slow=first.slow if len({orders.slow for orders in alike.values()}) == 1 else "wait",
        prefer=first.prefer,
        activity=first.activity,
        writes=first.writes,
    )


def _own(done: Done, orders: Orders) -> Done:
    """Return what a joined stage has done for one merge."""
    shards = {
        name: tuple(shard for shard in shards if shard not in orders.done)
        for name, shards in done.shards_by_record.items()
    }
    return Done({name: own for name, own in shards.items() if own}, done.owners)
