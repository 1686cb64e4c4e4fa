"""A store of one file: local folders under `frail://`, whose process is killed, or hangs, at a chosen point, once."""

import hashlib
import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel

from ties_ray.stores import Listing, Part, Pin
from ties_ray.stores.local import Local, LocalOptions

SCHEME = "frail://"


class Point(LocalOptions):
    """Where to die; nowhere if `marker` is empty or there already."""

    when: Literal["before", "after"] = "before"
    what: str = ""
    """A method of the store."""
    uri: str = "*"
    """A pattern of its URI."""
    count: int = 1
    """At the n-th such call of a process."""
    marker: str = ""
    """The file that remembers the death."""
    how: Literal["kill", "hang"] = "kill"
    """`hang`: compute for minutes in one call into C, which no signal handler of Python interrupts."""


class Frail(Local):
    """Local files by another name."""

    options: ClassVar[type[Point]] = Point

    def __init__(self, options: BaseModel) -> None:
        super().__init__(options)
        assert isinstance(options, Point)
        self._point = options
        self._calls = 0
        self._counting = threading.Lock()

    def list(self, uri: str) -> Listing:
        self._step("before", "list", uri)
        found = super().list(_path(uri))
        return Listing(tuple(map(_named, found.files)), tuple(SCHEME + folder for folder in found.folders))

    def head(self, uri: str, nbytes: int) -> tuple[Pin, bytes]:
        self._step("before", "head", uri)
        pin, data = super().head(_path(uri), nbytes)
        return _named(pin), data

    def read(self, pin: Pin, start: int, into: memoryview) -> None:
        self._step("before", "read", pin.uri)
        super().read(pin._replace(uri=_path(pin.uri)), start, into)

    def put(self, uri: str, data: bytes) -> Pin:
        return _named(self._around("put", uri, data))

    def swap(self, uri: str, data: bytes, etag: str) -> Pin | None:
        return super().swap(_path(uri), data, etag)

    def delete(self, uri: str) -> None:
        self._around("delete", uri)

    def delete_folder(self, uri: str) -> None:
        super().delete_folder(_path(uri))

    def begin_upload(self, uri: str, size: int) -> str:
        return str(self._around("begin_upload", uri, size))

    def write_part(self, uri: str, upload: str, number: int, offset: int, data: memoryview) -> Part:
        return Part(*self._around("write_part", uri, upload, number, offset, data))

    def list_parts(self, uri: str, upload: str) -> tuple[Part, ...] | None:
        return super().list_parts(_path(uri), upload)

    def list_uploads(self, folder: str) -> tuple[tuple[str, str], ...]:
        return tuple((SCHEME + uri, upload) for uri, upload in super().list_uploads(_path(folder)))

    def complete_upload(self, uri: str, upload: str, parts: Sequence[Part]) -> Pin:
        return _named(self._around("complete_upload", uri, upload, parts))

    def abort_upload(self, uri: str, upload: str) -> None:
        super().abort_upload(_path(uri), upload)

    def _around(self, what: str, uri: str, *rest: object) -> Any:
        self._step("before", what, uri)
        result = getattr(super(), what)(_path(uri), *rest)
        self._step("after", what, uri)
        return result

    def _step(self, when: str, what: str, uri: str) -> None:
        point = self._point
        if (when, what) != (point.when, point.what) or not fnmatch(uri, point.uri) or not point.marker:
            return
        with self._counting:
            self._calls += 1
            if self._calls == point.count:
                with suppress(FileExistsError):
                    Path(point.marker).touch(exist_ok=False)
                    if point.how == "hang":
                        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
                    os.kill(os.getpid(), signal.SIGKILL)


def _path(uri: str) -> str:
    return uri.removeprefix(SCHEME)


def _named(pin: Pin) -> Pin:
    return pin._replace(uri=SCHEME + pin.uri)
