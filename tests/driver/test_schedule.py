import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ties_ray.driver.schedule import Assignment, Schedule
from ties_ray.errors import Problem

GONE = (Problem("s3://m/7", "is gone"),)


def run_to_the_end(schedule: Schedule) -> list[Assignment]:
    """Answer and record everything at once, one assignment after the other; return all of them."""
    assignments = []
    while batch := schedule.assignments():
        assignments += batch
        for worker, ticket, task in batch:
            schedule.answered(ticket)
            schedule.recorded(worker, [task])
    return assignments


def test_neighbouring_tasks_go_to_one_worker_in_segments_of_equal_bytes() -> None:
    by_bytes = Schedule([10, 10, 10, 30, 20, 10], 3, depth=1)
    assert [(worker, task) for worker, _, task in by_bytes.assignments()] == [(0, 0), (1, 3), (2, 4)]
    schedule = Schedule([7] * 9, 3)
    run_to_the_end(schedule)
    assert schedule.owners == (0, 0, 0, 1, 1, 1, 2, 2, 2)
    assert schedule.recorded_by == [3, 3, 3]


def test_a_worker_without_tasks_takes_the_end_of_the_largest_segment() -> None:
    schedule = Schedule([1] * 12, 3, depth=1)
    first = {task: ticket for _, ticket, task in schedule.assignments()}
    assert sorted(first) == [0, 4, 8]
    tasks = []
    ticket = first[8]
    for _ in range(6):  # the third worker alone goes on: its own three, then halves of what others have
        schedule.answered(ticket)
        [(worker, ticket, task)] = schedule.assignments()
        assert worker == 2
        tasks.append(task)
    assert tasks == [9, 10, 11, 2, 3, 6]


def test_an_earlier_owner_is_preferred() -> None:
    schedule = Schedule([5] * 6, 2, prefer=[1, 0, 1, 0, None, 7])
    run_to_the_end(schedule)
    assert schedule.owners[:4] == (1, 0, 1, 0)


def test_no_worker_has_more_than_depth_tasks_and_idle_ones_come_first() -> None:
    schedule = Schedule([1] * 100, 3, depth=2)
    assert [worker for worker, _, _ in schedule.assignments()] == [0, 1, 2, 0, 1, 2]
    assert schedule.assignments() == []


def test_what_was_done_before_is_not_given_again() -> None:
    schedule = Schedule([1] * 5, 1, done=[0, 3])
    assert [task for _, _, task in run_to_the_end(schedule)] == [1, 2, 4]
    assert schedule.num_recorded == 5
    assert Schedule([1, 1], 1, done=[0, 1]).finished


def test_a_lost_worker_gives_back_what_it_ran_and_what_it_held() -> None:
    schedule = Schedule([1] * 7, 2)
    tickets = {task: ticket for _, ticket, task in schedule.assignments()}
    assert sorted(tickets) == [0, 1, 3, 4]
    schedule.recorded(1, [2, 5, 6])  # all others
    schedule.answered(tickets[0])
    schedule.lost(0, "killed")
    assert schedule.assignments() == []  # the other one is full, and a lost one gets nothing
    schedule.answered(tickets[3])
    schedule.answered(tickets[4])
    [(worker, again, task)] = schedule.assignments()
    assert (worker, task) == (1, 1)
    schedule.answered(tickets[1])  # late news of a ticket that was given back
    assert schedule.num_running == 1
    schedule.recorded(1, [3, 4])
    schedule.answered(again)
    [(worker, again, task)] = schedule.assignments()
    assert (worker, task) == (1, 0)
    schedule.answered(again)
    assert schedule.holding() == (1,)
    schedule.recorded(1, [0, 1])
    assert schedule.finished
    assert schedule.num_retries == 2


def test_the_last_tasks_wait_for_idle_workers_and_not_behind_a_busy_one() -> None:
    schedule = Schedule([1] * 5, 2)
    tickets = {task: ticket for _, ticket, task in schedule.assignments()}
    assert sorted(tickets) == [0, 1, 2]  # two are left, one a worker
    schedule.answered(tickets[2])
    assert [(worker, task) for worker, _, task in schedule.assignments()] == [(1, 3)]


