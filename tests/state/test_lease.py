"""One run at a time: who holds an output, who waits, who takes over, who is fenced."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Bucket
from ties_ray.errors import InterruptedMerge, Problem, UnavailableError
from ties_ray.state import lease
from ties_ray.stores import Pin, Stores
from ties_ray.stores.memory import Memory


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
    for _ in range(2):
        with lease.acquire(*place, never) as held:
            held.check()


def test_a_holder_that_stands_still_is_taken_over_and_fenced(place: tuple[Stores, str]) -> None:
    first = lease.acquire(*place, never)
    first._ended.set()  # as a process that is stopped, or cut off: no more beats, though it lives
    said: list[str] = []
    with lease.acquire(*place, said.append) as second:
        second.check()
        with pytest.raises(
            InterruptedMerge, match=rf"another run took over \(.*, process {os.getpid()}-.* holds it now\)"
        ):
            first.check()
        first.release()
        second.check()
        second.release()
        with pytest.raises(InterruptedMerge, match="nobody holds it now"):
            first.check()
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
    monkeypatch.setattr(lease, "STILL_SECONDS", 0.5)
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


# -- a store whose answers are lost, refused or wrong

Swap = Callable[[Memory, str, bytes, str], Pin | None]


def lost(store: Memory, uri: str, data: bytes, etag: str) -> None:
    """Write, and tell nobody."""
    SWAP(store, uri, data, etag)


def unmet(store: Memory, uri: str, data: bytes, etag: str) -> None:
    """Write nothing, as somebody else came first."""


def away(store: Memory, uri: str, data: bytes, etag: str) -> None:
    raise UnavailableError(Problem(uri, "is throttled", "wait"))


def overwritten(store: Memory, uri: str, data: bytes, etag: str) -> Pin | None:
    """Write, and let another run write too, as a server does that ignores conditions."""
    pin = SWAP(store, uri, data, etag)
    store.put(uri, OTHER.model_dump_json().encode())
    return pin


SWAP = Memory.swap
OTHER = lease.Holder(token="0" * 32, host="there", machine="another", process="1-2")


@pytest.fixture
def here(tmp_path: Path) -> tuple[Stores, str]:
    return Stores({}), f"memory://{tmp_path.name}/out"


def stored(place: tuple[Stores, str]) -> lease.Holder:
    found = lease._read(place[0].of(place[1]), f"{place[1]}/.ties-ray/lease.json")
    assert found
    return found[0]


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("trouble", [lost, unmet, away])
def test_the_heartbeat_goes_on_after_a_lost_answer_and_while_storage_is_away(
    trouble: Swap, here: tuple[Stores, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    troubles: list[Swap] = []

    def swap(store: Memory, uri: str, data: bytes, etag: str) -> Pin | None:
        return troubles.pop()(store, uri, data, etag) if troubles else SWAP(store, uri, data, etag)

    monkeypatch.setattr(Memory, "swap", swap)
    with lease.acquire(*here, never) as held:
        wait_for(lambda: stored(here).beat > 0)
        troubles += [trouble] * 2
        wait_for(lambda: not troubles)
        beat = stored(here).beat
        wait_for(lambda: stored(here).beat > beat + 1)
        held.check()


def test_the_heartbeat_goes_on_where_an_unmet_beat_is_followed_by_a_failed_look(
    here: tuple[Stores, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[str] = []

    def read(store: Memory, uri: str) -> tuple[lease.Holder, str] | None:
        if threading.current_thread().name == "lease" and not failed:
            failed.append(uri)
            raise UnavailableError(Problem(uri, "is throttled", "wait"))
        return found(store, uri)

    found = lease._read
    troubles: list[Swap] = [unmet]
    with lease.acquire(*here, never) as held:
        monkeypatch.setattr(lease, "_read", read)
        monkeypatch.setattr(Memory, "swap", lambda *asked: (troubles.pop() if troubles else SWAP)(*asked))
        wait_for(lambda: bool(failed))
        beat = stored(here).beat
        wait_for(lambda: stored(here).beat > beat)
        held.check()


def test_a_holder_that_was_fenced_writes_no_more(here: tuple[Stores, str]) -> None:
    stores, output = here
    with lease.acquire(*here, never):
        stores.writer(output).put(f"{output}/.ties-ray/lease.json", OTHER.model_dump_json().encode())
        wait_for(lambda: not any(thread.name == "lease" for thread in threading.enumerate()))
        assert stored(here) == OTHER
    assert stored(here) == OTHER


def test_a_released_lease_leaves_no_thread(here: tuple[Stores, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 3600.0)
    held = lease.acquire(*here, never)
    assert [thread.daemon for thread in threading.enumerate() if thread.name == "lease"] == [True]
    held.release()
    wait_for(lambda: not any(thread.name == "lease" for thread in threading.enumerate()))


def test_who_comes_second_by_a_moment_tries_again(here: tuple[Stores, str], monkeypatch: pytest.MonkeyPatch) -> None:
    troubles: list[Swap] = [unmet]
    monkeypatch.setattr(Memory, "swap", lambda *asked: (troubles.pop() if troubles else SWAP)(*asked))
    with lease.acquire(*here, never) as held:
        held.check()


def test_a_server_that_ignores_conditions_makes_nobody_believe_to_hold_the_lease(
    here: tuple[Stores, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    troubles: list[Swap] = [overwritten]
    monkeypatch.setattr(Memory, "swap", lambda *asked: (troubles.pop() if troubles else SWAP)(*asked))
    said: list[str] = []
    with lease.acquire(*here, said.append) as held:
        held.check()
    assert said == ["took over from process 1 on there, which gave no sign of life"]


@pytest.mark.parametrize(
    ("content", "holder"),
    [
        (OTHER.model_dump_json(), "process 1 on there"),
        (OTHER.model_copy(update={"machine": lease._machine(), "process": ""}).model_dump_json(), "process unknown on"),
        (OTHER.model_copy(update={"machine": ""}).model_dump_json(), "process 1 on there"),
        ("no lease", "process unknown on unknown"),
    ],
    ids=["another machine", "no process", "no machine", "can't be read"],
)
def test_who_can_not_be_looked_for_is_waited_for_in_measured_steps(
    content: str, holder: str, here: tuple[Stores, str]
) -> None:
    stores, output = here
    stores.writer(output).put(f"{output}/.ties-ray/lease.json", content.encode())
    said: list[str] = []
    started, before = time.monotonic(), stores.of(output).meter.requests
    with lease.acquire(*here, said.append) as held:
        assert time.monotonic() - started >= lease.STILL_SECONDS
        assert stores.of(output).meter.requests - before <= 8 * lease.STILL_SECONDS / lease.BEAT_SECONDS + 20
        held.check()
    assert holder in said[0]


def test_a_system_that_tells_neither_machine_nor_process_has_leases_too(
    here: tuple[Stores, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "Path", lambda path: Path("/nowhere"))
    with lease.acquire(*here, never):
        assert (stored(here).machine, stored(here).process) == ("", "")
