"""Objects in the memory of this process: the smallest store that keeps the whole contract, for tests."""

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from ties_ray.errors import InputError, Problem
from ties_ray.stores import Listing, Part, Pin, WritableStore, changed, crc32c, no_upload


@dataclass(frozen=True)
class _Object:
    data: bytes
    generation: int
    upload: str = ""


@dataclass(frozen=True)
class _Upload:
    uri: str
    size: int
    parts: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    """Offset and bytes, by number."""


_LOCK = threading.Lock()
_SWAP = threading.Lock()
_OBJECTS: dict[str, _Object] = {}
_UPLOADS: dict[str, _Upload] = {}
_GENERATIONS = itertools.count(1)


class Memory(WritableStore):
    """`memory://folder/name`, shared by all instances of one process."""

    pinned_by = "a generation number"

    def list(self, uri: str) -> Listing:
        """Return what lies directly in the folder."""
        prefix = uri.rstrip("/") + "/"
        with _LOCK:
            inside = {key: value for key, value in _OBJECTS.items() if key.startswith(prefix)}
        files = sorted(key for key in inside if "/" not in key[len(prefix) :])
        folders = {prefix + key[len(prefix) :].partition("/")[0] for key in inside if "/" in key[len(prefix) :]}
        return Listing(tuple(_pin(key, inside[key]) for key in files), tuple(sorted(folders)))

    def head(self, uri: str, nbytes: int) -> tuple[Pin, bytes]:
        """Return the object's pin and its first bytes."""
        with _LOCK:
            stored = _OBJECTS.get(uri)
        if stored is None:
            raise FileNotFoundError(uri)
        self.meter.add(requests=1, bytes_read=min(nbytes, len(stored.data)))
        return _pin(uri, stored), stored.data[:nbytes]

    def read(self, pin: Pin, start: int, into: memoryview) -> None:
        """Copy the range."""
        with _LOCK:
            stored = _OBJECTS.get(pin.uri)
        if stored is None:
            raise changed(pin, "the object is gone")
        if _pin(pin.uri, stored) != pin:
            raise changed(pin, f"generation {pin.etag}, now {stored.generation}")
        into.cast("B")[:] = memoryview(stored.data)[start : start + into.nbytes]
        self.meter.add(requests=1, bytes_read=into.nbytes)

    def put(self, uri: str, data: bytes) -> Pin:
        """Set the object."""
        self.meter.add(bytes_written=len(data))
        return _pin(uri, _set(uri, bytes(data)))

    def swap(self, uri: str, data: bytes, etag: str) -> Pin | None:
        """Compare and write under a lock."""
        with _SWAP:
            return super().swap(uri, data, etag)

    def delete(self, uri: str) -> None:
        """Remove the object."""
        with _LOCK:
            _OBJECTS.pop(uri, None)

    def begin_upload(self, uri: str, size: int) -> str:
        """Start an upload."""
        with _LOCK:
            upload = f"upload-{next(_GENERATIONS)}"
            _UPLOADS[upload] = _Upload(uri, size)
        return upload

    def write_part(self, uri: str, upload: str, number: int, offset: int, data: memoryview) -> Part:
        """Keep a copy of the part."""
        with _LOCK:
            if upload not in _UPLOADS:
                raise no_upload(uri, f"writing part {number}")
            _UPLOADS[upload].parts[number] = offset, bytes(data)
        self.meter.add(bytes_written=data.nbytes)
        return Part(number, data.nbytes, crc32c(data))

    def list_parts(self, uri: str, upload: str) -> tuple[Part, ...] | None:
        """Return the parts by number."""
        with _LOCK:
            begun = _UPLOADS.get(upload)
            if begun is None:
                return None
            return tuple(_part(number, data) for number, (_, data) in sorted(begun.parts.items()))

    def list_uploads(self, folder: str) -> tuple[tuple[str, str], ...]:
        """Return the uploads that were begun and neither completed nor aborted."""
        with _LOCK:
            begun = [(upload.uri, number) for number, upload in _UPLOADS.items()]
        return tuple(sorted((uri, number) for uri, number in begun if uri.rpartition("/")[0] == folder.rstrip("/")))

    def complete_upload(self, uri: str, upload: str, parts: Sequence[Part]) -> Pin:
        """Join the parts."""
        with _LOCK:
            begun = _UPLOADS.get(upload)
            there = _OBJECTS.get(uri)
        if begun is None:
            if there is None:
                raise no_upload(uri, "completing an upload")
            if there.upload != upload:
                message = "this upload does not exist, and the object is another"
                raise InputError(Problem(uri, message, "run the merge with --fresh"))
            return _pin(uri, there)
        kept = [_part(number, data) for number, (_, data) in sorted(begun.parts.items())]
        if kept != sorted(parts) or sum(part.size for part in parts) != begun.size:
            raise InputError(Problem(uri, "the parts are not those that were written", "run the merge with --fresh"))
        joined = b"".join(data for _, data in sorted(begun.parts.values()))
        done = _set(uri, joined, upload)
        with _LOCK:
            _UPLOADS.pop(upload, None)
        return _pin(uri, done)

    def abort_upload(self, uri: str, upload: str) -> None:
        """Forget the upload."""
        with _LOCK:
            _UPLOADS.pop(upload, None)


def _set(uri: str, data: bytes, upload: str = "") -> _Object:
    with _LOCK:
        made = _OBJECTS[uri] = _Object(data, next(_GENERATIONS), upload)
    return made


def _pin(uri: str, stored: _Object) -> Pin:
    return Pin(uri, len(stored.data), str(stored.generation))


def _part(number: int, data: bytes) -> Part:
    return Part(number, len(data), crc32c(memoryview(data)))