def test_a_record_that_comes_late_still_counts() -> None:
    schedule = Schedule([1] * 2, 2, depth=1)
    (_, first, _), (_, second, _) = schedule.assignments()
    schedule.answered(first)
    schedule.lost(0)
    schedule.answered(second)
    [(worker, ticket, task)] = schedule.assignments()
    assert (worker, task) == (1, 0)
    schedule.recorded(0, [0])  # it was durable before the worker died
    schedule.answered(ticket)
    schedule.recorded(1, [1])
    assert schedule.finished
    assert schedule.recorded_by == [1, 1]
    assert schedule.num_running == 0


def test_an_idle_worker_may_repeat_a_running_task_and_the_first_answer_counts() -> None:
    schedule = Schedule([1, 1], 2, depth=1)
    (_, slow, task), (fast_worker, fast, other) = schedule.assignments()
    assert schedule.idle() == ()
    schedule.answered(fast)
    schedule.recorded(fast_worker, [other])
    assert schedule.idle() == (fast_worker,)
    again = schedule.repeat(slow, fast_worker)
    assert again.task == task
    schedule.answered(again.ticket)
    schedule.recorded(fast_worker, [task])
    assert schedule.finished
    schedule.answered(slow)  # too late, and harmless
    assert schedule.holding() == ()
    assert schedule.recorded_by[fast_worker] == 2


def test_what_a_slow_worker_holds_is_given_back_when_its_task_is_repeated() -> None:
    schedule = Schedule([1] * 6, 2)
    tickets = {task: ticket for _, ticket, task in schedule.assignments()}
    schedule.answered(tickets[0])  # held by worker 0, which hangs in task 1
    for task in (3, 4):
        schedule.answered(tickets[task])
    schedule.recorded(1, [2, 3, 4, 5])
    assert (schedule.num_done, schedule.num_pending) == (5, 0)
    schedule.answered(schedule.repeat(tickets[1], 1).ticket)
    assert schedule.holding() == ()
    [(worker, ticket, task)] = schedule.assignments()
    assert (worker, task, schedule.num_retries) == (1, 0, 1)
    schedule.answered(ticket)
    assert schedule.holding() == (1,)
    schedule.recorded(1, [0, 1])
    assert schedule.finished


def test_a_record_may_name_tasks_that_are_recorded_already() -> None:
    schedule = Schedule([1] * 4, 2, depth=1)
    assert (schedule.num_done, schedule.num_recorded) == (0, 0)
    tickets = {task: ticket for _, ticket, task in schedule.assignments()}
    schedule.answered(tickets[0])
    assert (schedule.num_done, schedule.holding()) == (1, ())
    schedule.recorded(0, [0])
    assert schedule.num_recorded == 1
    schedule.recorded(0, [0, 1])
    schedule.answered(tickets[2])
    schedule.recorded(1, [2, 3])
    assert (schedule.finished, schedule.holding(), schedule.recorded_by) == (True, (), [2, 2])


def test_ten_losses_and_three_a_worker_in_a_row_end_the_run() -> None:
    schedule = Schedule([1] * 50, 2)
    for _ in range(15):
        schedule.lost(0, "killed")
    assert schedule.failure is None
    schedule.lost(1, "killed")
    assert schedule.failure
    assert (schedule.failure.reason, schedule.num_losses) == ("losses", 16)


def test_a_repeated_task_is_given_back_only_when_nobody_runs_it_any_more() -> None:
    schedule = Schedule([1, 1], 2, depth=1)
    (slow_worker, slow, _), (fast_worker, fast, other) = schedule.assignments()
    schedule.answered(fast)
    schedule.recorded(fast_worker, [other])
    again = schedule.repeat(slow, fast_worker)
    schedule.lost(slow_worker)
    assert (schedule.num_pending, schedule.num_running) == (0, 1)
    schedule.refused(again.ticket, "unavailable", GONE)
    assert schedule.num_pending == 1


def test_a_lost_worker_works_again_when_it_is_ready() -> None:
    schedule = Schedule([1], 1)
    schedule.assignments()
    schedule.lost(0)
    assert schedule.assignments() == []
    schedule.ready(0)
    schedule.ready(0)
    assert [task for _, _, task in schedule.assignments()] == [0]


