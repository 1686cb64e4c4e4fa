"""One run at a time: who holds an output, who waits, who takes over, who is fenced."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.conftest import Bucket
from ties_ray.errors import InterruptedMerge, UnavailableError
from ties_ray.state import lease
from ties_ray.stores import Stores


@pytest.fixture(autouse=True)
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "STILL_SECONDS", 1.0)


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Stores, str]:
    if request.param == "local":
        return Stores({}), str(tmp_path / "out")
    if request.param == "memory":
        return Stores({}), f"memory://{tmp_path.name}/out"
    bucket: Bucket = request.getfixturevalue("s3_bucket")
    return Stores(bucket.storage), f"{bucket.uri}/out"


def never(text: str) -> None:
    raise AssertionError(text)


def test_a_second_run_is_refused_while_the_first_one_lives(place: tuple[Stores, str]) -> None:
    with lease.acquire(*place, never) as held:
        with pytest.raises(UnavailableError, match="another run is at work there: process"):
            lease.acquire(*place, never)
        held.check()


def test_a_released_output_is_free_at_once(place: tuple[Stores, str]) -> None:
    lease.acquire(*place, never).release()
    with lease.acquire(*place, never) as held:
        held.check()


def test_a_holder_that_stands_still_is_taken_over_and_fenced(place: tuple[Stores, str]) -> None:
    first = lease.acquire(*place, never)
    first._ended.set()  # as a process that is stopped, or cut off: no more beats, though it lives
    said: list[str] = []
    with lease.acquire(*place, said.append) as second:
        second.check()
        with pytest.raises(InterruptedMerge, match="another run took over"):
            first.check()
        first.release()
        second.check()
    assert len(said) == 1
    assert "gave no sign of life" in said[0]


def test_a_dead_process_of_this_machine_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "STILL_SECONDS", 3600.0)
    script = (
        "import os; from ties_ray.state import lease; from ties_ray.stores import Stores;"
        f"lease.acquire(Stores({{}}), {str(tmp_path)!r}, print); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    said: list[str] = []
    with lease.acquire(Stores({}), str(tmp_path), said.append) as held:
        held.check()
    assert said


def test_of_many_that_come_at_once_one_gets_the_output(place: tuple[Stores, str]) -> None:
    got: list[lease.Lease] = []
    refused: list[UnavailableError] = []

    def come() -> None:
        try:
            got.append(lease.acquire(*place, never))
        except UnavailableError as error:
            refused.append(error)

    threads = [threading.Thread(target=come) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 5)
    got[0].check()
    got[0].release()


def test_the_heartbeat_goes_on(place: tuple[Stores, str]) -> None:
    with lease.acquire(*place, never) as held:
        stores, output = place
        uri = f"{output}/.ties-ray/lease.json"
        before = lease._read(stores.of(output), uri)
        held._ended.wait(1.0)
        after = lease._read(stores.of(output), uri)
    assert before is not None
    assert after is not None
    assert after[0].beat > before[0].beat
    assert after[0].token == before[0].token


def test_a_lease_that_is_shown_but_not_there_is_given_up_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores, output = Stores({}), str(tmp_path)
    first = lease.acquire(stores, output, never)
    first._ended.set()
    shown = lease._read(stores.of(output), f"{output}/.ties-ray/lease.json")
    first.release()
    monkeypatch.setattr(lease, "_read", lambda store, uri: shown)  # an old copy, for ever
    with pytest.raises(UnavailableError, match="can be read, but not replaced"):
        lease.acquire(stores, output, never)


def test_to_replace_what_has_gone_is_an_unmet_condition(s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{s3_bucket.uri}/x"
    store = Stores(s3_bucket.storage).of(uri)
    pin = store.put(uri, b"old")
    store.delete(uri)
    head = type(store).head
    answers = [(pin, b"")]  # the first look is shown an old copy
    monkeypatch.setattr(type(store), "head", lambda self, *asked: answers.pop() if answers else head(self, *asked))
    assert store.swap(uri, b"new", pin.etag) is None
