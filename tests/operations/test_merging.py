"""What workers tell reaches the caller, and the next stage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tools.families import Family
from tests.tools.merging import LOCAL, digests, merge
from ties_ray.driver import crew
from ties_ray.driver.schedule import Schedule
from ties_ray.errors import InputError, Problem, UnavailableError
from ties_ray.executors.local import LocalExecutor
from ties_ray.worker import worker

MakeFamily = Callable[..., Family]
TWO = {**LOCAL, "workers": 2}


@pytest.mark.parametrize(("kind", "code"), [(UnavailableError, 5), (InputError, 3)])
def test_what_a_worker_fails_with_decides_the_exit_code(
    kind: type[UnavailableError | InputError], code: int, family_of: MakeFamily, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(self: worker.Worker, *_: object) -> None:
        raise kind(Problem("s3://models/7", "is throttled", "wait"))

    monkeypatch.setattr(worker.Worker, "_shard", fail)
    with pytest.raises(kind, match="s3://models/7: is throttled; wait") as raised:
        merge(family_of(num_models=2), tmp_path / "out", "average", run=TWO)
    assert (raised.value.exit_code, raised.value.kind) == (code, "unavailable" if code == 5 else "input")


def test_a_place_whose_worker_is_yet_to_come_gets_no_work(
    family_of: MakeFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_of(num_models=2)
    merge(family, tmp_path / "wanted", "ties")
    losses: list[frozenset[int]] = []
    owners: list[int | None] = []

    class Watched(Schedule):
        """Notes which workers it must not use."""

        def __init__(self, *positional: Any, lost: frozenset[int] = frozenset(), **named: Any) -> None:
            super().__init__(*positional, lost=lost, **named)
            losses.append(lost)

        @property
        def owners(self) -> tuple[int | None, ...]:
            owners.extend(super().owners)
            return super().owners

    monkeypatch.setattr(crew, "Schedule", Watched)
    monkeypatch.setattr(LocalExecutor, "empty_places", lambda _: frozenset({1}))
    merge(family, tmp_path / "out", "ties", run=TWO)
    assert len(losses) > 3
    assert set(losses) == {frozenset({1})}
    assert set(owners) - {None} == {0}
    assert digests(tmp_path / "out") == digests(tmp_path / "wanted")
