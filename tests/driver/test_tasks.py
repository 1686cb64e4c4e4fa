"""Independent tasks on an executor: each is answered once, whatever becomes of the workers."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from ties_ray.driver.tasks import Tasks
from ties_ray.errors import InputError, InterruptedMerge
from ties_ray.executors import Needs, WorkerDied


class DiesOnce:
    """Dies over the message `die FILE` unless the file exists; answers with how many messages it has handled."""

    def __init__(self, setup: str) -> None:
        self._count = 0

    def run(self, message: str) -> str:
        self._count += 1
        _, _, name = message.partition("die ")
        if name and not Path(name).exists():
            Path(name).touch()
            raise WorkerDied("its device is gone")
        return f"{message}:{self._count}"


def tasks(num_workers: int, factory: str = "ties_ray.testing.echo:EchoHost", **more: Callable[[str], None]) -> Tasks:
    return Tasks("local", factory, "s", Needs(num_workers, 2**20, **more))


def answers(crew: Tasks, messages: Mapping[int, str]) -> dict[int, str]:
    turns = list(crew.carry_out(messages))
    every = [answer for turn in turns for answer in turn]
    assert len(every) == len(messages), "each task is answered once"
    return dict(every)


def test_every_task_is_answered_and_workers_stay_for_the_next_ones() -> None:
    with tasks(1) as crew:
        assert answers(crew, {7: "a", 3: "b"}) == {7: "1:s:a", 3: "2:s:b"}
        assert answers(crew, {0: "c"}) == {0: "3:s:c"}
        assert answers(crew, {}) == {}


def test_workers_work_at_the_same_time(tmp_path: Path) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    with tasks(2) as crew:
        assert crew.size == 2
        assert len(answers(crew, {0: f"meet {one} {two}", 1: f"meet {two} {one}", 2: "x"})) == 3


def test_a_turn_without_an_answer_yields_nothing() -> None:
    with tasks(1) as crew:
        turns = list(crew.carry_out({0: "sleep 1.3"}))
    assert turns[0] == []
    assert turns[-1] == [(0, "1:s:sleep 1.3")]


def test_the_task_of_a_lost_worker_is_done_again_by_another(tmp_path: Path) -> None:
    lines: list[str] = []
    with tasks(2, "tests.driver.test_tasks:DiesOnce", announce=lines.append) as crew:
        done = answers(crew, {number: f"die {tmp_path / str(number % 2)}" for number in range(4)})
    assert done.keys() == {0, 1, 2, 3}
    assert len(lines) == 2
    assert "is lost (WorkerDied: its device is gone): another one takes its place" in lines[0]


def test_a_task_that_costs_three_workers_ends_it() -> None:
    with (
        tasks(1) as crew,
        pytest.raises(InterruptedMerge, match="task 5: has lost 3 workers, the last one by: WorkerD"),
    ):
        answers(crew, {5: "die"})


def test_an_error_of_a_host_comes_out() -> None:
    with tasks(1) as crew, pytest.raises(InputError, match="s3://m/7: is gone; bring it back"):
        answers(crew, {0: "input"})
    with pytest.raises(InputError, match="setup: is broken"):
        Tasks("local", "ties_ray.testing.echo:EchoHost", "broken", Needs(1, 2**20))