def test_a_worker_lost_in_an_earlier_round_gets_nothing_until_it_is_ready() -> None:
    schedule = Schedule([1] * 4, 2, lost={1})
    assert {assignment.worker for assignment in schedule.assignments()} == {0}
    schedule.ready(1)
    assert {assignment.worker for assignment in schedule.assignments()} == {1}
    assert schedule.num_losses == 0


@pytest.mark.parametrize("kind", ["input", "recipe", "cancelled"])
def test_an_error_that_no_retry_mends_ends_the_run_at_once(kind: str) -> None:
    schedule = Schedule([1] * 3, 1)
    _, ticket, task = schedule.assignments()[0]
    schedule.refused(ticket, kind, GONE, "trace")  # type: ignore[arg-type]
    assert schedule.failure is not None
    assert (schedule.failure.reason, schedule.failure.kind, schedule.failure.task) == ("refused", kind, task)
    assert (schedule.failure.problems, schedule.failure.traceback) == (GONE, "trace")
    assert schedule.assignments() == []


def test_a_refused_task_is_tried_elsewhere_until_its_attempts_are_used_up() -> None:
    schedule = Schedule([1], 2)
    workers = []
    for _ in range(3):
        assert schedule.failure is None
        [(worker, ticket, _)] = schedule.assignments()
        workers.append(worker)
        schedule.refused(ticket, "unavailable", GONE)
    assert sorted(workers[:2]) == [0, 1]
    assert schedule.failure is not None
    assert (schedule.failure.reason, schedule.failure.kind) == ("attempts", "unavailable")


def test_a_refused_task_comes_back_to_its_only_worker() -> None:
    schedule = Schedule([1], 2)
    schedule.lost(1)
    [(_, ticket, _)] = schedule.assignments()
    schedule.refused(ticket, "defect", GONE)
    [(worker, _, _)] = schedule.assignments()
    assert worker == 0


def test_a_task_that_kills_three_workers_is_named_and_its_neighbours_are_not() -> None:
    schedule = Schedule([1] * 6, 3)
    poison = 3
    while schedule.failure is None:
        for worker in range(3):
            schedule.ready(worker)
        for worker, ticket, task in schedule.assignments():
            if task == poison:
                schedule.lost(worker, "out of memory")
                break
            schedule.answered(ticket)
            schedule.recorded(worker, [task])
    assert (schedule.failure.reason, schedule.failure.task) == ("poisoned", poison)
    assert "task 3: 3 workers were lost while they ran it; the last: out of memory" in str(schedule.failure.problems[0])


def test_where_workers_are_lost_all_the_time_a_task_is_named_later_but_named() -> None:
    schedule = Schedule([1] * 40, 4, depth=1, losses=10**6)
    poison, others = 7, 0
    while schedule.failure is None:
        for worker in range(4):
            schedule.ready(worker)
        for worker, ticket, task in schedule.assignments():
            others += task != poison
            if task == poison or others % 3 == 0:  # every third of the others is lost, too
                schedule.lost(worker, "preempted")
            else:
                schedule.answered(ticket)
    assert (schedule.failure.reason, schedule.failure.task) == ("poisoned", poison)
    kills = int(str(schedule.failure.problems[0]).split("task 7: ")[1].split()[0])
    assert 3 < kills < 20


def test_losing_workers_for_nothing_ends_the_run_and_progress_forgives() -> None:
    schedule = Schedule([1] * 50, 1, losses=3, kills=99)
    for _ in range(10):
        schedule.lost(0)
        schedule.lost(0)  # it could not be brought back
        assert schedule.failure is None
        schedule.ready(0)
        worker, _, task = schedule.assignments()[0]
        schedule.recorded(worker, [task])
    for _ in range(3):
        schedule.lost(0, "preempted")
    assert schedule.failure is not None
    assert schedule.failure.reason == "losses"
    assert "3 workers were lost with nothing finished in between; the last: preempted" in str(
        schedule.failure.problems[0]
    )


