"""The choice between conditional writes and their substitute; `test_s3_dialects.py` has it at real services."""

import hashlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from ties_ray import runtime
from ties_ray.errors import Problem
from ties_ray.stores import Pin
from ties_ray.stores._s3_conditions import ConditionalWrites
from ties_ray.stores._s3_errors import Unconditional, Unmet

URI = "s3://bucket/lease"


def mark(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


class Objects:
    """Objects of a service that keeps conditions, ignores them, or refuses them."""

    def __init__(self, how: str = "keeps") -> None:
        self.how = how
        self.data: dict[str, bytes] = {}
        self.writes: list[dict[str, str]] = []
        self.between: Callable[[], None] = lambda: None
        """Another writer, between a look and the next write."""

    def head(self, uri: str, nbytes: int) -> tuple[Pin, bytes]:
        if uri not in self.data:
            raise FileNotFoundError(uri)
        data = self.data[uri]
        return Pin(uri, len(data), mark(data)), data[:nbytes]

    def put(self, uri: str, data: bytes) -> Pin:
        self.put_if(uri, data, {})
        return self.head(uri, 0)[0]

    def put_if(self, uri: str, data: bytes, condition: dict[str, str]) -> Any:
        self.writes.append(condition)
        other, self.between = self.between, lambda: None
        other()
        if condition and self.how == "refuses":
            raise Unconditional(Problem("", "no conditions", "use another service"))
        if self.how == "keeps":
            if "IfMatch" in condition and uri not in self.data:
                raise FileNotFoundError(uri)
            there = mark(self.data[uri]) if uri in self.data else ""
            if "IfMatch" in condition and condition["IfMatch"] != f'"{there}"':
                raise Unmet(Problem(uri, "another writer", "run again"))
            if condition.get("IfNoneMatch") == "*" and there:
                raise Unmet(Problem(uri, "another writer", "run again"))
        self.data[uri] = data
        return {"ETag": f'"{mark(data)}"'}


class Service:
    def __init__(self, is_aws: bool = False) -> None:
        self.notes: list[str] = []
        self.note = self.notes.append
        self.connected = lambda uri: SimpleNamespace(is_aws=is_aws)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the waits, which take no time."""
    seconds: list[float] = []
    monkeypatch.setattr(runtime, "sleep", seconds.append)
    monkeypatch.setattr(runtime, "monotonic", lambda: 7.0)
    return seconds


def writes_of(objects: Objects, *, is_aws: bool = False) -> tuple[ConditionalWrites, Service]:
    service = Service(is_aws)
    return ConditionalWrites(service, objects), service  # type: ignore[arg-type]


def test_a_service_that_keeps_conditions_is_tried_once_for_each_and_never_waited_for(waits: list[float]) -> None:
    objects = Objects()
    conditions, service = writes_of(objects)
    first = conditions.swap(URI, b"1", "", 2.0)
    assert first == Pin(URI, 1, mark(b"1"))
    assert objects.writes == [{"IfNoneMatch": "*"}] * 2
    second = conditions.swap(URI, b"2", first.etag, 2.0)
    assert second == Pin(URI, 1, mark(b"2"))
    assert objects.writes[2:] == [{"IfMatch": f'"{mark(b"1")}"'}, {"IfMatch": f'"{"0" * 32}"'}]
    assert conditions.swap(URI, b"3", second.etag, 2.0)
    assert len(objects.writes) == 5
    assert conditions.swap("s3://other/lease", b"1", "", 2.0)
    assert len(objects.writes) == 7, "each bucket is tried"
    assert (waits, service.notes) == ([], [])


def test_aws_is_known_to_keep_conditions(waits: list[float]) -> None:
    objects = Objects()
    conditions, service = writes_of(objects, is_aws=True)
    assert conditions.swap(URI, b"1", "", 2.0)
    assert conditions.swap(URI, b"2", mark(b"1"), 2.0)
    assert (len(objects.writes), waits, service.notes) == (2, [], [])


@pytest.mark.parametrize("how", ["keeps", "ignores", "refuses"])
def test_nothing_is_written_where_the_object_shows_another_mark(how: str, waits: list[float]) -> None:
    objects = Objects(how)
    conditions, _ = writes_of(objects)
    assert conditions.swap(URI, b"1", mark(b"0"), 2.0) is None
    objects.data[URI] = b"0"
    assert conditions.swap(URI, b"1", "", 2.0) is None
    assert conditions.swap(URI, b"1", mark(b"x"), 2.0) is None
    assert objects.writes == []


@pytest.mark.parametrize("there", [b"another's", b"", None, b"mine and more"])
def test_a_write_that_another_has_overtaken_is_not_ours(there: bytes | None, waits: list[float]) -> None:
    objects = Objects()
    objects.data[URI] = b"0"
    conditions, _ = writes_of(objects)
    objects.between = lambda: objects.data.__setitem__(URI, there) if there is not None else objects.data.clear()
    assert conditions.swap(URI, b"mine", mark(b"0"), 2.0) is None
    assert objects.data.get(URI) == there
    assert waits == []


def test_a_write_whose_answer_was_lost_is_ours(waits: list[float]) -> None:
    objects = Objects()
    conditions, _ = writes_of(objects)
    objects.between = lambda: objects.data.__setitem__(URI, b"mine")  # as the first try has done
    assert conditions.swap(URI, b"mine", "", 2.0) == Pin(URI, 4, mark(b"mine"))


@pytest.mark.parametrize("how", ["ignores", "refuses"])
def test_without_conditions_a_writer_waits_and_looks_whether_another_did_too(
    how: str, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    objects = Objects(how)
    conditions, service = writes_of(objects)
    assert conditions.swap(URI, b"1", "", 2.0) == Pin(URI, 1, mark(b"1"))
    assert waits == [2.0]
    assert "s3://bucket: the service keeps no If-None-Match on writes" in service.notes[0]
    assert "waits 2 s and looks" in service.notes[0]
    assert objects.writes == [{"IfNoneMatch": "*"}, {"IfNoneMatch": "*"} if how == "ignores" else {}]
    objects.data.clear()
    assert conditions.swap(URI, b"1", "", 2.0)
    assert objects.writes[2:] == [{}], "it is known by now"
    monkeypatch.setattr(runtime, "sleep", lambda seconds: objects.data.__setitem__(URI, b"rival"))
    assert conditions.swap(URI, b"2", mark(b"1"), 2.0) is None
    assert "keeps no If-Match on writes" in service.notes[-1]
    monkeypatch.setattr(runtime, "sleep", lambda seconds: objects.data.clear())
    assert conditions.swap(URI, b"3", mark(b"rival"), 2.0) is None


def test_a_slow_service_is_waited_for_twice_as_long_as_it_took(
    monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    times = iter([100.0, 103.0])
    monkeypatch.setattr(runtime, "monotonic", lambda: next(times))
    conditions, _ = writes_of(Objects("refuses"))
    assert conditions.swap(URI, b"1", "", 2.0)
    assert waits == [6.0]
