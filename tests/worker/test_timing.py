"""Where the time of workers goes: the split in the result, and the profile."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tools.families import Family
from tests.tools.merging import LOCAL, recipe_of
from ties_ray.errors import InputError
from ties_ray.operations import merging
from ties_ray.reports.records import Progress
from ties_ray.stores.local import Local
from ties_ray.worker import timing
from ties_ray.worker.timing import Span, Times, Trace


def read(path: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(path.read_text())
    return events


def test_seconds_are_summed_over_threads_and_told_once() -> None:
    times = Times()

    def wait() -> None:
        with times.spent("read"):
            time.sleep(0.05)

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, spans = times.take()
    assert seconds["read"] >= 0.15
    assert (set(seconds), spans) == (set(timing.ACTIVITIES), ())
    assert times.take()[0]["read"] == 0


def test_a_span_has_its_thread_its_place_in_time_and_its_bytes() -> None:
    times = Times(profiled=True)
    before = time.time()
    with pytest.raises(ZeroDivisionError), times.spent("work", "shard 7"):
        _ = 1 // 0
    with times.spent("write", nbytes=12):
        time.sleep(0.01)
    first, second = times.take()[1]
    assert (first.name, first.thread, first.bytes) == ("shard 7", "MainThread", 0)
    assert (second.name, second.bytes) == ("write", 12)
    assert before - 0.1 <= first.start <= second.start <= time.time() - second.seconds + 0.1
    assert times.take()[1] == ()


def test_more_spans_than_an_answer_can_hold_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MOST", 3)
    times = Times(profiled=True)
    for _ in range(5):
        with times.spent("read"):
            pass
    *_, last = spans = times.take()[1]
    assert (len(spans), last.name) == (4, "and 2 more, not shown")


def test_the_file_is_what_a_browser_takes(tmp_path: Path) -> None:
    now = time.time()
    with Trace(tmp_path / "profile.json") as file:
        file.add("worker 1", [Span("shard 0", "a", now, 0.5), Span("read", "b", now + 0.1, 0.25, 4096)])
        file.add("worker 2", [Span("shard 1", "a", now, 0.5)])
    events = read(tmp_path / "profile.json")
    spans = [event for event in events if event["ph"] == "X"]
    assert [event["name"] for event in spans] == ["shard 0", "read", "shard 1"]
    assert spans[1]["ts"] - spans[0]["ts"] == pytest.approx(100_000, abs=2)
    assert (spans[1]["dur"], spans[1]["args"]) == (250_000, {"bytes": 4096})
    assert spans[0]["pid"] == spans[1]["pid"] != spans[2]["pid"]
    assert len({event["tid"] for event in spans}) == 3
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert [names[event["pid"]] for event in spans] == ["worker 1", "worker 1", "worker 2"]


def test_a_file_that_can_not_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing/profile\.json: the profile can't be written: No such file.*another"):
        Trace(tmp_path / "missing" / "profile.json")


def test_a_merge_tells_what_its_workers_did(family_of: Callable[..., Family], tmp_path: Path) -> None:
    recipe = recipe_of(family_of(hidden=256, shards=2), tmp_path / "out", "ties", run={**LOCAL, "workers": 2})
    result = merging.merge(recipe, profile=tmp_path / "profile.json")
    spent = result.worker_seconds
    assert set(spent) == {"merge", "wait_read", "wait_write", "idle", "read", "write"}
    assert min(spent.values()) >= 0
    assert sum(spent[name] for name in ("merge", "wait_read", "wait_write", "idle")) <= 2 * result.seconds
    events = read(tmp_path / "profile.json")
    spans = [event for event in events if event["ph"] == "X"]
    assert sum(event["args"]["bytes"] for event in spans if event["name"] == "read") == result.bytes_read
    shards = {event["name"] for event in spans if ": shard " in event["name"]}
    assert len(shards) == result.shards
    named = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert "stages" in named
    assert len(named) == 3
    of_round = [event for event in spans if event["name"] == "merge"]  # the stage lies around its shards
    assert of_round
    for event in spans:
        if event["name"].startswith("merge: shard"):
            (stage,) = of_round
            assert stage["ts"] - 1000 <= event["ts"] <= stage["ts"] + stage["dur"]


@pytest.mark.parametrize(("slow", "other"), [("read", "write"), ("write", "read")])
def test_seconds_of_reads_and_of_writes_stand_under_their_own_names(
    slow: str, other: str, family_of: Callable[..., Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"read": "read", "write": "write_part"}[slow]
    plain = getattr(Local, method)

    def late(self: Local, *words: object) -> object:
        time.sleep(0.3)
        return plain(self, *words)

    monkeypatch.setattr(Local, method, late)
    recipe = recipe_of(family_of(num_models=2), tmp_path / "out", {"name": "ties", "density": 1}, run=LOCAL)
    spent = merging.merge(recipe).worker_seconds
    assert spent[slow] >= 0.3 > spent[other]
    assert spent[f"wait_{slow}"] > spent[f"wait_{other}"]


def test_a_failed_merge_leaves_its_profile(family_of: Callable[..., Family], tmp_path: Path) -> None:
    recipe = recipe_of(family_of(), tmp_path / "out", "ties")

    def watch(progress: Progress) -> None:
        if progress.stage == "publish":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merging.merge(recipe, watch=watch, profile=tmp_path / "profile.json")
    assert any(event["ph"] == "X" for event in read(tmp_path / "profile.json"))