class Simulation:
    """Workers that may do anything an executor can report, in any order; checks the rules at each step."""

    def __init__(self, costs: list[int], workers: int, depth: int) -> None:
        self.costs, self.depth = costs, depth
        self.schedule = Schedule(costs, workers, depth=depth)
        self.running: dict[int, tuple[int, int]] = {}
        self.held: list[set[int]] = [set() for _ in range(workers)]
        self.stale: list[int] = []
        self.late: list[tuple[int, int]] = []
        self.lost: set[int] = set()
        self.recorded: set[int] = set()

    def assign(self) -> None:
        for worker, ticket, task in self.schedule.assignments():
            assert worker not in self.lost
            assert task not in self.recorded
            assert task not in {task for _, task in self.running.values()}
            assert all(task not in held for held in self.held)
            self.running[ticket] = (worker, task)
            assert sum(w == worker for w, _ in self.running.values()) <= self.depth

    def answer(self, choose: Callable[[int], int]) -> None:
        if self.running:
            ticket = sorted(self.running)[choose(len(self.running))]
            worker, task = self.running.pop(ticket)
            self.stale.append(ticket)
            self.schedule.answered(ticket)
            if task not in self.recorded:
                self.held[worker].add(task)

    def record(self, choose: Callable[[int], int]) -> None:
        worker = choose(len(self.held))
        self.schedule.recorded(worker, self.held[worker])
        self.recorded |= self.held[worker]
        self.held[worker].clear()

    def refuse(self, choose: Callable[[int], int]) -> None:
        if self.running:
            ticket = sorted(self.running)[choose(len(self.running))]
            del self.running[ticket]
            self.stale.append(ticket)
            self.schedule.refused(ticket, "unavailable", GONE)

    def lose(self, choose: Callable[[int], int]) -> None:
        worker = choose(len(self.held))
        mine = [ticket for ticket, (w, _) in self.running.items() if w == worker]
        self.late += [(worker, task) for task in self.held[worker]]
        self.stale += mine
        for ticket in mine:
            del self.running[ticket]
        self.held[worker].clear()
        self.lost.add(worker)
        self.schedule.lost(worker)

    def ready(self, choose: Callable[[int], int]) -> None:
        worker = choose(len(self.held))
        self.lost.discard(worker)
        self.schedule.ready(worker)

    def late_news(self, choose: Callable[[int], int]) -> None:
        if self.stale:
            self.schedule.answered(self.stale[choose(len(self.stale))])
            self.schedule.refused(self.stale[choose(len(self.stale))], "input", GONE)
        if self.late:
            worker, task = self.late[choose(len(self.late))]
            self.schedule.recorded(worker, [task])
            self.recorded.add(task)
            for held in self.held:
                held.discard(task)

    def finish(self) -> None:
        """Let everything go well from here."""
        for worker in range(len(self.held)):
            self.lost.discard(worker)
            self.schedule.ready(worker)
        for _ in range(10 * len(self.costs) + 10):
            self.assign()
            for _ in tuple(self.running):
                self.answer(lambda _: 0)
            for worker in range(len(self.held)):
                self.record(lambda _, worker=worker: worker)  # type: ignore[misc]


@settings(max_examples=200, deadline=None)
@given(
    costs=st.lists(st.integers(0, 20), min_size=1, max_size=25),
    workers=st.integers(1, 5),
    depth=st.integers(1, 3),
    story=st.lists(
        st.tuples(
            st.sampled_from(["answer", "answer", "answer", "record", "refuse", "lose", "ready", "ready", "late_news"]),
            st.integers(0, 10**6),
        ),
        max_size=120,
    ),
)
def test_whatever_happens_every_task_is_recorded_or_the_run_fails_by_name(
    costs: list[int], workers: int, depth: int, story: list[tuple[str, int]]
) -> None:
    simulation = Simulation(costs, workers, depth)
    for step, number in story:
        simulation.assign()
        getattr(simulation, step)(lambda count, number=number: number % count)
        assert simulation.schedule.num_recorded == len(simulation.recorded)
        assert simulation.schedule.num_done == len(simulation.recorded) + sum(map(len, simulation.held))
        if simulation.schedule.failure is not None:
            break
    simulation.finish()
    failure = simulation.schedule.failure
    if failure is None:
        assert simulation.schedule.finished
        assert simulation.recorded == set(range(len(costs)))
        assert sum(simulation.schedule.recorded_by) == len(costs)
    else:
        assert failure.reason in ("attempts", "poisoned", "losses")
        assert (failure.task is None) == (failure.reason == "losses")
        assert failure.problems


def test_it_imports_neither_ray_nor_fsspec_nor_torch() -> None:
    code = "import sys, ties_ray.driver.schedule;"
    code += "print([name for name in ('ray', 'fsspec', 'torch', 'numpy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
