"""Stage and schedule with simulated workers in virtual time (benchmarks/scale.py): what holds whatever they do."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.scale import World, simulate
from ties_ray.driver.dispatch import HUNG_FACTOR, HUNG_SECONDS, Stage
from ties_ray.driver.places import Places
from ties_ray.driver.schedule import Schedule
from ties_ray.executors import Answered, Event, Executor, Lost, Needs, Ready
from ties_ray.worker.messages import ANSWER, Answer, Order

SMALL = World(workers=24, shards=600)


def once(world: World) -> Counter[int]:
    return Counter(range(world.shards))


@pytest.mark.parametrize("repeats", [False, True])
def test_without_faults_workers_are_busy_to_the_end(repeats: bool) -> None:
    story = simulate(SMALL._replace(repeats=repeats))
    assert Counter(story.recorded) == once(SMALL)
    assert story.utilisation > 0.93
    assert story.ideal < 1.08
    assert (story.again, story.lost) == (0, 0)


def test_slow_workers_take_what_they_can_and_hold_up_nobody_for_more_than_a_shard() -> None:
    world = SMALL._replace(slow=4, repeats=False)
    story = simulate(world)
    assert Counter(story.recorded) == once(world)
    best = story.makespan / story.ideal
    assert story.makespan < best + 5 * world.median * 2.5  # a shard five times as slow, and among the longest


def test_the_merge_does_not_wait_for_a_worker_that_hangs() -> None:
    world = SMALL._replace(hang=3)
    story = simulate(world)
    assert set(story.recorded) == set(range(world.shards))
    assert story.lost == 0
    assert story.makespan < simulate(SMALL).makespan * 1.5


def test_a_counting_round_replaces_a_worker_that_hangs_and_counts_nothing_twice() -> None:
    world = SMALL._replace(hang=3, repeats=False)
    story = simulate(world)
    assert Counter(story.recorded) == once(world)
    assert story.lost == 3
    late = HUNG_FACTOR * 2 * world.median * 1.5 + HUNG_SECONDS + world.back_after
    assert story.makespan < simulate(SMALL).makespan + late
    assert story.makespan < world.patience / 5


def test_a_shard_that_is_slow_wherever_it_is_done_costs_one_worker_and_ends() -> None:
    world = SMALL._replace(heavy=77, repeats=False)
    story = simulate(world)
    assert Counter(story.recorded) == once(world)
    assert story.lost == 1


@pytest.mark.parametrize("repeats", [False, True])
def test_lost_workers_cost_what_they_held_and_no_more(repeats: bool) -> None:
    world = SMALL._replace(lost_after=300.0, repeats=repeats)
    story = simulate(world)
    assert set(story.recorded) == set(range(world.shards))
    assert story.lost > 3
    assert story.again <= story.lost * 6  # two that ran, and those of ten seconds
    assert story.utilisation > 0.7


@settings(max_examples=25, deadline=None)
@given(
    world=st.fixed_dictionaries(
        {
            "workers": st.integers(1, 9),
            "shards": st.integers(1, 80),
            "median": st.sampled_from([0.05, 4.0]),
            "sigma": st.sampled_from([0.1, 1.0]),
            "slow": st.integers(0, 2),
            "hang": st.integers(0, 2),
            "lost_after": st.sampled_from([0.0, 200.0]),
            "repeats": st.booleans(),
        }
    ).map(lambda chosen: World(**chosen)),
    seed=st.integers(0, 1000),
)
def test_every_shard_is_recorded_or_one_is_named_and_what_is_counted_is_counted_once(world: World, seed: int) -> None:
    story = simulate(world, seed)
    recorded = Counter(story.recorded)
    if story.failure:  # a shard that is long beside the life of a worker
        assert story.failure == "poisoned"
        assert story.lost >= 3
    else:
        assert recorded.keys() == once(world).keys()
    if not world.repeats:
        assert max(recorded.values(), default=1) == 1


def test_many_losses_of_spot_machines_blame_no_shard() -> None:
    world = SMALL._replace(workers=64, shards=2000, median=30.0, lost_after=300.0)
    story = simulate(world)
    assert story.lost > 100
    assert story.failure == ""
    assert set(story.recorded) == set(range(world.shards))


def test_the_same_seed_tells_the_same_story() -> None:
    world = SMALL._replace(slow=2, hang=1, lost_after=200.0)
    assert simulate(world, 7)[:7] == simulate(world, 7)[:7]
    assert simulate(world, 7).makespan != simulate(world, 8).makespan


class Dying(Executor):
    """Loses its worker over the first message, and handles all later ones."""

    name = "dying"

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.submitted = 0

    def start(self, factory: str, setup: str, needs: Needs) -> int:
        return 1

    def submit(self, worker: int, ticket: int, message: str) -> None:
        self.submitted += 1
        answer = ANSWER.dump_json(Answer()).decode()
        lost = Lost(worker, ticket, "killed by the kernel")
        self.events.append(lost if self.submitted == 1 else Answered(worker, ticket, answer))

    def wait(self, timeout: float) -> list[Event]:
        events, self.events = self.events, []
        return events

    def give_up(self, worker: int) -> None:
        """Nothing hangs."""

    def revive(self, worker: int) -> None:
        self.events = [Ready(worker)]

    def stop(self) -> None:
        """Nothing runs."""


def test_a_lost_worker_is_one_line_for_the_user() -> None:
    lines: list[str] = []
    schedule = Schedule([1], 1, depth=2)
    stage = Stage(
        schedule, Dying(), Places(1), lambda task: Order("shard", index=task), first_ticket=0, records=False,
        slow="wait", patience=60.0, announce=lines.append,
    )  # fmt: skip
    while not schedule.finished:
        stage.step()
    assert lines == ["worker 0 was lost, and another takes its place: killed by the kernel"]
